// The frontier, cost and power charts: ladders of points before the skyline that is their frontier.

import { h } from "./dom.js";
import { chance, count, day, escaped, estimate } from "./format.js";
import { axes, errorBars, layout, title } from "./frame.js";
import { frontierOf } from "./frontier.js";
import { ladders, measure, offReason, seriesName, shortLevel, unsure } from "./model.js";
import { fade, glyph, hollow } from "./palette.js";
import { configuration, repeatCommand } from "./repeat.js";
import { skyline } from "./skyline.js";

export function frontierOfGroup(data, state, group) {
  const { x, y } = axes(state);
  const candidates = [];
  for (const point of group.points) {
    const [onX, onY] = [measure(data, state, point, x), measure(data, state, point, y)];
    if (onX && onY && !offReason(point, y)) candidates.push({ id: point.id, x: onX, y: onY });
  }
  return frontierOf(data, group, { x, y }, candidates);
}

export function ladderFigure({ data, state, group, looks, colours, compact }) {
  const { x, y } = axes(state);
  const on = frontierOfGroup(data, state, group);
  const all = ladders(state, group.points).map((ladder) => ({ ...ladder, look: looks.get(ladder.series.config) }));
  const placed = (point) => measure(data, state, point, x) && measure(data, state, point, y);
  const traces = [];
  const targets = [];
  const named = new Set();
  let explained = false;
  let dotted = false;
  const drawn = group.points.filter(placed);
  const box = extent(
    drawn.flatMap((point) => [ends(measure(data, state, point, x)), ends(measure(data, state, point, y))]),
  );

  if (on.path.length) traces.push(...skyline(data, state, on, box, colours));
  for (const ladder of all) {
    const name = seriesName(data, ladder.series);
    const counted = ladder.points.filter((point) => placed(point) && !offReason(point, y));
    const others = ladder.points.filter((point) => placed(point) && offReason(point, y));
    const colour = colours.series[ladder.look.colour];
    const opacity = ladder.latest || state.run !== "all" ? 1 : 0.45;
    if (counted.length) {
      const trace = points(data, state, counted, { x, y });
      const open = counted.map((point) => unsure(data, state, point, [x, y]) !== null);
      dotted ||= open.includes(true);
      traces.push({
        ...trace,
        name: escaped(name),
        showlegend: !named.has(name),
        mode: state.labels ? "lines+markers+text" : "lines+markers",
        opacity,
        line: { color: colour, width: 2, dash: ladder.look.dash },
        marker: {
          symbol: open.map((isOpen) => ladder.look.symbol + (isOpen ? "-open-dot" : "")),
          color: colour,
          opacity: 1, // Plotly sees through markers of several sizes
          size: counted.map((point) => (on.points.get(point.id)?.on ? 12 : 9)),
          line: { width: 1.5, color: colours.card },
        },
        ...(state.errors ? errorsOf(data, state, counted, { x, y }, fade(colour, 0.55)) : {}),
      });
      named.add(name);
      targets.push(targetsOf(traces.length - 1, counted));
    }
    if (others.length) {
      traces.push({
        ...points(data, state, others, { x, y }),
        name: "Cannot be on the frontier",
        showlegend: !explained,
        mode: "markers",
        opacity: 0.6,
        marker: { symbol: `${ladder.look.symbol}-open`, color: colour, size: 10, line: { width: 2 } },
      });
      explained = true;
      targets.push(targetsOf(traces.length - 1, others));
    }
  }
  const picked = data.pointsById.get(state.point);
  if (picked && drawn.includes(picked)) traces.push(ring(data, state, picked, { x, y }, colours));
  return {
    title: `${title(data, y)} against ${title(data, x).toLowerCase()}`,
    subtitle: subtitle(group),
    name: `${state.view} ${group.model} ${group.workload}`,
    summary: summary(data, state, group, on),
    traces,
    layout: layout({ data, state, colours, compact }, { x, y }),
    targets,
    legend: legend(data, all, explained, dotted),
    strip: strip(
      data,
      group.points.filter((point) => !placed(point)),
      { x, y },
      state,
    ),
    describe: (id) => describe(data, state, data.pointsById.get(id), { x, y }, on),
  };
}

// Around the point whose details are open.
function ring(data, state, point, { x, y }, colours) {
  return {
    type: "scatter",
    mode: "markers",
    x: [measure(data, state, point, x).value],
    y: [measure(data, state, point, y).value],
    hoverinfo: "skip",
    showlegend: false,
    cliponaxis: false,
    marker: { symbol: "circle-open", size: 26, color: colours.ink, line: { width: 2.5 } },
  };
}

const targetsOf = (curve, points) => points.map((point, index) => ({ curve, index, id: point.id }));

