// Filters, tabs, axes and prices. Each control is built when its choices change and only then.

import { byId, h, onChange } from "./dom.js";
import { minute } from "./format.js";
import { chosenLevel, levels } from "./history.js";
import { chosen, matching, options } from "./model.js";
import { choices } from "./state.js";

const VIEWS = {
  frontier: "Frontier",
  cost: "Cost",
  power: "Power",
  history: "History",
  compare: "Compare",
  table: "Table",
};
const AXIS_NAMES = { interactivity: "Interactivity", ttft_p50: "Time to first token", e2e_p50: "End-to-end latency" };
const METRIC_NAMES = { ...AXIS_NAMES, output_per_device: "Output throughput", total_per_device: "Total throughput" };
const CHIPS = { engine: "Engine", hardware: "Hardware", precision: "Precision" };
const COLOUR_NAMES = { engine: "engine", hardware: "hardware", precision: "precision", series: "configuration" };

function select(id, label, entries, value, change) {
  const element = h(
    "select",
    { id, onchange: (event) => change(event.target.value) },
    entries.map(([key, name]) => h("option", { value: key, selected: key === value }, name)),
  );
  return h("label", { class: "field", for: id }, h("span", {}, label), element);
}

function toggle(id, label, on, change) {
  return h(
    "label",
    { class: "switch", for: id },
    h("input", { type: "checkbox", id, checked: on, onchange: (event) => change(event.target.checked) }),
    h("span", {}, label),
  );
}

export function renderTabs(store) {
  const { view } = store.state;
  onChange(byId("tabs"), view, () =>
    Object.entries(VIEWS).map(([key, name]) =>
      h(
        "button",
        {
          type: "button",
          id: `tab-${key}`,
          "aria-current": key === view ? "page" : null,
          onclick: () => store.set({ view: key }),
        },
        name,
      ),
    ),
  );
  // On a narrow screen the row of views scrolls by itself.
  const tab = byId(`tab-${view}`);
  byId("tabs").scrollLeft = tab.offsetLeft - (byId("tabs").clientWidth - tab.offsetWidth) / 2;
}

export function renderFilters(data, store) {
  const { state } = store;
  const offered = options(data);
  const pick = (name, label) => {
    const entries = offered[name].map((value) => [value, value]);
    if (entries.length > 1) entries.push(["*", `All ${label.toLowerCase()}s`]);
    return select(`filter-${name}`, label, entries, chosen(data, state, name) ?? "*", (value) =>
      store.set({ [name]: value, zoom: {} }),
    );
  };
  const runs = [...data.runs]
    .reverse()
    .map((run) => [run.id, [minute(run.started), run.label, run.suite].filter(Boolean).join(" · ")]);
  const entries = [["latest", "Latest of each point"], ["all", "All dates"], ...runs];
  const needsRun = state.view !== "history";
  onChange(
    byId("picks"),
    [offered.model, offered.scenario, runs, state.model, state.scenario, state.run, needsRun],
    () => [
      pick("model", "Model"),
      pick("scenario", "Scenario"),
      needsRun ? select("filter-run", "Date", entries, state.run, (run) => store.set({ run })) : null,
    ],
  );
  onChange(byId("chips"), [offered, state.engine, state.hardware, state.precision], () =>
    Object.entries(CHIPS)
      // Nothing to choose from is not a choice.
      .filter(([name]) => offered[name].length > 1 || state[name].length > 0)
      .map(([name, label]) => chips(store, name, label, offered[name])),
  );
}

// None chosen is all, so what a running benchmark adds is shown unless the viewer has chosen.
function chips(store, name, label, values) {
  const picked = store.state[name];
  const flip = (value) =>
    store.set({ [name]: picked.includes(value) ? picked.filter((other) => other !== value) : [...picked, value] });
  const chip = (id, on, change, text) =>
    h(
      "label",
      { class: "chip", for: id },
      h("input", { type: "checkbox", id, checked: on, onchange: change }),
      h("span", {}, text),
    );
  return h(
    "fieldset",
    { class: "chips" },
    h("legend", {}, label),
    chip(`chip-${name}-all`, picked.length === 0, () => store.set({ [name]: [] }), "All"),
    values.map((value, index) => chip(`chip-${name}-${index}`, picked.includes(value), () => flip(value), value)),
  );
}

