// A chart with its heading, legend and buttons. Pointer, touch and arrow keys reach the same points, and zoom.

import { announce, h, replace } from "./dom.js";
import { savePng } from "./files.js";
import { hideTip, showTip } from "./tooltip.js";

const CONFIG = { displayModeBar: false, doubleClick: false };
// What is left of an axis by one step.
const ZOOM_IN = 0.6;
const coarse = matchMedia("(pointer: coarse)");

// Plotly gives the edges of a date axis as text without a zone, meaning UTC.
const edgeOf = (edge) => (typeof edge === "string" ? Date.parse(`${edge.replace(" ", "T")}Z`) : edge);

let made = 0;

export class Panel {
  // `onZoom(key, range or null)` and `onPick(id)` tell what the viewer did.
  constructor(key, { onZoom, onPick }) {
    this.key = key;
    this.id = `panel-${made++}`;
    this.onZoom = onZoom;
    this.onPick = onPick;
    this.cursor = null;
    this.told = null;
    this.whole = null;
    this.drawn = Promise.resolve();
    this.plot = h("div", { class: "plot" });
    // The column grows and shrinks without the window.
    this.observer = new ResizeObserver(
      () => this.plot.classList.contains("js-plotly-plot") && Plotly.Plots.resize(this.plot),
    );
    this.observer.observe(this.plot);
    this.stage = h(
      "div",
      {
        class: "stage",
        id: `${this.id}-stage`,
        tabindex: "0",
        role: "application",
        "aria-roledescription": "interactive chart",
        "aria-describedby": `${this.id}-summary`,
        onkeydown: (event) => this.onKey(event),
        onblur: () => hideTip(),
      },
      this.plot,
    );
    this.heading = h("h2", { id: `${this.id}-title` });
    this.subtitle = h("p", { class: "subtitle" });
    this.summary = h("p", { class: "summary", id: `${this.id}-summary` });
    this.legend = h("ul", { class: "legend", "aria-label": "Legend" });
    this.strip = h("div", { class: "strip" });
    this.reset = h("button", { type: "button", class: "quiet", onclick: () => this.onZoom(key, null) }, "Reset zoom");
    this.closer = h(
      "div",
      { class: "zooms", role: "group", "aria-label": "Zoom" },
      [
        ["+", "Zoom in", ZOOM_IN],
        ["−", "Zoom out", 1 / ZOOM_IN],
      ].map(([sign, name, factor]) =>
        h(
          "button",
          { type: "button", class: "quiet", "aria-label": name, title: name, onclick: () => this.scale(factor) },
          sign,
        ),
      ),
    );
    const png = h("button", { type: "button", class: "quiet png", onclick: () => this.savePng() }, "PNG");
    png.setAttribute("aria-label", `Download ${key} as PNG`);
    this.element = h(
      "article",
      { class: "panel card", "aria-labelledby": `${this.id}-title` },
      h("header", {}, h("div", {}, this.heading, this.subtitle), h("div", { class: "buttons" }, this.reset, this.closer, png)),
      this.legend,
      this.stage,
      this.strip,
      this.summary,
    );
  }

  // `figure`: {title, subtitle, summary, traces, layout, targets, describe, legend, strip, name}. `targets` are the
  // ladders that arrow keys walk: lists of {curve, index, id}. `describe(id)` says what a tooltip shows.
  update(figure, zoom) {
    this.figure = figure;
    this.heading.textContent = figure.title;
    this.subtitle.textContent = figure.subtitle;
    this.summary.textContent = figure.summary;
    this.stage.setAttribute(
      "aria-label",
      `${figure.title}. ${figure.subtitle}. Arrow keys move through the points, Enter shows details; ` +
        "plus and minus zoom around the point, 0 shows all again; the table below holds the same data.",
    );
    replace(
      this.legend,
      figure.legend.map((entry) => h("li", {}, entry.glyph, h("span", {}, entry.name))),
    );
    replace(this.strip, figure.strip ?? []);
    this.strip.hidden = !figure.strip?.length;
    this.reset.hidden = !zoom;
    this.zoomed = Boolean(zoom);
    const layout = { ...figure.layout, dragmode: coarse.matches ? false : "zoom" };
    if (zoom) {
      layout.xaxis = { ...layout.xaxis, range: zoom.slice(0, 2), autorange: false };
      layout.yaxis = { ...layout.yaxis, range: zoom.slice(2), autorange: false };
    }
    this.drawn = this.drawn.then(async () => {
      if (!this.plot.isConnected) return;
      const first = !this.plot.classList.contains("js-plotly-plot");
      await Plotly.react(this.plot, figure.traces, layout, CONFIG);
      if (first) this.listen();
      if (!zoom) this.whole = this.ranges();
    });
  }

