// The text: only the lines in sight are in the document. One token has the focus; the pointer may look at another.

const OVERSCAN = 6;
const GUTTER = 92;

class Reader {
  constructor(data, onLook) {
    this.data = data;
    this.onLook = onLook; // called with the token to explain, or null
    this.box = document.getElementById("text");
    this.space = document.getElementById("space");
    this.drawn = new Map();
    this.focused = 0;
    this.hovered = null;
    this.showPrompt = true;
    this.touched = new Set();
    this.lines = [];
    this.box.addEventListener("scroll", () => this.#schedule(), { passive: true });
    new ResizeObserver(() => this.layOut()).observe(this.box);
    const tokenOf = (event) => {
      const node = event.target.closest?.("[data-t]");
      return node ? Number(node.dataset.t) : null;
    };
    this.box.addEventListener("mouseover", (event) => this.hover(tokenOf(event)));
    this.box.addEventListener("mouseleave", () => this.hover(null));
    this.box.addEventListener("click", (event) => {
      const t = tokenOf(event);
      if (t !== null) this.focus(t);
    });
  }

  show(index, track, tintOf) {
    this.index = index;
    this.track = track;
    this.summary = this.data.rollouts[index];
    this.tintOf = tintOf;
    this.hovered = null;
    this.width = null;
    this.layOut();
  }

  layOut() {
    if (!this.track) return;
    const width = this.box.clientWidth - GUTTER - 28;
    if (width === this.width) return this.draw();
    const first = this.width === null ? null : this.firstVisible();
    this.width = width;
    if (!this.ruler) {
      const style = getComputedStyle(this.box);
      this.ruler = new Ruler(this.data, `${style.fontSize} ${style.fontFamily}`);
    }
    this.lines = layOut(this.data, this.track, this.summary, this.ruler, Math.max(80, width), this.showPrompt);
    this.space.style.height = `${this.lines.length * LINE_HEIGHT + 24}px`;
    if (first !== null) this.box.scrollTop = lineOf(this.lines, this.track.prompt + first) * LINE_HEIGHT;
    this.redraw();
  }

  redraw() {
    this.space.replaceChildren();
    this.drawn.clear();
    this.draw();
  }

  #schedule() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = null;
      this.draw();
    });
  }

  draw() {
    if (!this.track) return;
    const from = Math.max(0, Math.floor(this.box.scrollTop / LINE_HEIGHT) - OVERSCAN);
    const to = Math.min(this.lines.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / LINE_HEIGHT) + OVERSCAN);
    for (const [at, node] of this.drawn) {
      if (at < from || at >= to) {
        node.remove();
        this.drawn.delete(at);
      }
    }
    const fresh = document.createDocumentFragment();
    for (let at = from; at < to; at++) {
      if (this.drawn.has(at)) continue;
      const node = this.#line(this.lines[at]);
      node.style.transform = `translateY(${at * LINE_HEIGHT}px)`;
      this.drawn.set(at, node);
      fresh.append(node);
    }
    this.space.append(fresh);
    this.onScroll?.(this.visible());
  }

  // Response tokens in sight, the second bound excluded.
  visible() {
    const top = Math.floor(this.box.scrollTop / LINE_HEIGHT);
    const bottom = Math.min(this.lines.length - 1, Math.floor((this.box.scrollTop + this.box.clientHeight - 1) / LINE_HEIGHT));
    const at = (line, key) => Math.max(0, Math.min(this.track.length, this.lines[line][key] - this.track.prompt));
    return { from: at(top, "start"), to: at(bottom, "end") };
  }

  firstVisible() {
    return Math.min(this.visible().from, Math.max(0, this.track.length - 1));
  }

  #line(line) {
    if (line.kind === "label") return this.#label(line);
    if (line.kind === "exhausted") return this.#exhausted();
    if (line.kind === "end") return this.#end();
    const { track, data } = this;
    const prompt = line.kind === "prompt";
    const row = element("div", { class: `line ${line.kind}`, role: "presentation" });
    const gutter = element("span", { class: "gutter", "aria-hidden": "true" });
    if (!prompt && line.start < line.end) {
      const first = line.start - track.prompt;
      const end = line.end - 1 - track.prompt;
      const [above, below] = [first ? share(track.reliability[first - 1]) : 1, share(track.reliability[end])];
      const bar = element("i", { title: `reliability ${number(below, 3)}` });
      bar.style.clipPath = `polygon(0 0, ${100 * above}% 0, ${100 * below}% 100%, 0 100%)`;
      gutter.append(element("b", {}, String(first + 1)), element("u", {}, bar));
    }
    row.append(gutter);
    for (let i = line.start; i < line.end; i++) row.append(this.#token(i, prompt, data));
    return row;
  }

  #token(i, prompt, data) {
    const { track } = this;
    const token = track.tokens[i];
    const special = data.special.has(token) ? " special" : "";
    const node = element("span", {});
    node.textContent = shorten(data.tokens[token]);
    if (prompt) {
      node.className = `tok${special}`;
      return node;
    }
    const t = i - track.prompt;
    const level = this.tintOf(t);
    const heatClass = level === null ? "" : ` h${Math.round(heat(level) * HEAT_LEVELS)}`;
    const spent = track.reliability[t] === 0 && t > (this.summary.exhausted ?? Infinity) ? " spent" : "";
    const event = track.events[t] ? " event" : "";
    const found = this.touched.has(t) ? " found" : "";
    node.className = `tok${heatClass}${event}${spent}${special}${found}${t === this.focused ? " focused" : ""}`;
    node.id = `t${t}`;
    node.dataset.t = t;
    node.setAttribute("role", "option");
    node.setAttribute("aria-selected", String(t === this.focused));
    return node;
  }

  #label(line) {
    const prompt = line.of === "prompt";
    const count = prompt ? this.track.prompt : this.track.length;
    const hidden = prompt && !this.showPrompt ? ", hidden (p)" : "";
    const { taught_by: name, read } = this.summary;
    const by = prompt && name !== undefined ? ` · teacher ${name}` : "";
    const other = prompt && read !== undefined ? " · the teacher read another (hover)" : "";
    const title = prompt && read !== undefined ? read : "";
    return element("div", { class: "line label", role: "presentation", title }, `${line.of} · ${count} tokens${hidden}${by}${other}`);
  }

  #exhausted() {
    const { events, effective, length, exhausted } = this.summary;
    const rest = length - exhausted - 1;
    const drift = this.data.stops[this.summary.stop] === "drift";
    const at = exhausted + 1;
    const text = drift && !rest ? `stopped at token ${at}: reliability used up` : `reliability used up at token ${at}: ${rest} more tokens kept`;
    const count = this.track.events.subarray(0, at).reduce((sum, event) => sum + event, 0);
    return element("div", { class: "line exhausted", role: "presentation", title: `${events} events, effective length ${effective}` }, element("span", {}, `✂ ${text} (${count} events)`));
  }

  #end() {
    const stop = this.data.stops[this.summary.stop];
    const stopsHere = stop === "drift" && this.summary.exhausted === this.summary.length - 1;
    return element("div", { class: "line end", role: "presentation" }, stopsHere ? "" : `${SIGNS[stop]} ${STOP_PHRASES[stop]} after ${this.track.length} tokens`);
  }

  hover(t) {
    if (t === this.hovered) return;
    this.hovered = t;
    this.onLook(t ?? this.focused);
  }

  focus(t, place = "nearest") {
    if (!this.track || !this.track.length) return;
    const next = Math.max(0, Math.min(this.track.length - 1, t));
    this.#mark(this.focused, false);
    this.focused = next;
    this.hovered = null;
    this.#bringIntoSight(next, place);
    this.#mark(next, true);
    this.box.setAttribute("aria-activedescendant", `t${next}`);
    this.onLook(next);
  }

  #mark(t, on) {
    const node = document.getElementById(`t${t}`);
    node?.classList.toggle("focused", on);
    node?.setAttribute("aria-selected", String(on));
  }

  #bringIntoSight(t, place) {
    const top = lineOf(this.lines, this.track.prompt + t) * LINE_HEIGHT;
    const { scrollTop, clientHeight } = this.box;
    const inSight = top >= scrollTop + LINE_HEIGHT && top + 2 * LINE_HEIGHT <= scrollTop + clientHeight;
    if (inSight) return;
    if (place === "centre" || Math.abs(top - scrollTop) > 2 * clientHeight) this.box.scrollTop = top - clientHeight / 3;
    else if (top < scrollTop + LINE_HEIGHT) this.box.scrollTop = top - LINE_HEIGHT;
    else this.box.scrollTop = top + 2 * LINE_HEIGHT - clientHeight;
    this.draw();
  }

  // The token above or below the focused one: nearest by its middle.
  vertical(step) {
    if (!this.track.length) return;
    const here = lineOf(this.lines, this.track.prompt + this.focused);
    const middle = (line, t) => {
      let used = 0;
      for (let i = line.start; i < this.track.prompt + t; i++) used += this.ruler.width(this.track.tokens[i]);
      return used + this.ruler.width(this.track.tokens[this.track.prompt + t]) / 2;
    };
    const goal = middle(this.lines[here], this.focused);
    for (let at = here + step; at >= 0 && at < this.lines.length; at += step) {
      const line = this.lines[at];
      if (line.kind !== "response" || line.start === line.end) continue;
      let best = line.start;
      let used = 0;
      for (let i = line.start; i < line.end; i++) {
        if (used <= goal) best = i;
        used += this.ruler.width(this.track.tokens[i]);
      }
      return this.focus(best - this.track.prompt);
    }
  }

  page(step) {
    if (!this.track.length) return;
    const lines = Math.max(1, Math.floor(this.box.clientHeight / LINE_HEIGHT) - 2);
    const here = lineOf(this.lines, this.track.prompt + this.focused);
    const goal = this.lines[Math.max(0, Math.min(this.lines.length - 1, here + step * lines))];
    this.focus(goal.start - this.track.prompt);
  }
}
