// Colours, marker shapes and dashes: a series is never told by its colour alone.

import { svg } from "./dom.js";
import { seriesName } from "./model.js";

const COLOURS = 8;
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const DASH_ARRAYS = ["", "5 3", "2 3", "6 3 2 3", "9 4", "9 3 2 3"];

// Plotly's names, and the same shapes in a square of 14 around 0 for legends.
const SHAPES = [
  ["circle", "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z"],
  ["square", "M-4.5-4.5h9v9h-9z"],
  ["diamond", "M0-6L6 0L0 6L-6 0z"],
  ["triangle-up", "M0-6L5.6 4.2H-5.6z"],
  ["triangle-down", "M0 6L5.6-4.2H-5.6z"],
  ["star", "M0-6.4L1.6-2.1L6.1-2L2.5.8L3.8 5.2L0 2.6L-3.8 5.2L-2.5.8L-6.1-2L-1.6-2.1z"],
  ["hexagon", "M-5.2-3L0-6L5.2-3V3L0 6L-5.2 3z"],
  ["cross", "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z"],
  ["pentagon", "M0-6L5.7-1.9L3.5 4.9H-3.5L-5.7-1.9z"],
  ["x", "M0-2.6L2.6-5.2L5.2-2.6L2.6 0L5.2 2.6L2.6 5.2L0 2.6L-2.6 5.2L-5.2 2.6L-2.6 0L-5.2-2.6L-2.6-5.2z"],
];

// The page's colours as they are now, light or dark: what a probe element computes for each.
export function theme() {
  const probe = document.createElement("span");
  document.body.append(probe);
  const colour = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const names = ["ink", "muted", "grid", "card", "accent", "window", "tower", "frontier", "good", "bad"];
  const found = {
    ...Object.fromEntries(names.map((name) => [name, colour(name)])),
    series: Array.from({ length: COLOURS }, (_, index) => colour(`series-${index}`)),
    font: getComputedStyle(document.body).fontFamily,
  };
  probe.remove();
  return found;
}

// Every configuration's look. Colours follow `by`; configurations of one colour differ in shape and dash. What comes
// later never changes the look of what is there.
export function looks(data, by) {
  const colours = new Map();
  const found = new Map();
  for (const series of data.series) {
    if (found.has(series.config)) continue;
    const name = by === "series" ? seriesName(data, series, false) : series[by];
    if (!colours.has(name)) colours.set(name, { index: colours.size, members: new Map() });
    const { index, members } = colours.get(name);
    // One model or workload after another is the same thing to look at.
    const parts = ["engine", "hardware", "precision", "parallelism", "speculation"];
    const variant = JSON.stringify(parts.map((part) => series[part]));
    if (!members.has(variant)) members.set(variant, members.size);
    found.set(series.config, { colour: index % COLOURS, variant: members.get(variant), identity: variant });
  }
  const identities = [...new Set([...found.values()].map((look) => look.identity))];
  for (const look of found.values()) {
    look.shape = identities.indexOf(look.identity) % SHAPES.length;
    look.symbol = SHAPES[look.shape][0];
    look.dash = DASHES[look.variant % DASHES.length];
  }
  return found;
}

// Line and marker as a small picture for legends and tables.
export function glyph(look) {
  const dashes = DASH_ARRAYS[look.variant % DASH_ARRAYS.length];
  return svg(
    "svg",
    { class: `glyph series-${look.colour}`, viewBox: "-14 -8 28 16", width: 28, height: 16, "aria-hidden": "true" },
    svg("path", { d: "M-14 0H14", class: "line", "stroke-dasharray": dashes || null }),
    svg("path", { d: SHAPES[look.shape][1], class: "mark" }),
  );
}

// The mark of a point that counts for nothing; with a dot, of one whose interval is not known.
export function hollow(dot = false) {
  return svg(
    "svg",
    { class: "glyph hollow", viewBox: "-8 -8 16 16", width: 16, height: 16, "aria-hidden": "true" },
    svg("path", { d: SHAPES[0][1] }),
    dot ? svg("circle", { r: 1.6, class: "dot" }) : null,
  );
}

// The same colour, see-through; colours come as "rgb(r, g, b)".
export const fade = (colour, opacity) => colour.replace("rgb(", "rgba(").replace(")", `, ${opacity})`);
