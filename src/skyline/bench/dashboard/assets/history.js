// A metric over dates: a line for each configuration and level, with the changes that were found in it.

import { h } from "./dom.js";
import { count, day, escaped, estimate, number, pValue, relative } from "./format.js";
import { axisTitle, errorBars, frame } from "./frame.js";
import { measure, offReason, seriesName } from "./model.js";
import { fade, glyph } from "./palette.js";

const DAY_MS = 86_400_000;

// Levels of the shown points, the lightest first.
export function levels(points) {
  const found = new Map(points.map((point) => [point.level.label, point.level]));
  return [...found.values()]
    .sort((a, b) => a.kind.localeCompare(b.kind) || a.order - b.order)
    .map(({ label }) => label);
}

// The chosen level; without a choice the one in the middle of those that most points have. "*" is all.
export function chosenLevel(state, points) {
  const offered = levels(points);
  if (state.level === "*" || offered.includes(state.level)) return state.level;
  const count = (label) => points.filter((point) => point.level.label === label).length;
  const most = Math.max(...offered.map(count));
  const common = offered.filter((label) => count(label) === most);
  return common[Math.floor((common.length - 1) / 2)] ?? "*";
}

export function historyLines(points, level) {
  const found = new Map();
  for (const point of points) {
    if (level !== "*" && point.level.label !== level) continue;
    const key = `${point.series.config}|${point.level.label}`;
    if (!found.has(key)) found.set(key, { key, series: point.series, level: point.level, points: [] });
    const line = found.get(key);
    line.points.push(point);
    line.series = point.series;
  }
  for (const line of found.values()) line.points.sort((a, b) => a.run.index - b.run.index);
  return [...found.values()];
}

export function changesIn(data, state, lines) {
  const keys = new Map(lines.map((line) => [line.key, line]));
  return data.changes
    .filter((change) => change.metric === state.metric && keys.has(`${change.config}|${change.level}`))
    .map((change) => ({ ...change, line: keys.get(`${change.config}|${change.level}`) }));
}

export function historyFigure({ data, state, group, looks, colours, compact }) {
  const key = state.metric;
  const level = chosenLevel(state, group.points);
  const lines = historyLines(group.points, level);
  const changes = changesIn(data, state, lines);
  const name = (line) => seriesName(data, line.series, false);
  const named = new Set();
  const traces = [];
  const targets = [];
  for (const line of lines) {
    const look = looks.get(line.series.config);
    const colour = colours.series[look.colour];
    for (const counts of [true, false]) {
      const members = line.points.filter(
        (point) => measure(data, state, point, key) && (offReason(point, key) === null) === counts,
      );
      if (members.length === 0) continue;
      const found = members.map((point) => measure(data, state, point, key));
      traces.push({
        type: "scatter",
        mode: counts ? "lines+markers" : "markers",
        name: counts ? escaped(name(line)) : "",
        showlegend: counts && !named.has(name(line)),
        opacity: counts ? 1 : 0.5,
        x: members.map((point) => point.run.started),
        y: found.map(({ value }) => value),
        customdata: members.map((point) => point.id),
        hoverinfo: "none",
        line: { color: colour, width: 2, dash: look.dash },
        marker: counts
          ? { symbol: look.symbol, color: colour, size: 9, line: { width: 1.5, color: colours.card } }
          : { symbol: `${look.symbol}-open`, color: colour, size: 9 },
        error_y: counts && state.errors ? errorBars(found, fade(colour, 0.55)) : undefined,
      });
      if (counts) named.add(name(line));
      targets.push(members.map((point, index) => ({ curve: traces.length - 1, index, id: point.id })));
    }
  }
  for (const regression of [true, false]) {
    const marks = changes
      .filter((change) => change.regression === regression)
      .flatMap((change) => mark(data, state, change));
    if (marks.length) traces.push(flags(marks, regression, colours));
  }
  const worse = changes.filter((change) => change.regression).length;
  return {
    title: `${data.metrics[key].title} over time`,
    subtitle: `${group.model} · ${group.workload} · ${level === "*" ? "all levels" : level}`,
    name: `history ${key} ${group.model} ${group.workload}`,
    summary:
      `${count(lines.length, "line")} over ${count(new Set(group.points.map((point) => point.run.id)).size, "run")}. ` +
      (changes.length
        ? `${count(worse, "regression")} and ${count(changes.length - worse, "improvement")} found.`
        : "No change was found."),
    traces,
    layout: {
      ...frame(colours),
      xaxis: {
        type: "date",
        tickformatstops: [
          { dtickrange: [null, DAY_MS - 1], value: "%H:%M\n%-d %b %Y" },
          { dtickrange: [DAY_MS, null], value: "%-d %b\n%Y" },
        ],
        gridcolor: colours.grid,
        tickfont: { size: 12, color: colours.muted },
        autorange: true,
      },
      yaxis: {
        rangemode: "tozero",
        autorange: true,
        gridcolor: colours.grid,
        zeroline: false,
        tickfont: { size: 12, color: colours.muted },
        separatethousands: true,
        automargin: true,
        title: axisTitle({ data, colours, compact }, key, "↑"),
      },
    },
    targets,
    legend: [...new Map(lines.map((line) => [name(line), glyph(looks.get(line.series.config))]))].map(
      ([entry, picture]) => ({ name: entry, glyph: picture }),
    ),
    describe: (id) => tell(data, state, data.pointsById.get(id), key, changes),
  };
}

