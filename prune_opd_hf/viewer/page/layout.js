// Where lines break. All lines have one height, so the reader knows which are in sight without drawing the others.

const LINE_HEIGHT = 28;
const LONGEST_SHOWN = 48;
const TOKEN_PADDING = 2;

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const shorten = (text, most = LONGEST_SHOWN) => (text.length > most ? `${[...text].slice(0, most).join("")}…` : text);

class Ruler {
  constructor(data, font) {
    this.data = data;
    this.context = document.createElement("canvas").getContext("2d");
    this.context.font = font;
    this.widths = new Float32Array(data.tokens.length);
    const [narrow, wide] = ["i".repeat(20), "M".repeat(20)].map((text) => this.context.measureText(text).width / 20);
    this.cell = Math.abs(narrow - wide) < 0.01 ? wide : null; // of a monospaced font: ASCII need not be measured
  }
  #text(text) {
    if (this.cell !== null && /^[ -~]*$/.test(text)) return text.length * this.cell;
    return this.context.measureText(text).width;
  }
  width(token) {
    if (!this.widths[token]) {
      const frame = this.data.special.has(token) ? 8 : 0;
      this.widths[token] = this.#text(shorten(this.data.tokens[token])) + TOKEN_PADDING + frame;
    }
    return this.widths[token];
  }
}

// Lines of a rollout: {kind: "label" | "prompt" | "response" | "exhausted" | "end", start, end}, positions of the track's tokens.
function layOut(data, track, summary, ruler, width, showPrompt) {
  const lines = [];
  const flow = (kind, from, to) => {
    let start = from;
    let used = 0;
    let gap = from; // the last place where a word begins
    for (let i = from; i < to; i++) {
      const token = track.tokens[i];
      const wide = ruler.width(token);
      if (used + wide > width && i > start) {
        const at = gap > start && i - gap < 12 ? gap : i;
        lines.push({ kind, start, end: at });
        start = at;
        used = 0;
        for (let j = at; j < i; j++) used += ruler.width(track.tokens[j]);
      }
      if (data.tokens[token].startsWith(" ")) gap = i;
      used += wide;
      if (data.breaks[token]) {
        lines.push({ kind, start, end: i + 1 });
        if (data.breaks[token] > 1) lines.push({ kind, start: i + 1, end: i + 1 });
        start = i + 1;
        used = 0;
      }
    }
    if (start < to) lines.push({ kind, start, end: to });
  };
  if (track.prompt) {
    lines.push({ kind: "label", start: 0, end: 0, of: "prompt" });
    if (showPrompt) flow("prompt", 0, track.prompt);
  }
  lines.push({ kind: "label", start: track.prompt, end: track.prompt, of: "response" });
  const total = track.prompt + track.length;
  const spent = summary.exhausted;
  const split = spent === null ? total : track.prompt + spent + 1;
  flow("response", track.prompt, split);
  if (spent !== null) lines.push({ kind: "exhausted", start: split, end: split });
  flow("response", split, total);
  lines.push({ kind: "end", start: total, end: total });
  return lines;
}

// Index of the line that holds a position of the track.
function lineOf(lines, position) {
  let low = 0;
  let high = lines.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (lines[middle].end > position) high = middle;
    else low = middle + 1;
  }
  return low;
}
