// One ladder against another: how much more throughput at the same interactivity.

import { h } from "./dom.js";
import { day, interval, number, relative } from "./format.js";
import { axisTitle, frame } from "./frame.js";
import { ladders, measure, offReason, seriesName } from "./model.js";
import { fade } from "./palette.js";
import { ladderRatio, quotient } from "./statistics.js";

const X = "interactivity";
const Y = "output_per_device";

// Ladders that can be compared: at least two points that count. A key names a series, with its run where several are
// shown.
export function comparable(data, state, points) {
  return ladders(
    state,
    points.filter((point) => !offReason(point, Y) && measure(data, state, point, X) && measure(data, state, point, Y)),
  )
    .filter((ladder) => ladder.points.length > 1)
    .map((ladder) => ({
      ...ladder,
      group: `${ladder.series.model} · ${ladder.series.workload}`,
      name: seriesName(data, ladder.series) + (state.run === "all" ? ` · ${day(ladder.run.started)}` : ""),
    }));
}

// The chosen two, or the first and the next of another engine with the same model and workload.
export function pair(state, offered) {
  const a = offered.find(({ key }) => key === state.a) ?? offered[0] ?? null;
  const others = offered.filter((ladder) => a && ladder.group === a.group && ladder.key !== a.key);
  const b =
    others.find(({ key }) => key === state.b) ??
    others.find(({ series }) => series.engine !== a.series.engine) ??
    others[0] ??
    null;
  return { a, b, others };
}

const coordinates = (data, state, ladder) =>
  ladder.points.map((point) => ({ x: measure(data, state, point, X), y: measure(data, state, point, Y) }));

export function compareFigure({ data, state, a, b, colours, compact }) {
  const found = ladderRatio(coordinates(data, state, a), coordinates(data, state, b));
  const title = `${a.name} against ${b.name}`;
  const subtitle = `${a.group} · output throughput per device at equal interactivity`;
  const base = {
    title,
    subtitle,
    name: `compare ${a.series.engine} ${b.series.engine} ${a.group}`,
    legend: [],
    targets: [],
  };
  if (!found) {
    const summary = "The two ladders have no interactivity in common, so they cannot be compared there.";
    return { ...base, summary, traces: [], layout: frame(colours), describe: () => null, ratio: null };
  }
  const rows = found.grid.map((x, index) => [x, found.ratios[index]]).filter(([, ratio]) => ratio !== null);
  const sure = rows.filter(([, ratio]) => ratio[1] !== null);
  const back = sure.toReversed();
  const traces = [
    {
      type: "scatter",
      mode: "lines",
      hoverinfo: "skip",
      showlegend: true,
      name: "95 % interval",
      x: [...sure, ...back].map(([x]) => x),
      y: [...sure.map(([, ratio]) => ratio[2]), ...back.map(([, ratio]) => ratio[1])],
      fill: "toself",
      fillcolor: fade(colours.accent, 0.25),
      line: { width: 0 },
    },
    {
      type: "scatter",
      mode: "lines",
      name: "Ratio of throughput",
      x: rows.map(([x]) => x),
      y: rows.map(([, ratio]) => ratio[0]),
      customdata: rows.map((_, index) => index),
      hoverinfo: "none",
      line: { color: colours.ink, width: 2.2 },
    },
  ];
  const [value, low, high] = found.mean;
  return {
    ...base,
    ratio: { value, low, high },
    summary: verdict(a, b, found),
    traces,
    layout: {
      ...frame(colours),
      xaxis: {
        gridcolor: colours.grid,
        tickfont: { size: 12, color: colours.muted },
        autorange: true,
        title: axisTitle({ data, colours, compact }, X, "→"),
      },
      yaxis: {
        gridcolor: colours.grid,
        tickfont: { size: 12, color: colours.muted },
        ticksuffix: "×",
        autorange: true,
        automargin: true,
        zeroline: false,
        title: {
          text: "Ratio of throughput  <i>above 1: the first is ahead</i>",
          font: { size: 12.5, color: colours.muted },
          standoff: 12,
        },
      },
      shapes: [
        {
          type: "line",
          xref: "paper",
          x0: 0,
          x1: 1,
          y0: 1,
          y1: 1,
          line: { color: colours.muted, width: 1.5, dash: "dash" },
        },
      ],
    },
    targets: [rows.map((_, index) => ({ curve: 1, index, id: index }))],
    describe: (index) => {
      const [x, [ratio, from, to]] = rows[index];
      return {
        title: `${number(ratio)}×${interval({ low: from, high: to })}`,
        lines: [`at ${number(x)} ${data.metrics[X].unit}`, `${a.name} by ${b.name}`],
      };
    },
  };
}