function mark(data, state, change) {
  const point = change.line.points.find((other) => other.run.id === change.run);
  const found = point && measure(data, state, point, change.metric);
  return found ? [{ x: point.run.started, y: found.value, id: point.id, text: relative(change.relative) }] : [];
}

function flags(marks, regression, colours) {
  const colour = regression ? colours.bad : colours.good;
  return {
    type: "scatter",
    mode: "markers+text",
    name: regression ? "Regression" : "Improvement",
    showlegend: true,
    x: marks.map(({ x }) => x),
    y: marks.map(({ y }) => y),
    text: marks.map(({ text }) => `<b>${regression ? "▼" : "▲"} ${text}</b>`),
    customdata: marks.map(({ id }) => id),
    textposition: regression ? "bottom center" : "top center",
    textfont: { color: colour, size: 13 },
    hoverinfo: "none",
    cliponaxis: false,
    marker: { symbol: "circle-open", size: 20, color: colour, line: { width: 2.5 } },
  };
}

function tell(data, state, point, key, changes) {
  if (!point) return null;
  const { title, unit } = data.metrics[key];
  const lines = [
    `${point.level.label} · ${day(point.run.started)}${point.run.label ? ` · ${point.run.label}` : ""}`,
    `${title}: ${estimate(measure(data, state, point, key), unit)}`,
  ];
  for (const change of changes) {
    if (change.run !== point.run.id || change.line.series.config !== point.series.config) continue;
    if (change.level === point.level.label) lines.push(sentence(change));
  }
  return { title: seriesName(data, point.series), lines, warning: offReason(point, key) };
}

const kind = (change) => (change.regression ? "Regression" : "Improvement");
const sentence = (change) => `${kind(change)} of ${relative(change.relative)} from here on (p = ${pValue(change.p)})`;

// The changes as a table, which is what the chart says in words.
export function changesTable(data, state, changes) {
  const { title, unit } = data.metrics[state.metric];
  const what = `Changes of ${title.toLowerCase()}${unit === "1" ? "" : `, ${unit}`}`;
  const note = h(
    "p",
    { class: "note" },
    `${what}. A history in which nothing changed raises a false alarm once in a hundred: `,
    "trust what several levels show.",
  );
  if (changes.length === 0) return [note, h("p", { class: "empty-note" }, "No change was found in what is shown.")];
  const head = ["Change", "From", "Configuration", "Model", "Scenario", "Level"];
  const numbers = ["Before", "After", "p"];
  return [
    note,
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": what },
      h(
        "table",
        {},
        h("caption", { class: "sr-only" }, what),
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            head.map((name) => h("th", { scope: "col" }, name)),
            numbers.map((name) => h("th", { scope: "col", class: "number" }, name)),
          ),
        ),
        h(
          "tbody",
          {},
          changes.map((change) => changeRow(data, change)),
        ),
      ),
    ),
  ];
}

function changeRow(data, change) {
  const sign = change.regression ? "▼ regression" : "▲ improvement";
  return h(
    "tr",
    { class: change.regression ? "worse" : "better" },
    h("td", {}, h("span", { class: "badge" }, `${sign} ${relative(change.relative)}`)),
    h("td", {}, day(data.runsById.get(change.run).started)),
    h("td", {}, seriesName(data, change.line.series, false)),
    [change.model, change.workload, change.level].map((text) => h("td", {}, text)),
    [number(change.before), number(change.after), pValue(change.p)].map((text) => h("td", { class: "number" }, text)),
  );
}
