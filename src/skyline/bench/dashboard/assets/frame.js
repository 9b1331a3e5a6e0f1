// What all charts share: axes, grid, titles, error bars.

import { number } from "./format.js";

// What a view puts on its axes.
export function axes(state) {
  if (state.view === "cost") return { x: "interactivity", y: "cost_per_mtok" };
  if (state.view === "power") return { x: "interactivity", y: "tokens_per_mw" };
  return { x: state.x, y: state.y };
}

export const title = (data, key) => data.metrics[key].title;

// 1, 2 and 5 of every power of ten, named in full: Plotly would write a mere 2 and 5.
const LOG_TICKS = Array.from({ length: 18 }, (_, power) => [1, 2, 5].map((digit) => digit * 10 ** (power - 6))).flat();
const tickName = (value) =>
  value < 1 ? String(Number(value.toPrecision(1))) : number(value).replace(/\.0+(?= |$)/, "");

export function layout({ data, state, colours, compact }, { x, y }) {
  const axis = (key, log) => ({
    type: log ? "log" : "linear",
    ...(log ? { tickmode: "array", tickvals: LOG_TICKS, ticktext: LOG_TICKS.map(tickName) } : { rangemode: "tozero" }),
    autorange: true,
    gridcolor: colours.grid,
    zeroline: false,
    linecolor: colours.grid,
    tickfont: { size: 12, color: colours.muted },
    separatethousands: true,
    automargin: true,
  });
  return {
    ...frame(colours),
    xaxis: { ...axis(x, state.logx), title: axisTitle({ data, colours, compact }, x, "→") },
    yaxis: { ...axis(y, state.logy), title: axisTitle({ data, colours, compact }, y, "↑") },
  };
}

// What all charts share.
export function frame(colours) {
  return {
    autosize: true,
    showlegend: false,
    hovermode: "closest",
    hoverdistance: 24,
    font: { family: colours.font, color: colours.ink },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 60, r: 20, t: 14, b: 52 },
  };
}

// A small chart (`compact`) has its heading for the name.
export function axisTitle({ data, colours, compact }, key, arrow) {
  const { title: name, unit, better } = data.metrics[key];
  const direction = better === "higher" ? `${arrow} better` : `${arrow === "→" ? "←" : "↓"} better`;
  const text = compact ? unit : unit === "1" ? name : `${name}, ${unit}`;
  return { text: `${text}  <i>${direction}</i>`, font: { size: 12.5, color: colours.muted }, standoff: 12 };
}

// Whiskers of estimates {value, low, high}; none where nothing is known of the spread.
export function errorBars(found, color) {
  return {
    type: "data",
    symmetric: false,
    array: found.map(({ value, high }) => (high === null ? 0 : high - value)),
    arrayminus: found.map(({ value, low }) => (low === null ? 0 : value - low)),
    color,
    thickness: 1.2,
    width: 0,
  };
}
