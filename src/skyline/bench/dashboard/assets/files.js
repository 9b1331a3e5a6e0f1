// Downloads: a chart as a picture to post, the shown points as a table.

import { save, saveText } from "./dom.js";
import { escaped } from "./format.js";
import { measure, offReason, refusal } from "./model.js";
import { theme } from "./palette.js";

const SIZE = { width: 1200, height: 675 };

// The card that people post: title, legend, the measured day and the towers, in the theme that is on.
export async function savePng(figure) {
  const colours = theme();
  const layout = {
    ...figure.layout,
    ...SIZE,
    autosize: false,
    paper_bgcolor: colours.card,
    plot_bgcolor: colours.card,
    margin: { l: 84, r: 40, t: 158, b: 96 },
    showlegend: true,
    legend: { orientation: "h", x: 0, y: 1.03, yanchor: "bottom", font: { size: 14, color: colours.ink } },
    title: {
      text: `<b>${escaped(figure.title)}</b>`,
      subtitle: { text: escaped(figure.subtitle), font: { size: 16, color: colours.muted } },
      font: { size: 26, color: colours.ink },
      x: 0.035,
      y: 0.94,
      xanchor: "left",
    },
    annotations: [
      ...(figure.layout.annotations ?? []),
      {
        text: "Measured with <b>skyline bench</b> · 95 % intervals",
        x: 1,
        y: -0.155,
        ...corner("right", colours.muted),
      },
    ],
    shapes: [...(figure.layout.shapes ?? []), ...towers(colours)],
  };
  const traces = figure.traces.map((trace) => ({ ...trace, name: trace.name ?? "" }));
  const url = await Plotly.toImage({ data: traces, layout }, { format: "png", ...SIZE, scale: 2 });
  save(`${fileName(figure.name)}.png`, url);
}

function corner(side, colour) {
  return {
    xref: "paper",
    yref: "paper",
    xanchor: side,
    yanchor: "top",
    showarrow: false,
    font: { size: 14, color: colour },
  };
}

// Skyline's mark, towers that descend like a frontier with a light at each corner, in the upper right of the picture.
function towers(colours) {
  const paper = { xref: "paper", yref: "paper", line: { width: 0 } };
  return [0.15, 0.11, 0.07, 0.035].flatMap((height, index) => {
    const [left, right] = [0.93 + index * 0.0175, 0.944 + index * 0.0175];
    const top = 1.18 + height;
    return [
      { ...paper, type: "rect", x0: left, x1: right, y0: 1.18, y1: top, fillcolor: colours.tower },
      {
        ...paper,
        type: "circle",
        x0: right - 0.004,
        x1: right + 0.004,
        y0: top - 0.0106,
        y1: top + 0.0106,
        fillcolor: colours.window,
      },
    ];
  });
}

const fileName = (text) =>
  text
    .toLowerCase()
    .replace(/[^a-z0-9]+/g, "-")
    .replace(/^-|-$/g, "");

const COLUMNS = [
  ["id", (point) => point.id],
  ["run", (point) => point.run.id],
  ["run_label", (point) => point.run.label ?? ""],
  ["date", (point) => point.finished],
  ["hardware", (point) => point.series.hardware],
  ["engine", (point) => point.series.engine],
  ["engine_version", (point) => point.series.engine_version],
  ["model", (point) => point.series.model],
  ["precision", (point) => point.series.precision],
  ["parallelism", (point) => point.series.parallelism],
  ["devices", (point) => point.series.devices],
  ["speculation", (point) => point.series.speculation],
  ["workload", (point) => point.series.workload],
  ["level", (point) => point.level.label],
  ["replicates", (point) => point.replicates],
  ["status", (point) => point.status],
  ["accuracy", (point) => point.accuracy.verdict],
  ["off_frontier", (point) => offReason(point, "output_per_device") ?? ""],
];

// All metrics of the points, full precision, one row each; an interval's ends are NAME_low and NAME_high. NAME_refused
// says why these are empty, and the value if it is too, where there was something to measure and too little of it.
function csv(data, state, points) {
  const keys = Object.keys(data.metrics).filter((key) =>
    points.some((point) => measure(data, state, point, key) || refusal(data, state, point, key)),
  );
  const columns = (key) => [key, `${key}_low`, `${key}_high`, `${key}_refused`];
  const header = [...COLUMNS.map(([name]) => name), ...keys.flatMap(columns)];
  const rows = points.map((point) => [
    ...COLUMNS.map(([, read]) => read(point)),
    ...keys.flatMap((key) => {
      const found = measure(data, state, point, key);
      const why = refusal(data, state, point, key);
      return [found?.value ?? "", found?.low ?? "", found?.high ?? "", why ?? ""];
    }),
  ]);
  return [header, ...rows].map((row) => `${row.map(cell).join(",")}\r\n`).join("");
}

// RFC 4180. A text that a spreadsheet would run as a formula gets an apostrophe in front.
function cell(value) {
  if (typeof value === "number") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

export function saveCsv(data, state, points) {
  saveText("skyline-bench.csv", csv(data, state, points), "text/csv");
}
