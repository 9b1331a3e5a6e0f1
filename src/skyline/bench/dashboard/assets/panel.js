// A chart with its heading, legend and buttons. Pointer, touch and arrow keys reach the same points.

import { announce, h, replace } from "./dom.js";
import { savePng } from "./files.js";
import { hideTip, showTip } from "./tooltip.js";

const CONFIG = { displayModeBar: false, doubleClick: false };
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
    const png = h("button", { type: "button", class: "quiet png", onclick: () => this.savePng() }, "PNG");
    png.setAttribute("aria-label", `Download ${key} as PNG`);
    this.element = h(
      "article",
      { class: "panel card", "aria-labelledby": `${this.id}-title` },
      h("header", {}, h("div", {}, this.heading, this.subtitle), h("div", { class: "buttons" }, this.reset, png)),
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
        "the table below holds the same data.",
    );
    replace(
      this.legend,
      figure.legend.map((entry) => h("li", {}, entry.glyph, h("span", {}, entry.name))),
    );
    replace(this.strip, figure.strip ?? []);
    this.strip.hidden = !figure.strip?.length;
    this.reset.hidden = !zoom;
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
    });
  }

  listen() {
    this.plot.on("plotly_hover", (event) => {
      const point = event.points.find((hit) => hit.customdata !== undefined);
      if (point) this.show(point.customdata, this.place(point));
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
    const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
    const step = steps[event.key];
    if (!step || targets.length === 0) return undefined;
    event.preventDefault();
    if (this.cursor === null) this.cursor = [0, 0];
    else this.cursor = [this.cursor[0] + step[0], this.cursor[1] + step[1]];
    const { title, lines } = this.point();
    announce([title, ...lines].join(", "));
    return undefined;
  }

  // Shows the point under the keyboard's cursor; returns what is told of it.
  point() {
    const { curve, index, id } = this.target();
    const { xaxis, yaxis } = this.plot._fullLayout;
    const trace = this.figure.traces[curve];
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
