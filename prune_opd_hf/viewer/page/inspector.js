// One token: its numbers, why it is or is no drift event, and both models' candidates side by side.

function percent(p) {
  if (p === null) return "–";
  if (p === 0) return "0";
  const hundredths = 100 * p;
  if (hundredths >= 99.95 && p < 1) return hundredths >= 99.995 ? "100" : hundredths.toFixed(2);
  if (hundredths >= 10) return hundredths.toFixed(1);
  if (hundredths >= 0.1) return hundredths.toFixed(2);
  return hundredths >= 0.001 ? hundredths.toFixed(3) : "<0.001";
}

class Inspector {
  constructor(data) {
    this.data = data;
    this.box = document.getElementById("token");
  }

  show(track, t, candidates) {
    const facts = this.#facts(track, t);
    const rows = candidates ? this.#ordered(candidates.at(t), facts) : null;
    this.box.replaceChildren(
      this.#title(track, t, facts),
      this.#numbers(facts),
      this.#verdict(facts, rows),
      rows ? this.#candidates(rows, facts) : element("p", { class: "wait" }, "Reading the candidates …"),
    );
  }

  empty() {
    this.box.replaceChildren(element("p", { class: "wait" }, "This rollout has no response tokens."));
  }

  #facts(track, t) {
    let count = 0;
    for (let i = 0; i <= t; i++) count += track.events[i];
    return {
      t,
      token: track.tokens[track.prompt + t],
      length: track.length,
      overlap: share(track.overlap[t]),
      mass: share(track.mass[t]),
      reliability: share(track.reliability[t]),
      before: t ? share(track.reliability[t - 1]) : 1,
      p: prob(track.logP[t]),
      q: prob(track.logQ[t]),
      logP: logProb(track.logP[t]),
      logQ: logProb(track.logQ[t]),
      event: track.events[t] === 1,
      count,
    };
  }

  #text(token, most = 60) {
    const chip = element("bdi", { class: this.data.special.has(token) ? "tok special" : "tok" });
    const text = this.data.tokens[token];
    chip.textContent = this.data.tokenizer === null ? text.trim() : shorten(text, most).replace(/^ +| +$/g, (s) => "␣".repeat(s.length));
    return chip;
  }

  #title(track, t, facts) {
    return element(
      "div",
      { class: "token-title" },
      element("p", {}, `Token ${t + 1} of ${facts.length}`, element("span", {}, `id ${this.data.ids[facts.token]}`)),
      element("p", { class: "big" }, this.#text(facts.token, 200)),
    );
  }

  #numbers(facts) {
    const { metric } = this.data.config;
    const pairs = [
      ["overlap", number(facts.overlap, 3), metric === "overlap" && facts.event ? "low" : ""],
      ["shared mass", number(facts.mass, 3), metric === "mass" && facts.event ? "low" : ""],
      ["reliability", number(facts.reliability, 3), ""],
      ["loss weight", facts.reliability === null ? "–" : number(facts.reliability + this.data.config.weight_base, 3), ""],
    ];
    return element(
      "dl",
      { class: "four" },
      ...pairs.map(([name, value, mark]) => element("div", { class: mark }, element("dt", {}, name), element("dd", {}, value))),
    );
  }

  #verdict(facts, rows) {
    const { metric, threshold, top_k: k } = this.data.config;
    const lines = [];
    if (facts.event) {
      const fall =
        facts.before === facts.reliability
          ? `reliability stays at ${number(facts.reliability, 3)}`
          : `reliability ${number(facts.before, 3)} → ${number(facts.reliability, 3)}`;
      const limit = this.data.budget;
      const of = limit === null || facts.count > limit ? "" : ` of ${limit}`;
      lines.push(element("b", {}, `Drift event ${facts.count}${of}: ${fall}.`));
    }
    const side = facts.event ? "below" : "not below";
    if (metric === "overlap" && facts.overlap !== null)
      lines.push(`${Math.round(facts.overlap * k)} of ${k} candidates are shared, ${side} the threshold ${threshold}.`);
    else if (metric === "nucleus")
      lines.push(`The token lies ${facts.event ? "outside" : "inside"} the teacher's nucleus of mass ${threshold}.`);
    else if (metric === "tail")
      lines.push(`The token lies ${facts.event ? "in" : "outside of"} the teacher's tail beyond the mass ${threshold}.`);
    else if (metric === "weighted_overlap")
      lines.push(`Counted by probability, the candidates shared lie ${side} the threshold ${threshold}.`);
    else if (metric === "mass" && facts.mass !== null)
      lines.push(`The teacher shares ${number(facts.mass, 3)} of the candidates' probability, ${side} the threshold ${threshold}.`);
    const top = rows?.find((row) => row.teacherRank === 0);
    if (top) {
      if (top.token === facts.token) lines.push(`The token is the teacher's first choice, at ${percent(top.q)}%.`);
      else
        lines.push(
          element(
            "span",
            {},
            `The teacher gives this token ${percent(facts.q)}% and wants `,
            this.#text(top.token, 24),
            ` instead, at ${percent(top.q)}%.`,
          ),
        );
    }
    if (facts.event && facts.mass !== null && facts.mass >= 0.9)
      lines.push(`Yet the teacher shares at least ${percent(facts.mass)}% of their probability: the sets differ where it is thin.`);
    else if (facts.event && facts.mass !== null && top && top.token === facts.token && facts.q >= 0.5)
      lines.push("Yet the teacher prefers this very token.");
    return element("div", { class: facts.event ? "verdict event" : "verdict" }, ...lines.map((line) => element("p", {}, line)));
  }

  // Most likely first, by either model; the sampled token is there even if it is nobody's candidate.
  #ordered(rows, facts) {
    const weight = (row) => Math.max(row.p ?? 0, row.q ?? 0);
    const { token, p, q } = facts;
    const there = rows.some((row) => row.token === token);
    const sampled = there ? [] : [{ token, p, q, inStudent: false, inTeacher: false, teacherRank: null }];
    return [...rows, ...sampled].sort((a, b) => weight(b) - weight(a));
  }

  #candidates(rows, facts) {
    const k = this.data.candidates;
    const least = Math.min(...rows.filter((row) => row.inStudent && row.p !== null).map((row) => row.p)); // others are below it
    const most = Number.isFinite(least) ? `≤${percent(least)}`.replace("≤<", "<") : "–";
    const body = rows.map((row) => {
      const kind = [["neither", "teacher"], ["student", "both"]][Number(row.inStudent)][Number(row.inTeacher)];
      const membership = {
        both: "among both top-k",
        teacher: "teacher's top-k only",
        student: "student's top-k only",
        neither: "beyond what is shown of either top-k",
      }[kind];
      const bar = (side, p, unknown) => {
        const fill = element("i", {});
        fill.style.width = `${100 * (p ?? 0)}%`;
        return element("td", { class: `bar ${side}` }, element("span", {}, p === null ? unknown : percent(p)), fill);
      };
      return element(
        "tr",
        { class: row.token === facts.token ? `${kind} sampled` : kind },
        bar("left", row.p, row.inStudent ? "–" : most),
        element("th", { scope: "row", title: `id ${this.data.ids[row.token]}, ${membership}` }, this.#text(row.token, 18)),
        bar("right", row.q, "–"),
      );
    });
    const head = element(
      "tr",
      {},
      element("th", { class: "student", scope: "col" }, "student p %"),
      element("th", { scope: "col" }, "candidate"),
      element("th", { class: "teacher", scope: "col" }, "teacher q %"),
    );
    const shown = k < this.data.config.top_k ? `The first ${k} of each model's ${this.data.config.top_k} candidates. ` : "";
    return element(
      "div",
      {},
      element("table", { class: this.data.student ? "candidates" : "candidates alone" }, element("thead", {}, head), element("tbody", {}, ...body)),
      element(
        "p",
        { class: "note" },
        shown,
        element("b", { class: "key both" }, "●"),
        " both top-k  ",
        element("b", { class: "key student" }, "◐"),
        " student only  ",
        element("b", { class: "key teacher" }, "◑"),
        " teacher only.  Outlined: the sampled token.",

      ),
    );
  }
}