function verdict(a, b, { grid, mean: [value, low, high] }) {
  const range = `from ${number(grid[0])} to ${number(grid.at(-1))} tok/s for each user`;
  const start = `At equal interactivity, ${range}, ${a.name} has ${number(value)} times the throughput of ${b.name}`;
  if (low === null) return `${start} (geometric mean). Nothing is known of its uncertainty.`;
  const sure = low > 1 || high < 1;
  const end = sure ? "." : ": no difference can be told.";
  return `${start} (geometric mean; 95 % interval ${number(low)} to ${number(high)})${end}`;
}

// The one number to remember.
export function ratioCard(ratio, { a, b }) {
  if (!ratio) return [];
  return h(
    "div",
    { class: "stat card" },
    h("span", { class: "stat-name" }, "Throughput at equal interactivity"),
    h("span", { class: "stat-value" }, `${number(ratio.value)}×`, h("small", {}, interval(ratio))),
    h("span", { class: "stat-who" }, `${a.name} by ${b.name}`),
  );
}

// Level by level, for ladders of the same loads.
export function compareTable(data, state, a, b) {
  const other = new Map(b.points.map((point) => [point.level.label, point]));
  const both = a.points.filter((point) => other.has(point.level.label));
  if (both.length === 0) return h("p", { class: "empty-note" }, "The two ladders have no level in common.");
  const keys = [Y, X, "ttft_p50", "e2e_p50"].filter((key) => both.every((point) => measure(data, state, point, key)));
  const cells = (point, key) => {
    const [first, second] = [point, other.get(point.level.label)].map((one) => measure(data, state, one, key));
    if (!first || !second) return [h("td", { class: "number", colspan: 3 }, "–")];
    const ratio = quotient(first, second);
    const ahead = ratio.value > 1 === (data.metrics[key].better === "higher");
    const sure = ratio.low !== null && (ratio.low > 1 || ratio.high < 1);
    return [
      h("td", { class: "number" }, number(first.value)),
      h("td", { class: "number" }, number(second.value)),
      h(
        "td",
        {
          class: `number ${sure ? (ahead ? "good" : "bad") : ""}`,
          title: `ratio ${number(ratio.value)}${interval(ratio)}`,
        },
        `${sure ? (ahead ? "▲ " : "▼ ") : ""}${relative(ratio.value - 1)}`,
      ),
    ];
  };
  return [
    h(
      "p",
      { class: "note" },
      `A is ${a.name}, B is ${b.name}. ▲ A is better, ▼ worse, where the 95 % interval of the ratio leaves out 1. `,
      "A verdict over the whole ladder, with its error rate kept: ",
      h("code", {}, "skyline bench compare"),
      ".",
    ),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Comparison level by level" },
      h(
        "table",
        {},
        h("caption", { class: "sr-only" }, "Comparison level by level"),
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            h("th", { scope: "col", rowspan: 2 }, "Level"),
            keys.map((key) =>
              h("th", { scope: "colgroup", colspan: 3 }, `${data.metrics[key].title}, ${data.metrics[key].unit}`),
            ),
          ),
          h(
            "tr",
            {},
            keys.map(() => ["A", "B", "A by B"].map((name) => h("th", { scope: "col", class: "number" }, name))),
          ),
        ),
        h(
          "tbody",
          {},
          both.map((point) =>
            h(
              "tr",
              {},
              h("th", { scope: "row" }, point.level.label),
              keys.map((key) => cells(point, key)),
            ),
          ),
        ),
      ),
    ),
  ];
}
