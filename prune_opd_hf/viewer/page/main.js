// Puts the parts together: which rollout is open, which token is explained, keys, search, theme, and the address.

const KEYS = [
  ["← →", "previous, next token"],
  ["↑ ↓", "the line above, below"],
  ["PgUp PgDn Home End", "a page; first, last token"],
  ["j k", "next, previous rollout of the list"],
  ["b", "where the drift begins: the first event"],
  ["e E", "next, previous event"],
  ["c", "where reliability is used up, or the end"],
  ["/", "search the text of all rollouts"],
  ["n N", "next, previous match"],
  ["t", "tint by overlap, shared mass, teacher's probability, nothing"],
  ["p", "show or hide the prompt"],
  ["d", "page light, dark, or as the system"],
  ["Tab", "from list to chart to text; Esc goes to the text"],
  ["?", "these keys"],
];

const TINTS = [
  ["overlap", "overlap", (track, t) => share(track.overlap[t])],
  ["mass", "shared mass", (track, t) => share(track.mass[t])],
  ["teacher", "teacher's q of the token", (track, t) => prob(track.logQ[t])],
  ["none", "nothing", () => null],
];

class App {
  constructor(data) {
    this.data = data;
    this.matches = [];
    this.reader = new Reader(data, (t) => this.look(t));
    this.reader.onScroll = () => this.drawChart();
    this.inspector = new Inspector(data);
    this.chart = new Chart(document.getElementById("chart"), (t) => this.reader.focus(t, "centre"));
    this.list = new List(
      data,
      (index) => this.open(index),
      () => this.reader.box.focus(),
    );
    const there = data.student ? TINTS : TINTS.filter(([key]) => key === "teacher" || key === "none");
    this.tints = [...there].sort((a, b) => (b[0] === data.agreement) - (a[0] === data.agreement)); // the chosen one first
    this.#furnish();
    this.#listen();
  }

  async start() {
    this.list.refresh();
    const asked = new URLSearchParams(location.hash.slice(1));
    const index = Number(asked.get("r") ?? 0);
    const t = asked.get("t") === null ? null : Number(asked.get("t")) - 1;
    const valid = Number.isInteger(index) && index >= 0 && index < this.data.rollouts.length;
    await this.open(valid ? index : 0, valid && Number.isInteger(t) ? t : null);
    this.reader.box.focus({ preventScroll: true });
    document.documentElement.dataset.readyMs = performance.now().toFixed(0);
  }

