// The rollout at a glance: agreement as a heat strip and a line, reliability as a bold line, events as a rug. A click jumps.

const MARGIN = { left: 34, right: 12, top: 10, bottom: 29 };
const HEAT_LEVELS = 10;

function palette() {
  const style = getComputedStyle(document.documentElement);
  return new Proxy({}, { get: (_, name) => style.getPropertyValue(`--${name}`).trim() });
}

// A canvas as large as its box in device pixels, cleared.
function fitCanvas(canvas) {
  const ratio = devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

// Agreement in [0, 1] as the opacity of the drift colour: the same for text, strips and chart.
const heat = (agreement) => (agreement === null ? 0 : (1 - agreement) ** 1.3);

class Chart {
  constructor(canvas, onJump) {
    this.canvas = canvas;
    this.background = document.createElement("canvas"); // the curves, drawn once a rollout; the cursor goes on top
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      onJump(this.positionAt(event.offsetX));
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons & 1) onJump(this.positionAt(event.offsetX));
    });
  }

  positionAt(x) {
    const inner = this.canvas.clientWidth - MARGIN.left - MARGIN.right;
    const t = Math.floor(((x - MARGIN.left) / inner) * this.length);
    return Math.max(0, Math.min(this.length - 1, t));
  }

  // values: agreement of each token in [0, 1] or null; threshold: of the events, or null where it is on another scale.
  show(track, values, threshold, exhausted) {
    this.length = track.length;
    this.curves = { track, values, threshold, exhausted };
    this.stale = true;
  }

  draw(cursor, visible) {
    if (!this.length) return void fitCanvas(this.canvas);
    const { context, width, height } = fitCanvas(this.canvas);
    const ratio = devicePixelRatio || 1;
    const size = `${width}x${height}x${ratio}`;
    if (this.stale || this.size !== size) {
      this.background.width = this.canvas.width;
      this.background.height = this.canvas.height;
      const layer = this.background.getContext("2d");
      layer.setTransform(ratio, 0, 0, ratio, 0, 0);
      this.#curves(layer, width, height);
      this.stale = false;
      this.size = size;
    }
    context.drawImage(this.background, 0, 0, width, height);
    const colours = palette();
    const inner = width - MARGIN.left - MARGIN.right;
    const x = (t) => MARGIN.left + (t / this.length) * inner;
    const floor = height - MARGIN.bottom;
    if (visible && visible.to - visible.from < this.length) {
      context.fillStyle = colours.window;
      context.fillRect(x(visible.from), MARGIN.top, x(visible.to) - x(visible.from), floor - MARGIN.top);
      context.strokeStyle = colours.muted;
      context.lineWidth = 1;
      context.strokeRect(x(visible.from) + 0.5, MARGIN.top + 0.5, x(visible.to) - x(visible.from) - 1, floor - MARGIN.top - 1);
    }
    if (cursor !== null) {
      context.fillStyle = colours.focus;
      const wide = Math.max(2, inner / this.length);
      context.globalAlpha = wide > 4 ? 0.3 : 1;
      context.fillRect(x(cursor), MARGIN.top, wide, floor - MARGIN.top);
      context.globalAlpha = 1;
      context.beginPath();
      context.moveTo(x(cursor) + wide / 2 - 5, MARGIN.top - 8);
      context.lineTo(x(cursor) + wide / 2 + 5, MARGIN.top - 8);
      context.lineTo(x(cursor) + wide / 2, MARGIN.top);
      context.fill();
    }
  }

  #curves(context, width, height) {
    const { track, values, threshold, exhausted } = this.curves;
    const colours = palette();
    const inner = width - MARGIN.left - MARGIN.right;
    const floor = height - MARGIN.bottom;
    const x = (t) => MARGIN.left + (t / this.length) * inner;
    const y = (value) => floor - value * (floor - MARGIN.top);
    context.clearRect(0, 0, width, height);
    context.fillStyle = colours.paper;
    context.fillRect(MARGIN.left, MARGIN.top, inner, floor - MARGIN.top);

    const columns = Math.min(this.length, Math.round(inner));
    const means = [];
    for (let column = 0; column < columns; column++) {
      const from = Math.floor((column * this.length) / columns);
      const to = Math.max(from + 1, Math.floor(((column + 1) * this.length) / columns));
      let sum = 0;
      let seen = 0;
      for (let t = from; t < to; t++) if (values[t] !== null) (sum += values[t]), seen++;
      const mean = seen ? sum / seen : null;
      means.push({ from, to, mean });
      context.globalAlpha = (heat(mean) * parseFloat(colours["heat-most"])) / 100;
      context.fillStyle = colours.drift;
      const left = Math.round(x(from)); // whole pixels, else seams show between columns
      context.fillRect(left, MARGIN.top, Math.round(x(to)) - left, floor - MARGIN.top);
    }
    context.globalAlpha = 1;

    context.font = `11px ${colours.sans}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    context.lineWidth = 1;
    for (const value of [0, 0.5, 1]) {
      context.strokeStyle = colours.rule;
      this.#path(context, [[MARGIN.left, Math.round(y(value)) + 0.5], [width - MARGIN.right, Math.round(y(value)) + 0.5]]);
      context.fillStyle = colours.muted;
      context.fillText(value.toString(), MARGIN.left - 6, y(value));
    }
    if (threshold !== null) {
      context.setLineDash([4, 4]);
      context.strokeStyle = colours.ink;
      this.#path(context, [[MARGIN.left, y(threshold)], [width - MARGIN.right, y(threshold)]]);
      context.setLineDash([]);
    }
    this.#ticks(context, colours, x, floor, width);

    context.strokeStyle = colours.agreement;
    context.lineWidth = columns < 300 ? 1.6 : 1;
    this.#path(context, means.filter((m) => m.mean !== null).flatMap((m) => [[x(m.from), y(m.mean)], [x(m.to), y(m.mean)]]));

    const steps = [[x(0), y(1)]];
    let last = 1;
    for (let t = 0; t < this.length; t++) {
      const now = share(track.reliability[t]) ?? last;
      if (now !== last || t === this.length - 1) steps.push([x(t), y(last)], [x(t), y(now)]);
      last = now;
    }
    steps.push([x(this.length), y(last)]);
    context.lineWidth = 5;
    context.strokeStyle = colours.paper; // a light edge, so that the line stands out from the heat
    this.#path(context, steps);
    context.lineWidth = 2.5;
    context.strokeStyle = colours.reliability;
    this.#path(context, steps);

    context.fillStyle = colours.event;
    for (let t = 0; t < this.length; t++) if (track.events[t]) context.fillRect(x(t), floor + 3, Math.max(1.2, Math.min(x(1) - x(0) - 2, 8)), 7);
    if (exhausted !== null) {
      context.strokeStyle = colours.event;
      context.lineWidth = 2;
      context.setLineDash([2, 2]);
      this.#path(context, [[x(exhausted + 1) - 1, MARGIN.top], [x(exhausted + 1) - 1, floor]]);
      context.setLineDash([]);
    }
  }

  #ticks(context, colours, x, floor, width) {
    const raw = this.length / 8;
    const unit = 10 ** Math.floor(Math.log10(Math.max(1, raw)));
    const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= raw) ?? unit * 10;
    context.textAlign = "center";
    context.fillStyle = colours.muted;
    for (let t = step; t <= this.length; t += step) {
      if (x(t) < width - MARGIN.right - 8) context.fillText(t.toString(), (x(t - 1) + x(t)) / 2, floor + 20);
    }
  }

  #path(context, points) {
    context.beginPath();
    for (const [x, y] of points) context.lineTo(x, y);
    context.stroke();
  }
}
