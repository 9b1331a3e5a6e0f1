// Everything about one point: what was measured, how far it can be trusted, and how to repeat it.

import { copyButton, h, saveText } from "./dom.js";
import { bytes, chance, count, estimate, inUnit, interval, minute, number, percent } from "./format.js";
import { axes } from "./frame.js";
import { measure, offReason, seriesName } from "./model.js";
import { repeatCommand, suiteFile } from "./repeat.js";

const SHOWN = [
  "output_per_device",
  "total_per_device",
  "interactivity",
  "ttft_p50",
  "ttft_p99",
  "tpot_p50",
  "itl_p99",
  "e2e_p50",
  "e2e_p99",
  "request_throughput",
  "goodput",
  "error_rate",
  "power",
  "tokens_per_mw",
  "cost_per_mtok",
];

// Without a chosen point: the frontier from left to right, each point a door to its details.
export function frontierList(data, state, places, shown) {
  const { x, y } = axes(state);
  return [
    h("h2", {}, "The frontier"),
    h(
      "p",
      { class: "note" },
      "Choose a point here, in the chart or in the table: its measurements, its checks and the command that " +
        "repeats it appear in this place.",
    ),
    shown.map((group) => {
      const members = group.points
        .filter((point) => places.get(point.id)?.on)
        .sort((a, b) => measure(data, state, a, x).value - measure(data, state, b, x).value);
      return [
        shown.length > 1 ? h("h3", {}, group.key) : null,
        members.length ? null : h("p", { class: "empty-note" }, "No point can be on it."),
        h(
          "ol",
          { class: "doors" },
          members.map((point) => door(data, state, point, places.get(point.id), { x, y })),
        ),
      ];
    }),
  ];
}

function door(data, state, point, place, keys) {
  const value = (key) =>
    estimate({ value: measure(data, state, point, key).value, low: null, high: null }, data.metrics[key].unit);
  return h(
    "li",
    {},
    h(
      "button",
      { type: "button", class: "door", id: `door-${point.id}`, "data-point": point.id },
      h("b", {}, seriesName(data, point.series)),
      h("span", {}, point.level.label),
      h("span", {}, `${value(keys.y)} at ${value(keys.x)}`),
      h("span", {}, `probability ${chance(place.probability)}`),
    ),
  );
}

export function details(data, state, point, place) {
  const why = offReason(point, axes(state).y);
  return [
    h("h2", {}, seriesName(data, point.series)),
    h("p", { class: "subtitle" }, `${point.series.model} · ${point.series.workload} · ${point.level.label}`),
    standing(why, place),
    point.notes.map((note) => h("p", { class: "warning" }, note)),
    measurements(data, state, point),
    h("h3", {}, "Checks"),
    h("ul", { class: "checks" }, checks(point).map(check)),
    h("h3", {}, "Configuration"),
    h(
      "dl",
      { class: "facts" },
      facts(point).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
    ),
    h("h3", {}, "Repeat this point"),
    repeat(data, point),
    point.engine_command
      ? [h("h3", {}, "Engine's command line"), copyButton(point.engine_command, "Engine's command line")]
      : null,
    h(
      "details",
      { class: "more" },
      h("summary", {}, "Exact specification"),
      copyButton(suiteFile(point).text, "Exact specification"),
    ),
    packages(point),
  ];
}

function repeat(data, point) {
  const command = repeatCommand(data, point);
  if (command === null) {
    return h("p", { class: "note" }, `It was imported from ${point.imported_from} and cannot be repeated from here.`);
  }
  const { name, text } = suiteFile(point);
  const download = () => saveText(name, text, "application/yaml");
  return [
    copyButton(command, "Command that repeats this point"),
    h("button", { type: "button", class: "quiet", id: "download-suite", onclick: download }, `Download ${name}`),
    h("p", { class: "note" }, "The suite holds this point, with its accuracy gate. Keys that were left out are ***."),
  ];
}

function standing(off, place) {
  if (off) return h("p", { class: "standing off" }, "✕ Not on the frontier: ", off);
  if (!place) return null;
  const text = place.on ? "■ On the frontier, with probability" : "□ Behind the frontier; on it with probability";
  const why = place.probability === null ? ", as an interval of it, or of a point that beats it, is not known" : "";
  return h("p", { class: place.on ? "standing on" : "standing" }, `${text} ${chance(place.probability)}${why}`);
}

function measurements(data, state, point) {
  const rows = SHOWN.flatMap((key) => {
    const found = measure(data, state, point, key);
    const refused = found ? found.refused : point.metrics[key]?.[4];
    if (!found && !refused) return [];
    const { title, unit, formula } = data.metrics[key];
    const shown = found && inUnit(found, unit);
    const cells = found
      ? h(
          "td",
          {},
          h("b", {}, number(shown.found.value)),
          ` ${shown.unit}`,
          h("span", { class: "interval" }, refused ? ` no interval: ${refused}` : interval(shown.found)),
        )
      : h("td", {}, h("span", { class: "interval" }, refused));
    return [h("tr", {}, h("th", { scope: "row", title: formula }, title), cells)];
  });
  return rows.length
    ? h(
        "table",
        { class: "measurements" },
        h("caption", { class: "sr-only" }, "Measurements with 95 % intervals"),
        h("tbody", {}, rows),
      )
    : null;
}

