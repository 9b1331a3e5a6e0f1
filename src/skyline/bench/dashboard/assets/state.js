// What the viewer has chosen. All of it is in the address after "#", so a copied address shows the same view.

const DEFAULTS = {
  view: "frontier",
  model: "", // the first; "*" is all
  scenario: "",
  run: "latest", // or "all", or a run's id
  engine: [], // none chosen is all
  hardware: [],
  precision: [],
  x: "interactivity",
  y: "output_per_device",
  logx: false,
  logy: false,
  bands: true,
  errors: true,
  labels: false,
  colour: "engine",
  metric: "output_per_device", // of the history
  level: "", // of the history: the one that most have; "*" is all
  a: "", // the compared ladders
  b: "",
  sort: "", // column, or -column for descending
  point: "", // whose details are shown
  prices: {}, // {hardware: $ per device-hour} where they differ from the data's
  zoom: {}, // {panel: [x0, x1, y0, y1]}
};

const CHOICES = {
  view: ["frontier", "cost", "power", "history", "compare", "table"],
  x: ["interactivity", "ttft_p50", "e2e_p50"],
  y: ["output_per_device", "total_per_device"],
  metric: ["output_per_device", "interactivity", "ttft_p50", "e2e_p50"],
  colour: ["engine", "hardware", "precision", "series"],
};

export const choices = (name) => CHOICES[name];

function parse(hash) {
  const state = structuredClone(DEFAULTS);
  const query = new URLSearchParams(hash.replace(/^#/, ""));
  for (const name of Object.keys(DEFAULTS)) {
    const value = query.get(name);
    if (value === null) continue;
    const standard = DEFAULTS[name];
    if (Array.isArray(standard)) state[name] = query.getAll(name);
    else if (typeof standard === "boolean") state[name] = value === "1";
    else if (typeof standard === "string" && (!CHOICES[name] || CHOICES[name].includes(value))) state[name] = value;
  }
  for (const [key, numbers] of pairs(query, "price")) {
    if (numbers.length === 1 && numbers[0] >= 0) state.prices[key] = numbers[0];
  }
  for (const [key, numbers] of pairs(query, "zoom")) {
    if (numbers.length === 4) state.zoom[key] = numbers;
  }
  return state;
}

// price=H100@2.5 and zoom=PANEL@x0,x1,y0,y1. A name may hold any sign, "@" too.
function* pairs(query, name) {
  for (const text of query.getAll(name)) {
    const at = text.lastIndexOf("@");
    const numbers = text
      .slice(at + 1)
      .split(",")
      .map(Number);
    if (at > 0 && numbers.every(Number.isFinite)) yield [text.slice(0, at), numbers];
  }
}

function serialize(state) {
  const query = new URLSearchParams();
  for (const [name, standard] of Object.entries(DEFAULTS)) {
    const value = state[name];
    if (Array.isArray(standard)) value.forEach((item) => query.append(name, item));
    else if (typeof standard !== "object" && value !== standard) query.set(name, value === true ? "1" : value || "0");
  }
  for (const [key, price] of Object.entries(state.prices)) query.append("price", `${key}@${price}`);
  for (const [key, range] of Object.entries(state.zoom)) {
    query.append("zoom", `${key}@${range.map((edge) => Number(edge.toPrecision(6))).join(",")}`);
  }
  return query.toString();
}

const AXES = ["view", "x", "y", "logx", "logy", "metric", "level", "a", "b"];

// `set` merges a change, writes the address and tells the listener. Another view is a new step for the Back button;
// finer choices replace the step. A zoom is of one pair of axes and ends with it.
export function createStore(listener) {
  const store = {
    state: parse(location.hash),
    set(change) {
      const step = ["view", "model", "scenario"].some((name) => name in change && change[name] !== store.state[name]);
      const zoom = AXES.some((name) => name in change) ? {} : store.state.zoom;
      store.state = { ...store.state, zoom, ...change };
      const hash = `#${serialize(store.state)}`;
      history[step ? "pushState" : "replaceState"](null, "", hash);
      listener(store.state);
    },
    clearFilters() {
      store.set({ engine: [], hardware: [], precision: [], run: "latest", zoom: {} });
    },
  };
  addEventListener("popstate", () => {
    store.state = parse(location.hash);
    listener(store.state);
  });
  return store;
}