export function renderAxes(data, store) {
  const { state } = store;
  const { view } = state;
  const chart = ["frontier", "cost", "power"].includes(view);
  const named = (name, names) => choices(name).map((key) => [key, names[key]]);
  const offered = view === "history" ? levels(matching(data, state)) : [];
  const level = view === "history" ? chosenLevel(state, matching(data, state)) : "";
  const shown = [
    view,
    state.x,
    state.y,
    state.logx,
    state.logy,
    state.bands,
    state.errors,
    state.labels,
    state.colour,
    state.metric,
    level,
    offered,
  ];
  onChange(byId("axes"), shown, () => [
    view === "frontier" && select("axis-y", "Throughput", named("y", METRIC_NAMES), state.y, (y) => store.set({ y })),
    view === "frontier" && select("axis-x", "Against", named("x", AXIS_NAMES), state.x, (x) => store.set({ x })),
    view === "history" &&
      select("history-metric", "Metric", named("metric", METRIC_NAMES), state.metric, (metric) =>
        store.set({ metric }),
      ),
    view === "history" &&
      select("history-level", "Level", [...offered.map((name) => [name, name]), ["*", "All levels"]], level, (value) =>
        store.set({ level: value }),
      ),
    (chart || view === "history") &&
      select("colour-by", "Colour by", named("colour", COLOUR_NAMES), state.colour, (colour) => store.set({ colour })),
    chart && toggle("log-x", "Log x", state.logx, (logx) => store.set({ logx })),
    chart && toggle("log-y", "Log y", state.logy, (logy) => store.set({ logy })),
    chart && toggle("bands", "Band", state.bands, (bands) => store.set({ bands })),
    (chart || view === "history") && toggle("errors", "Error bars", state.errors, (errors) => store.set({ errors })),
    chart && toggle("labels", "Labels", state.labels, (labels) => store.set({ labels })),
  ]);
}

export function renderPair(store, offered, { a, b, others }) {
  const several = new Set(offered.map(({ group }) => group)).size > 1;
  const entries = (list) => list.map(({ key, name, group }) => [key, several ? `${name} (${group})` : name]);
  onChange(byId("pair"), [entries(offered), entries(others), a?.key, b?.key], () => [
    a && select("compare-a", "First", entries(offered), a.key, (key) => store.set({ a: key })),
    b && select("compare-b", "Second", entries(others), b.key, (key) => store.set({ b: key })),
    a &&
      b &&
      h(
        "button",
        { type: "button", class: "quiet", id: "compare-swap", onclick: () => store.set({ a: b.key, b: a.key }) },
        "Swap",
      ),
  ]);
}

// A number for each hardware; an emptied field goes back to the price that came with the data.
export function renderPrices(data, store) {
  const names = Object.keys(data.prices);
  onChange(byId("price-fields"), [names, data.prices], () =>
    names.map((name, index) => {
      const id = `price-${index}`;
      const change = (event) => {
        const { [name]: _, ...rest } = store.state.prices;
        const typed = event.target.value === "" ? null : Number(event.target.value);
        const valid = typed === null || (Number.isFinite(typed) && typed >= 0);
        event.target.setAttribute("aria-invalid", String(!valid));
        if (valid)
          store.set({ prices: typed === null || typed === data.prices[name] ? rest : { ...rest, [name]: typed } });
      };
      const standard = data.prices[name];
      const field = h("input", {
        id,
        type: "number",
        min: 0,
        step: "any",
        inputmode: "decimal",
        placeholder: standard ?? "no price",
        oninput: change,
      });
      return h(
        "label",
        { class: "field", for: id },
        h("span", {}, name),
        h("span", { class: "with-unit" }, "$ ", field, " per device-hour"),
      );
    }),
  );
  names.forEach((name, index) => {
    const field = byId(`price-${index}`);
    const value = store.state.prices[name] ?? data.prices[name];
    if (document.activeElement !== field) field.value = value ?? "";
  });
}
