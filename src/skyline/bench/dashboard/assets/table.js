// All shown points as a sortable table: the text alternative of the charts.

import { byId, h, replace } from "./dom.js";
import { chance, count, day, interval, number } from "./format.js";
import { axes } from "./frame.js";
import { frontierOfGroup } from "./ladderfigure.js";
import { groups, measure, offReason, refusal } from "./model.js";
import { glyph } from "./palette.js";

const FIRST = 200;
let whole = false;

const metricColumn = (key, name) => ({
  key,
  name,
  number: true,
  read: ({ data, state }, point) => measure(data, state, point, key)?.value ?? null,
  show: ({ data, state }, point) => {
    const found = measure(data, state, point, key);
    const refused = refusal(data, state, point, key);
    const value = found && number(found.value);
    const told = refused ? `${value}; no interval: ${refused}` : `${value}${interval(found)}`;
    return h(
      "td",
      { class: "number", title: found ? told : refused },
      found ? value : refused ? "refused" : "–",
    );
  },
});

// `text` is what a cell shows and `order` what it sorts by.
const textColumn = (key, name, text, order = text) => ({
  key,
  name,
  read: (_, point) => order(point),
  show: (_, point) => h("td", {}, text(point)),
});

// Shown as columns where the points differ in them, in the line above the table where they do not.
const FIELDS = {
  model: ["Model", (point) => point.series.model],
  workload: ["Scenario", (point) => point.series.workload],
  hardware: ["Hardware", (point) => point.series.hardware],
  precision: ["Precision", (point) => point.series.precision],
  parallelism: ["Parallel", (point) => point.series.parallelism],
  speculation: ["Speculation", (point) => point.series.speculation],
  date: ["Date", (point) => day(point.run.started), (point) => point.run.started],
};

const COLUMNS = [
  {
    key: "engine",
    name: "Engine",
    read: (_, point) => `${point.series.engine} ${point.series.engine_version}`,
    show: ({ looks }, point) =>
      h(
        "th",
        { scope: "row" },
        glyph(looks.get(point.series.config)),
        h(
          "button",
          { type: "button", class: "link", id: `row-${point.id}`, "data-point": point.id },
          point.series.engine,
        ),
        h("span", { class: "version" }, ` ${point.series.engine_version}`),
      ),
  },
  ...Object.entries(FIELDS).map(([field, rest]) => textColumn(field, ...rest)),
  textColumn(
    "level",
    "Level",
    (point) => point.level.label,
    (point) => point.level.order,
  ),
  {
    key: "frontier",
    name: "On frontier",
    number: true,
    read: ({ places }, point) => places.get(point.id)?.probability ?? -1,
    show: ({ places, state }, point) => {
      const why = offReason(point, axes(state).y);
      const place = places.get(point.id);
      if (why)
        return h(
          "td",
          { class: "number off", title: why },
          h("span", { class: "badge" }, `✕ ${kind(point)}`),
          h("span", { class: "sr-only" }, why),
        );
      if (!place) return h("td", { class: "number" }, "–");
      return h(
        "td",
        { class: place.on ? "number on" : "number" },
        `${place.on ? "■ " : ""}${chance(place.probability)}`,
      );
    },
  },
  metricColumn("output_per_device", "Output tok/s per device"),
  metricColumn("interactivity", "tok/s per user"),
  metricColumn("ttft_p50", "TTFT median, s"),
  metricColumn("ttft_p99", "TTFT p99, s"),
  metricColumn("e2e_p50", "E2E median, s"),
  metricColumn("cost_per_mtok", "$ per Mtok"),
  metricColumn("tokens_per_mw", "tok/s per MW"),
];

function kind(point) {
  if (point.status !== "ok") return point.status;
  if (point.off?.startsWith("accuracy")) return "inaccurate";
  return point.off ? "client-limited" : "no energy";
}

export function placesOf(data, state, points) {
  return new Map(groups(points).flatMap((group) => [...frontierOfGroup(data, state, group).points]));
}

function sorted(context, points) {
  const column = COLUMNS.find(({ key }) => key === context.state.sort.replace(/^-/, ""));
  if (!column) return points;
  const sign = context.state.sort.startsWith("-") ? -1 : 1;
  const order = (a, b) => {
    const [left, right] = [column.read(context, a), column.read(context, b)];
    // What was not measured is last either way.
    if (left === null || right === null) return (left === null) - (right === null);
    return sign * (typeof left === "number" ? left - right : left.localeCompare(right, "en", { numeric: true }));
  };
  return points.toSorted(order);
}

// A heading that sorts: a number's first click is descending, a text's ascending, and the third gives the data's order.
function heading(column, sort, onSort) {
  const [up, down] = [column.key, `-${column.key}`];
  const direction = { [up]: "ascending", [down]: "descending" }[sort] ?? "none";
  const turns = column.number ? ["", down, up] : ["", up, down];
  const next = turns[(turns.indexOf(direction === "none" ? "" : sort) + 1) % 3];
  const arrow = { ascending: " ↑", descending: " ↓", none: "" }[direction];
  return h(
    "th",
    { scope: "col", "aria-sort": direction, class: column.number ? "number" : null },
    h(
      "button",
      { type: "button", id: `sort-${column.key}`, onclick: () => onSort(next) },
      column.name,
      h("span", { class: "arrow", "aria-hidden": "true" }, arrow),
    ),
  );
}

function row(context, columns, point) {
  const { state } = context;
  const classes = [offReason(point, axes(state).y) ? "dim" : "", state.point === point.id ? "picked" : ""];
  return h(
    "tr",
    { "data-id": point.id, class: classes.join(" ").trim() || null },
    columns.map((column) => column.show(context, point)),
  );
}

// Fills the table of the page. `onSort(key)` gets the new order, or "" for the data's own.
export function renderTable(context, points, onSort) {
  const same = Object.keys(FIELDS).filter((field) => new Set(points.map(FIELDS[field][1])).size < 2);
  const columns = COLUMNS.filter(({ key }) => !same.includes(key));
  const common = points.length
    ? same.map((field) => FIELDS[field][1](points[0])).filter((text) => text !== "none")
    : [];
  const what = [count(points.length, "point"), ...common].join(" · ");
  byId("table-note").textContent = `${what}. A column's heading sorts by it; an engine's name opens the details.`;

  const rows = sorted(context, points);
  const shown = whole ? rows : rows.slice(0, FIRST);
  replace(
    byId("table"),
    h("caption", { class: "sr-only" }, "Points"),
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        columns.map((column) => heading(column, context.state.sort, onSort)),
      ),
    ),
    h(
      "tbody",
      {},
      shown.map((point) => row(context, columns, point)),
    ),
  );
  const more = byId("more");
  more.hidden = whole || rows.length <= FIRST;
  more.textContent = `Show all ${rows.length}`;
  more.onclick = () => {
    whole = true;
    renderTable(context, points, onSort);
  };
}