  listen() {
    this.plot.on("plotly_hover", (event) => {
      const point = event.points.find((hit) => hit.customdata !== undefined);
      if (!point) return;
      this.told = { x: point.x, y: point.y };
      this.show(point.customdata, this.place(point));
    });
    this.plot.on("plotly_unhover", () => hideTip());
    this.plot.on("plotly_click", (event) => {
      const point = event.points.find((hit) => hit.customdata !== undefined);
      if (point) this.onPick(point.customdata);
    });
    this.plot.on("plotly_doubleclick", () => this.onZoom(this.key, null));
    this.plot.on("plotly_relayout", (change) => {
      const edges = ["xaxis.range[0]", "xaxis.range[1]", "yaxis.range[0]", "yaxis.range[1]"];
      if (!edges.some((name) => name in change)) return;
      const { xaxis, yaxis } = this.plot.layout;
      this.onZoom(this.key, [...xaxis.range, ...yaxis.range].map(edgeOf));
    });
  }

  // Where a point is drawn, in the window's coordinates.
  place({ xaxis, yaxis, x, y }) {
    const box = this.plot.getBoundingClientRect();
    return { left: box.left + xaxis._offset + xaxis.d2p(x), top: box.top + yaxis._offset + yaxis.d2p(y) };
  }

  show(id, place) {
    const told = this.figure.describe(id);
    if (told) showTip(told, place);
  }

  onKey(event) {
    if (event.target !== this.stage) return;
    const { targets } = this.figure;
    if (event.key === "Escape") return hideTip();
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (this.cursor) this.onPick(this.target().id);
      return undefined;
    }
    const zooms = { "+": ZOOM_IN, "=": ZOOM_IN, "-": 1 / ZOOM_IN };
    if (event.key === "0") {
      event.preventDefault();
      return this.onZoom(this.key, null);
    }
    if (zooms[event.key] && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      return this.scale(zooms[event.key]);
    }
    const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
    const step = steps[event.key];
    if (!step || targets.length === 0) return undefined;
    event.preventDefault();
    if (this.cursor === null) this.cursor = [0, 0];
    else this.cursor = [this.cursor[0] + step[0], this.cursor[1] + step[1]];
    const { title, lines } = this.point();
    announce([title, ...lines].join(", "));
    this.follow();
    return undefined;
  }

  // The edges of both axes, [x0, x1, y0, y1], as numbers: of a logarithmic axis the exponents, of dates milliseconds.
  ranges() {
    const { xaxis, yaxis } = this.plot._fullLayout;
    return [...xaxis.range, ...yaxis.range].map(edgeOf);
  }

  // The point that was last pointed at, on the same scale.
  focus() {
    const { xaxis, yaxis } = this.plot._fullLayout;
    return [xaxis.d2l(this.told.x), yaxis.d2l(this.told.y)];
  }

  // A smaller or larger part of both axes, around the point that was last pointed at if it is in sight. What would show
  // more than everything shows everything.
  async scale(factor) {
    await this.drawn;
    const range = this.ranges();
    const inside = this.told && this.holds(range);
    const middle = inside ? this.focus() : [(range[0] + range[1]) / 2, (range[2] + range[3]) / 2];
    const next = range.map((edge, index) => middle[index >> 1] + (edge - middle[index >> 1]) * factor);
    const { whole } = this;
    const all = whole && [0, 2].every((low) => next[low] <= whole[low] && next[low + 1] >= whole[low + 1]);
    if (factor < 1 || (this.zoomed && !all)) this.onZoom(this.key, next);
    else this.onZoom(this.key, null);
  }

  holds([left, right, bottom, top]) {
    const [x, y] = this.focus();
    return left <= x && x <= right && bottom <= y && y <= top;
  }

  // Brings the point under the keyboard's cursor into what a zoom shows.
  follow() {
    const range = this.ranges();
    if (!this.zoomed || this.holds(range)) return;
    const [x, y] = this.focus();
    const [width, height] = [(range[1] - range[0]) / 2, (range[3] - range[2]) / 2];
    this.onZoom(this.key, [x - width, x + width, y - height, y + height]);
  }

  // Shows the point under the keyboard's cursor; returns what is told of it.
  point() {
    const { curve, index, id } = this.target();
    const { xaxis, yaxis } = this.plot._fullLayout;
    const trace = this.figure.traces[curve];
    this.told = { x: trace.x[index], y: trace.y[index] };
    this.show(id, this.place({ xaxis, yaxis, x: trace.x[index], y: trace.y[index] }));
    return this.figure.describe(id);
  }

  // The page has moved under the tooltip.
  moved() {
    if (this.cursor && document.activeElement === this.stage) this.point();
    else hideTip();
  }

  // The point under the keyboard's cursor, which stays inside whatever the figure now holds.
  target() {
    const { targets } = this.figure;
    const ladder = ((this.cursor[0] % targets.length) + targets.length) % targets.length;
    const step = Math.max(0, Math.min(this.cursor[1], targets[ladder].length - 1));
    this.cursor = [ladder, step];
    return targets[ladder][step];
  }

  savePng() {
    return savePng(this.figure);
  }

  remove() {
    this.observer.disconnect();
    this.element.remove();
    this.drawn = this.drawn.then(() => Plotly.purge(this.plot));
  }
}