// One entry for each look: a series of several dates is one, the older the paler.
function legend(data, all, explained, dotted) {
  const entries = new Map(all.map((ladder) => [seriesName(data, ladder.series), glyph(ladder.look)]));
  if (dotted) entries.set("hollow with a dot: its interval is not known", hollow(true));
  if (explained) entries.set("hollow: cannot be on the frontier", hollow());
  return [...entries].map(([name, picture]) => ({ name, glyph: picture }));
}

function points(data, state, members, { x, y }) {
  return {
    type: "scatter",
    x: members.map((point) => measure(data, state, point, x).value),
    y: members.map((point) => measure(data, state, point, y).value),
    customdata: members.map((point) => point.id),
    text: members.map((point) => escaped(shortLevel(point.level))),
    textposition: "top right",
    textfont: { size: 11 },
    hoverinfo: "none",
    cliponaxis: false,
  };
}

function errorsOf(data, state, members, { x, y }, colour) {
  const bars = (key) =>
    errorBars(
      members.map((point) => measure(data, state, point, key)),
      colour,
    );
  return { error_x: bars(x), error_y: bars(y) };
}

const ends = (found) => [found.low ?? found.value, found.high ?? found.value];

function extent(pairs) {
  const of = (offset) => {
    const values = pairs.filter((_, index) => index % 2 === offset).flat();
    return [Math.min(...values), Math.max(...values)];
  };
  return { x: of(0), y: of(1) };
}

function subtitle({ model, workload, points }) {
  const hardware = [...new Set(points.map((point) => point.series.hardware))];
  const days = [
    ...new Set(points.toSorted((a, b) => a.run.index - b.run.index).map((point) => day(point.run.started))),
  ];
  const dates = days.length === 1 ? days[0] : `${days.length} dates, ${days[0]} to ${days.at(-1)}`;
  return [model, workload, ...(hardware.length === 1 ? hardware : []), dates].join(" · ");
}

// One sentence that says what the picture shows.
function summary(data, state, group, on) {
  const held = new Map();
  for (const [id, { on: isOn }] of on.points) {
    if (!isOn) continue;
    const name = seriesName(data, data.pointsById.get(id).series);
    held.set(name, (held.get(name) ?? 0) + 1);
  }
  const total = [...held.values()].reduce((sum, amount) => sum + amount, 0);
  const parts = [...held].sort((a, b) => b[1] - a[1]).map(([name, amount]) => `${amount} of ${name}`);
  const off = group.points.filter((point) => offReason(point, axes(state).y)).length;
  const start = total
    ? `The frontier has ${count(total, "point")}: ${parts.join(", ")}.`
    : "No point can be on the frontier.";
  return start + (off ? ` ${count(off, "point")} cannot be on it; their details say why.` : "");
}

// Points without coordinates stay in sight below the chart.
function strip(data, members, { x, y }, state) {
  if (members.length === 0) return [];
  const why = (point) => {
    if (point.off) return point.off;
    if (y === "cost_per_mtok" && measure(data, state, point, "output_throughput")) return "no price for its hardware";
    const row = point.metrics[measure(data, state, point, x) ? y : x];
    return row?.[4] ?? `${title(data, measure(data, state, point, x) ? y : x)} was not measured`;
  };
  return [
    h("span", { class: "strip-title" }, "Not in the chart"),
    members.map((point) =>
      h(
        "button",
        { type: "button", class: "lost", id: `lost-${point.id}`, "data-point": point.id, title: why(point) },
        h("span", { "aria-hidden": "true" }, "✕ "),
        `${seriesName(data, point.series)} · ${point.level.label}`,
        h("span", { class: "sr-only" }, `: ${why(point)}`),
      ),
    ),
  ];
}

function describe(data, state, point, { x, y }, on) {
  if (!point) return null;
  const line = (key) => {
    const { title: name, unit } = data.metrics[key];
    return `${name}: ${estimate(measure(data, state, point, key), unit)}`;
  };
  const place = on?.points.get(point.id);
  const lines = [`${point.series.workload} · ${point.level.label} · ${day(point.run.started)}`, line(y), line(x)];
  if (point.replicates > 1) lines.push(`${point.replicates} replicates`);
  if (place) lines.push(`On the frontier with probability ${chance(place.probability)}`);
  const unknown = unsure(data, state, point, [y, x]);
  if (unknown) lines.push(`No interval: ${unknown}`);
  const exact = [
    ["Configuration", configuration(point)],
    ["Started by", point.engine_command],
    ["Repeat it by", repeatCommand(data, point)],
  ].filter(([, text]) => text);
  return { title: seriesName(data, point.series), lines, exact, warning: offReason(point, y) };
}