const SIGNS = { good: "✓", bad: "✕", open: "?" };

function check([verdict, name, text]) {
  return h(
    "li",
    { class: verdict },
    h("span", { class: "sign", "aria-hidden": "true" }, SIGNS[verdict]),
    h(
      "span",
      {},
      h("b", {}, name),
      h("span", { class: "sr-only" }, { good: " passed", bad: " failed", open: " unknown" }[verdict]),
      h("br"),
      text,
    ),
  );
}

// [good, bad or open; name; sentence] for each check that a point went through.
function checks(point) {
  const of = { valid: "good", invalid: "bad", unknown: "open", passed: "good", failed: "bad", none: "open" };
  const found = [];
  const { accuracy, window, cache, client, tokens, energy } = point;
  found.push([
    of[accuracy.verdict],
    "Accuracy",
    accuracy.tasks.map(task).join("; ") || "no accuracy task was run for it",
  ]);
  if (window) {
    const seconds = `${number(window.seconds)} s measured`;
    found.push([
      window.steady ? "good" : "bad",
      "Steady state",
      window.reason ? `${seconds}; ${window.reason}` : seconds,
    ]);
  }
  if (client) found.push([client.limited ? "bad" : "good", "Load generator", clientText(client)]);
  if (cache) found.push([of[cache.status], "Prefix cache", cache.reason]);
  if (tokens) found.push([tokens.bundled || tokens.wrong_length || tokens.mismatch ? "bad" : "good", "Token count", tokenText(tokens)]);
  if (energy)
    found.push([of[energy.status], "Energy", energy.source ? `${energy.reason} (${energy.source})` : energy.reason]);
  return found;
}

function task({ task: name, exact_match: share, standard_error: error, total, at_least: least, reason }) {
  if (share === null) return `${name}: ${reason ?? "not evaluated"}`;
  const precision = error === null ? "" : ` ± ${percent(error, 1)}`;
  return `${name}: ${percent(share, 1)}${precision} of ${total} right, ${percent(least, 0)} asked for`;
}

function clientText({ reason, headroom, cpu_share: cpu, loop_lag_p99_s: lag }) {
  const room = headroom === null ? "" : `; headroom ${number(headroom)}×`;
  return `${reason}${room}; CPU ${percent(cpu)}; event loop late by ${number(lag * 1000)} ms at p99`;
}

function tokenText({ usage, text, bundled, tokens_per_event: each, wrong_length: wrong, without_text: textless, mismatch }) {
  const parts = [
    usage === null ? "no usage" : `${number(usage)} by usage`,
    text === null ? "not counted from text" : `${number(text)} from text`,
  ];
  if (bundled) parts.push(`tokens came bundled, ${number(each)} an event`);
  if (textless > 0.01) parts.push(`${percent(textless)} of tokens came without text`);
  if (mismatch) parts.push(mismatch);
  if (wrong) parts.push(`${count(wrong, "request")} of another length than asked for`);
  return parts.join("; ");
}

function facts(point) {
  const { series, run, server, machine } = point;
  return [
    ["Hardware", `${series.hardware}${series.devices > 1 ? `, ${series.devices} devices` : ""}`],
    [
      "Machine",
      [
        machine.cpu,
        machine.cores ? `${machine.cores} cores` : "",
        machine.memory_bytes ? bytes(machine.memory_bytes) : "",
        machine.system,
      ]
        .filter(Boolean)
        .join(", "),
    ],
    ["Engine", `${series.engine} ${series.engine_version}`.trim()],
    ["Model", point.source === series.model ? series.model : `${series.model} (${point.source})`],
    ["Precision", series.precision],
    ["Parallelism", series.parallelism],
    ["Speculation", series.speculation],
    ["Workload", point.workload],
    ["Load", point.level.label],
    ["Replicates", String(point.replicates)],
    ["Started in", server?.startup_s ? `${number(server.startup_s)} s` : ""],
    ["Memory", server?.peak_memory_bytes ? `${bytes(server.peak_memory_bytes)} at most` : ""],
    ["Run", [run.label, run.suite, minute(run.started)].filter(Boolean).join(" · ")],
    ["Finished", minute(point.finished)],
    ["Imported from", point.imported_from ?? ""],
  ].filter(([, value]) => value);
}

function packages(point) {
  const names = Object.entries(point.packages);
  if (names.length === 0) return null;
  return h(
    "details",
    { class: "more" },
    h("summary", {}, "Packages of the engine"),
    h(
      "dl",
      { class: "facts" },
      names.map(([name, version]) => [h("dt", {}, name), h("dd", {}, version)]),
    ),
  );
}
