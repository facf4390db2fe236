// The list of rollouts: filter, sort, and draw only the rows in sight.

const ROW_HEIGHT = 58;
const SIGNS = { eos: "●", drift: "✂", length: "▮", criterion: "◆" };
const STOP_NAMES = { eos: "ended", drift: "drift", length: "length cap", criterion: "other criterion" };
const STOP_PHRASES = { eos: "ended by itself", drift: "stopped by drift", length: "met the length cap", criterion: "ended by another criterion" };

const SORTS = [
  ["file", "file order", (row, index) => index],
  ["overlap", "mean overlap", (row) => row.overlap],
  ["events", "drift events", (row) => row.events],
  ["first", "first event", (row) => row.first_event],
  ["length", "length", (row) => row.length],
  ["reliability", "last reliability", (row) => row.reliability],
  ["mass", "mean shared mass", (row) => row.mass],
  ["teacher", "mean teacher's q", (row) => row.teacher],
  ["ratio", "log p − log q", (row) => row.log_ratio],
];

const AGREEMENTS = { overlap: "overlap", mass: "shared mass", teacher: "teacher's q" };
const number = (value, digits = 2) => (value === null ? "–" : value.toFixed(digits).replace(/^-(?=[0.]*$)/, ""));

class List {
  constructor(data, onOpen, onEnter) {
    this.data = data;
    this.onOpen = onOpen;
    this.box = document.getElementById("list");
    this.space = document.getElementById("list-space");
    this.rows = new Map();
    this.order = data.rollouts.map((_, index) => index);
    this.found = null; // rollouts whose text holds the query, or null without one
    this.longest = Math.max(1, ...data.rollouts.map((row) => row.length));
    this.current = 0;
    this.descending = false;
    this.#controls();
    this.box.addEventListener("scroll", () => requestAnimationFrame(() => this.draw()), { passive: true });
    this.box.addEventListener("click", (event) => {
      const row = event.target.closest("[data-rollout]");
      if (row) this.onOpen(Number(row.dataset.rollout));
    });
    this.box.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8, Home: -1e9, End: 1e9 }[event.key];
      if (step) this.move(step);
      else if (event.key === "Enter") onEnter();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
  }

  #controls() {
    const counts = this.data.stops.map((_, stop) => this.data.rollouts.filter((row) => row.stop === stop).length);
    this.boxes = this.data.stops.map((name, stop) => {
      const box = element("input", { type: "checkbox", "data-stop": name });
      box.checked = true;
      const label = element("label", { class: `stop ${name}` }, box);
      label.append(element("span", {}, `${SIGNS[name]} ${STOP_NAMES[name]} `, element("b", {}, counts[stop].toString())));
      if (counts[stop]) document.getElementById("stops").append(label);
      return box;
    });
    const sort = document.getElementById("sort");
    const there = SORTS.filter(([, , value]) => this.data.rollouts.some((row, index) => (value(row, index) ?? null) !== null));
    for (const [key, label] of there) sort.append(element("option", { value: key }, label));
    const name = AGREEMENTS[this.data.agreement];
    document.getElementById("agreement-name").textContent = name[0].toUpperCase() + name.slice(1);
    this.#showDirection();
    document.getElementById("direction").addEventListener("click", () => {
      this.descending = !this.descending;
      this.#showDirection();
      this.refresh();
    });
    const form = document.getElementById("filters");
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => event.target.id !== "query" && this.refresh());
  }

  #showDirection() {
    const button = document.getElementById("direction");
    button.textContent = this.descending ? "↓ high" : "↑ low";
  }

  // Bounds that are empty or no number do not bound.
  #within(value, name) {
    const bound = (end) => {
      const text = document.getElementById(`${name}-${end}`).value.trim().replace(",", ".");
      return text === "" || !Number.isFinite(Number(text)) ? null : Number(text);
    };
    const low = bound("min");
    const high = bound("max");
    if (low === null && high === null) return true;
    return value !== null && (low === null || value >= low) && (high === null || value <= high);
  }

  refresh() {
    const { rollouts } = this.data;
    const value = SORTS.find(([key]) => key === document.getElementById("sort").value)[2];
    const kept = rollouts
      .map((row, index) => ({ row, index, by: value(row, index) }))
      .filter(
        ({ row, index }) =>
          this.boxes[row.stop].checked &&
          this.#within(row[this.data.agreement], "agreement") &&
          this.#within(row.events, "events") &&
          this.#within(row.length, "length") &&
          (this.found === null || this.found.has(index)),
      );
    const sign = this.descending ? -1 : 1;
    // Rollouts without the number come last in either direction.
    kept.sort((a, b) => (a.by === null) - (b.by === null) || sign * (a.by - b.by) || a.index - b.index);
    this.order = kept.map(({ index }) => index);
    const all = rollouts.length;
    document.getElementById("shown").textContent =
      this.order.length === all ? `${all} rollouts` : `${this.order.length} of ${all} rollouts`;
    this.space.replaceChildren();
    this.rows.clear();
    this.space.style.height = `${this.order.length * ROW_HEIGHT}px`;
    if (!this.order.length) this.space.append(element("p", { class: "none" }, "Nothing fits these filters."));
    this.reveal();
    this.draw();
  }

  move(step) {
    if (!this.order.length) return;
    const at = this.order.indexOf(this.current);
    const next = at < 0 ? 0 : Math.max(0, Math.min(this.order.length - 1, at + step));
    this.onOpen(this.order[next]);
  }

  select(index) {
    this.rows.get(this.current)?.setAttribute("aria-selected", "false");
    this.current = index;
    this.reveal();
    this.draw();
    this.rows.get(index)?.setAttribute("aria-selected", "true");
    if (this.rows.has(index)) this.box.setAttribute("aria-activedescendant", `row-${index}`);
  }

  reveal() {
    const at = this.order.indexOf(this.current);
    if (at < 0) return;
    const top = at * ROW_HEIGHT;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    const bottom = top + ROW_HEIGHT - this.box.clientHeight;
    if (bottom > this.box.scrollTop) this.box.scrollTop = bottom;
  }

  draw() {
    const from = Math.max(0, Math.floor(this.box.scrollTop / ROW_HEIGHT) - 3);
    const to = Math.min(this.order.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW_HEIGHT) + 3);
    const wanted = new Set(this.order.slice(from, to));
    for (const [index, row] of this.rows) {
      if (!wanted.has(index)) {
        row.remove();
        this.rows.delete(index);
      }
    }
    for (let at = from; at < to; at++) {
      const index = this.order[at];
      if (this.rows.has(index)) continue;
      const row = this.#row(index, at);
      this.rows.set(index, row);
      this.space.append(row);
      this.#strip(row.querySelector("canvas"), this.data.rollouts[index]);
    }
  }

  redrawStrips() {
    for (const [index, row] of this.rows) this.#strip(row.querySelector("canvas"), this.data.rollouts[index]);
  }

  #row(index, at) {
    const row = this.data.rollouts[index];
    const stop = this.data.stops[row.stop];
    const description = `Rollout ${index}, ${STOP_NAMES[stop]}, ${row.length} tokens, ${row.events} events`;
    const node = element(
      "div",
      {
        id: `row-${index}`,
        class: "row",
        role: "option",
        "data-rollout": index,
        "aria-selected": String(index === this.current),
        "aria-setsize": this.order.length,
        "aria-posinset": at + 1,
        "aria-label": description,
      },
      element(
        "div",
        { class: "facts" },
        element("b", {}, `#${index}`),
        element("span", { class: `sign ${stop}`, title: STOP_NAMES[stop] }, SIGNS[stop]),
        element("span", {}, `${row.length} tok`),
        element("span", { class: row.events ? "events" : "" }, `${row.events} ev`),
        element("span", { class: "mean", title: `mean ${AGREEMENTS[this.data.agreement]}` }, number(row[this.data.agreement])),
      ),
      element("canvas", { "aria-hidden": "true" }),
    );
    node.style.transform = `translateY(${at * ROW_HEIGHT}px)`;
    return node;
  }

  // Agreement along the rollout; its width is its length against the longest one.
  #strip(canvas, row) {
    const { context, width, height } = fitCanvas(canvas);
    const colours = palette();
    const long = Math.max(6, (width * row.length) / this.longest);
    context.fillStyle = colours.strip;
    context.fillRect(0, 0, long, height);
    const bins = row.strip.length;
    row.strip.forEach((percent, bin) => {
      context.globalAlpha = (heat(percent / 100) * parseFloat(colours["heat-most"])) / 100;
      context.fillStyle = colours.drift;
      const left = Math.round((bin * long) / bins);
      context.fillRect(left, 0, Math.round(((bin + 1) * long) / bins) - left, height);
    });
    context.globalAlpha = 1;
    if (row.exhausted !== null) {
      context.fillStyle = colours.event;
      context.fillRect(Math.max(0, (long * (row.exhausted + 1)) / row.length - 3), 0, 3, height);
    }
  }
}
