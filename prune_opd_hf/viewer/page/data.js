// What is in the file: base64 blocks under zlib. Unpacked when asked for; the order of planes is that of encoding.py.

const ABSENT = 65535;
const IN_TAIL = 254; // instead of a rank: among the student's candidates that are not shown
const ID_BYTES = 3;
const KEPT_ROLLOUTS = 6;

function fromBase64(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

async function unpack(base64) {
  const stream = new Blob([fromBase64(base64)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const pause = (milliseconds = 0) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// A large file is still arriving while its first rollout is read: a block is whole once something follows it.
async function block(name) {
  for (;;) {
    const element = document.getElementById(name);
    if (element && (element.nextElementSibling || document.readyState !== "loading")) return unpack(element.textContent);
    if (document.readyState !== "loading") throw new Error(`the file is cut short: it lacks ${name}`);
    await pause(10);
  }
}

class Planes {
  constructor(bytes) {
    this.bytes = bytes;
    this.at = 0;
  }
  numbers(count, width) {
    const values = width <= 2 ? new Uint16Array(count) : new Uint32Array(count);
    for (let plane = 0; plane < width; plane++) {
      const start = this.at + plane * count;
      for (let i = 0; i < count; i++) values[i] |= this.bytes[start + i] << (8 * plane);
    }
    this.at += width * count;
    return values;
  }
  octets(count) {
    this.at += count;
    return this.bytes.subarray(this.at - count, this.at);
  }
}

const share = (code) => (code === ABSENT ? null : code / (ABSENT - 1));
const logProb = (code) => (code === ABSENT ? null : -code / 1000);
const prob = (code) => (code === ABSENT ? null : code === ABSENT - 1 ? 0 : Math.exp(-code / 1000));

class Data {
  constructor(header) {
    Object.assign(this, header);
    this.special = new Set(header.special);
    this.fragments = new Set(header.fragments);
    this.tracks = new Map();
    this.candidateBlocks = new Map();
  }

  static async read() {
    return new Data(JSON.parse(new TextDecoder().decode(await block("header"))));
  }

  async track(index) {
    return this.#recent(this.tracks, index, async () => {
      const { prompt, length } = this.rollouts[index];
      const planes = new Planes(await block(`track-${index}`));
      return {
        prompt,
        length,
        tokens: planes.numbers(prompt + length, ID_BYTES), // the prompt's, then the response's
        overlap: planes.numbers(length, 2),
        reliability: planes.numbers(length, 2),
        logP: planes.numbers(length, 2),
        logQ: planes.numbers(length, 2),
        mass: planes.numbers(length, 2),
        events: planes.octets(length),
      };
    });
  }

  // Candidates of one rollout; `at(t)` gives the union of both models' lists at one position.
  async candidatesOf(index) {
    return this.#recent(this.candidateBlocks, index, async () => {
      const count = this.rollouts[index].length * this.candidates;
      const planes = new Planes(await block(`candidates-${index}`));
      const student = this.student && {
        tokens: planes.numbers(count, ID_BYTES),
        logP: planes.numbers(count, 2),
        logQ: planes.numbers(count, 2),
        shared: planes.octets(count),
      };
      const ranks = planes.octets(count);
      const before = new Uint32Array(count + 1); // entries without a rank before each place
      for (let i = 0; i < count; i++) before[i + 1] = before[i] + (ranks[i] >= IN_TAIL ? 1 : 0);
      const tokens = planes.numbers(before[count], ID_BYTES);
      const logQ = planes.numbers(before[count], 2);
      return { at: (t) => this.#union(t, student, ranks, before, tokens, logQ) };
    });
  }

  #union(t, student, ranks, before, tokens, logQ) {
    const k = this.candidates;
    const rows = [];
    for (let j = 0; student && j < k; j++) {
      const i = t * k + j;
      rows.push({
        token: student.tokens[i],
        p: prob(student.logP[i]),
        q: prob(student.logQ[i]),
        inStudent: true,
        inTeacher: student.shared[i] === 1,
        teacherRank: null,
      });
    }
    for (let j = 0; j < k; j++) {
      const i = t * k + j;
      if (ranks[i] < IN_TAIL) rows[ranks[i]].teacherRank = j;
      else
        rows.push({
          token: tokens[before[i]],
          p: null,
          q: prob(logQ[before[i]]),
          inStudent: ranks[i] === IN_TAIL,
          inTeacher: true,
          teacherRank: j,
        });
    }
    return rows;
  }

  async #recent(kept, index, make) {
    if (!kept.has(index)) {
      kept.set(index, make());
      if (kept.size > KEPT_ROLLOUTS) kept.delete(kept.keys().next().value);
    }
    return kept.get(index);
  }

  // Lower-case text of a rollout's response and where each token begins in it. Searching reads every rollout once.
  async searchText(index) {
    this.texts ??= new Map();
    if (!this.texts.has(index)) {
      const planes = new Planes(await block(`track-${index}`));
      const { prompt, length } = this.rollouts[index];
      const tokens = planes.numbers(prompt + length, ID_BYTES);
      this.plain ??= this.tokens.map((text) => text.replace(/[↵⇥]/g, " ").toLowerCase());
      const starts = new Uint32Array(length + 1);
      const parts = new Array(length);
      for (let t = 0; t < length; t++) {
        parts[t] = this.plain[tokens[prompt + t]];
        starts[t + 1] = starts[t] + parts[t].length;
      }
      this.texts.set(index, { text: parts.join(""), starts });
    }
    return this.texts.get(index);
  }
}

// Tokens that a search touches, in order, and the first token of every match.
function findMatches({ text, starts }, query) {
  const touched = new Set();
  const firsts = [];
  let t = 0;
  for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + query.length)) {
    while (starts[t + 1] <= at) t++;
    firsts.push(t);
    for (let next = t; next + 1 < starts.length && starts[next] < at + query.length; next++) touched.add(next);
  }
  return { touched, firsts };
}