  #furnish() {
    const { config, data } = { config: this.data.config, data: this.data };
    const when = config.metric === "nucleus" ? `outside mass ${config.threshold}` : `below ${config.threshold}`;
    document.getElementById("source").textContent =
      `${data.source} · ${config.metric}, top-${config.top_k}, event ${when}, each −${config.weight_drop}` +
      (data.budget === null ? "" : `, spent after ${data.budget}`) +
      (data.tokenizer === null ? " · token ids (no tokenizer given)" : ` · ${data.tokenizer}`);
    const tint = document.getElementById("tint");
    for (const [key, label] of this.tints) tint.append(element("option", { value: key }, label));
    tint.addEventListener("change", () => this.retint());
    const help = document.getElementById("help");
    const close = element("button", { type: "button" }, "Close");
    close.addEventListener("click", () => help.close());
    const keys = KEYS.flatMap(([key, what]) => [element("dt", {}, ...key.split(" ").map((k) => element("kbd", {}, k))), element("dd", {}, what)]);
    help.append(element("h2", {}, "Keys"), element("dl", {}, ...keys), close);
    document.getElementById("help-open").addEventListener("click", () => help.showModal());
    this.#legend();
    this.theme = "auto";
    document.getElementById("theme").addEventListener("click", () => this.nextTheme());
    this.#showTheme();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.recolour());
  }

  #legend() {
    const key = (name, text) => element("span", {}, element("i", { class: `swatch ${name}` }), text);
    const threshold = this.#threshold() === null ? null : key("threshold", `threshold ${this.#threshold()}`);
    const name = AGREEMENTS[this.data.agreement];
    const legend = document.getElementById("legend");
    legend.replaceChildren();
    legend.append(
      ...[
        key("heat", `${name} from 1 to 0`),
        key("agreement", name),
        key("reliability", "reliability"),
        key("rug", "drift event"),
        threshold,
      ].filter(Boolean),
    );
  }

  async open(index, t = null) {
    this.opening = index;
    this.list.select(index);
    const track = await this.data.track(index);
    if (this.opening !== index) return; // another one was asked for meanwhile
    this.index = index;
    this.track = track;
    this.candidates = null;
    const { query } = this;
    await this.#match(query);
    if (this.opening !== index) return;
    this.#headline();
    const [, , agreement] = TINTS.find(([key]) => key === this.data.agreement);
    const summary = this.data.rollouts[index];
    const values = Array.from({ length: track.length }, (_, i) => agreement(track, i));
    this.chart.show(track, values, this.#threshold(), summary.exhausted);
    this.reader.focused = 0;
    this.reader.box.scrollTop = 0;
    this.reader.show(index, track, this.#tint());
    const begin = query && this.matches.length ? this.matches[0] : (summary.first_event ?? 0);
    if (track.length) this.reader.focus(t ?? begin, t === null && begin === 0 ? "nearest" : "centre");
    else this.showNothing();
    const candidates = await this.data.candidatesOf(index);
    if (this.opening !== index) return;
    this.candidates = candidates;
    if (track.length) this.look(this.looked);
  }

  showNothing() {
    this.inspector.empty();
    this.drawChart();
  }

  // The value below which agreement is an event, or null where the events come from something else.
  #threshold() {
    const { metric, threshold } = this.data.config;
    return metric === this.data.agreement ? threshold : null;
  }

  #tint() {
    const [, , value] = this.tints.find(([key]) => key === document.getElementById("tint").value);
    return (t) => value(this.track, t);
  }

  retint() {
    this.reader.tintOf = this.#tint();
    this.reader.redraw();
  }

  #headline() {
    const row = this.data.rollouts[this.index];
    const stop = this.data.stops[row.stop];
    document.getElementById("name").textContent = `Rollout ${this.index}`;
    const badge = document.getElementById("badge");
    badge.className = stop;
    badge.textContent = `${SIGNS[stop]} ${STOP_NAMES[stop]}`;
    const facts = [
      ["tokens", String(row.length)],
      ["effective", String(row.effective)],
      ["drift events", String(row.events)],
      ["drift begins", row.first_event === null ? "never" : `token ${row.first_event + 1}`],
      ["mean overlap", number(row.overlap, 3)],
      ["shared mass", number(row.mass, 3)],
      ["log p − log q", row.log_ratio === null ? "–" : `${number(row.log_ratio, 2)} nats`],
      ...(this.data.student ? [] : [["teacher's q", number(row.teacher, 3)]]),
      ["reliability left", number(row.reliability, 3)],
    ];
    document.getElementById("numbers").replaceChildren(
      ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
    );
  }

  look(t) {
    if (t === undefined) return;
    this.looked = t;
    this.inspector.show(this.track, t, this.candidates);
    this.drawChart();
    clearTimeout(this.addressing);
    this.addressing = setTimeout(() => this.#address(), 400);
  }

  // The address names the token, to send it to somebody.
  #address() {
    try {
      history.replaceState(null, "", `#r=${this.index}&t=${this.reader.focused + 1}`);
    } catch {
      // some browsers forbid it for files; nothing depends on it
    }
  }

  drawChart() {
    if (!this.track) return;
    const cursor = this.looked ?? null;
    this.chart.draw(cursor, this.reader.visible());
    const slider = this.chart.canvas;
    slider.setAttribute("aria-valuemin", "1");
    slider.setAttribute("aria-valuemax", String(this.track.length));
    slider.setAttribute("aria-valuenow", String(this.reader.focused + 1));
    slider.setAttribute("aria-valuetext", `token ${this.reader.focused + 1} of ${this.track.length}`);
  }

  #event(step) {
    const { events, length } = this.track;
    for (let t = this.reader.focused + step; t >= 0 && t < length; t += step) if (events[t]) return this.reader.focus(t, "centre");
  }

  #nextMatch(step) {
    const { focused } = this.reader;
    const ahead = step > 0 ? this.matches.find((t) => t > focused) : this.matches.findLast((t) => t < focused);
    const wrapped = ahead ?? (step > 0 ? this.matches[0] : this.matches.at(-1));
    if (wrapped !== undefined) this.reader.focus(wrapped, "centre");
  }

  async search() {
    const query = document.getElementById("query").value.toLowerCase();
    if (query === (this.query ?? "")) return;
    this.query = query;
    const found = new Set();
    const status = document.getElementById("shown");
    const total = this.data.rollouts.length;
    if (query) {
      for (let index = 0; index < total; index++) {
        const { text } = await this.data.searchText(index);
        if (this.query !== query) return; // typed on meanwhile
        if (text.includes(query)) found.add(index);
        if (index % 16 === 15) {
          status.textContent = `searching ${index + 1} of ${total} …`;
          await pause();
        }
      }
    }
    this.list.found = query ? found : null;
    this.list.refresh();
    await this.#match(query);
    this.reader.redraw();
    if (query && found.size && !found.has(this.index)) this.open(this.list.order[0] ?? this.index);
    else if (this.matches.length) this.reader.focus(this.matches[0], "centre");
  }

  async #match(query) {
    const { touched, firsts } = query ? findMatches(await this.data.searchText(this.index), query) : { touched: new Set(), firsts: [] };
    this.matches = firsts;
    this.reader.touched = touched;
  }

  nextTheme() {
    this.theme = { auto: "light", light: "dark", dark: "auto" }[this.theme];
    if (this.theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = this.theme;
    this.#showTheme();
    this.recolour();
  }

  #showTheme() {
    const button = document.getElementById("theme");
    button.textContent = { auto: "◐ auto", light: "○ light", dark: "● dark" }[this.theme];
    button.setAttribute("aria-label", `Colours: ${this.theme}`);
  }

  recolour() {
    this.list.redrawStrips();
    this.chart.stale = true;
    this.drawChart();
  }

  #listen() {
    const query = document.getElementById("query");
    query.addEventListener("input", () => {
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.search(), 150);
    });
    query.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.search().then(() => this.reader.box.focus());
    });
    for (const button of document.querySelectorAll("[data-key]")) button.addEventListener("click", () => this.press(button.dataset.key));
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || document.getElementById("help").open) return;
      if (event.key === "Escape") return this.reader.box.focus();
      const target = event.target;
      if (target.matches("input:not([type=checkbox]), select")) return;
      if (target.matches("button, input") && (event.key === " " || event.key === "Enter")) return;
      if (this.press(event.key)) event.preventDefault();
    });
    addEventListener("resize", () => this.drawChart());
  }

  press(key) {
    if (!this.track) return false;
    const { reader, list } = this;
    const summary = this.data.rollouts[this.index];
    const actions = {
      ArrowRight: () => reader.focus(reader.focused + 1),
      ArrowLeft: () => reader.focus(reader.focused - 1),
      ArrowDown: () => reader.vertical(1),
      ArrowUp: () => reader.vertical(-1),
      PageDown: () => reader.page(1),
      PageUp: () => reader.page(-1),
      Home: () => reader.focus(0),
      End: () => reader.focus(this.track.length - 1),
      j: () => list.move(1),
      k: () => list.move(-1),
      b: () => reader.focus(summary.first_event ?? 0, "centre"),
      e: () => this.#event(1),
      E: () => this.#event(-1),
      c: () => reader.focus(summary.exhausted ?? this.track.length - 1, "centre"),
      n: () => this.#nextMatch(1),
      N: () => this.#nextMatch(-1),
      "/": () => this.#toQuery(),
      t: () => this.#nextTint(),
      p: () => this.#togglePrompt(),
      d: () => this.nextTheme(),
      "?": () => document.getElementById("help").showModal(),
    };
    if (!Object.hasOwn(actions, key)) return false;
    actions[key]();
    return true;
  }

  #nextTint() {
    const tint = document.getElementById("tint");
    tint.selectedIndex = (tint.selectedIndex + 1) % tint.options.length;
    this.retint();
  }

  #toQuery() {
    const query = document.getElementById("query");
    query.focus();
    query.select();
  }

  #togglePrompt() {
    this.reader.showPrompt = !this.reader.showPrompt;
    this.reader.width = null;
    this.reader.layOut();
    this.reader.focus(this.reader.focused, "centre");
  }
}

Data.read()
  .then((data) => new App(data).start())
  .catch((error) => {
    const failure = element("p", { class: "failed", role: "alert" }, `This file cannot be read: ${error.message}`);
    document.body.prepend(failure);
    throw error;
  });
