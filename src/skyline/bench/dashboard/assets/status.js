// Where the data stands: live, out of reach, or a copy; and how far running benchmarks are.

import { byId, h, replace } from "./dom.js";
import { ago, count, minute } from "./format.js";

let last = null;

export function showSource({ kind, message, since }) {
  if (kind === "live") last = new Date().toISOString();
  const badge = byId("source");
  const names = { live: "Live", static: "Static copy", offline: "Server out of reach", broken: "Store cannot be read" };
  badge.dataset.kind = kind;
  badge.textContent = kind === "static" && since ? `Copy of ${minute(since)}` : names[kind];
  const banner = byId("banner");
  const texts = {
    offline: last
      ? `The server does not answer. What is shown is of ${minute(last)}; the page tries again by itself.`
      : "The server does not answer. Start it with `skyline bench dashboard`; the page tries again by itself.",
    broken: `The server could not read the results: ${message}`,
  };
  const text = texts[kind] ?? "";
  if (banner.textContent !== text) banner.textContent = text;
  banner.hidden = text === "";
  if (text && !last) byId("loading").hidden = true;
}

// A killed run stays "running" until it is resumed, so the age of its last result is said as well.
export function showProgress(data) {
  const running = data.runs.filter((run) => run.status === "running");
  const home = byId("progress");
  home.hidden = running.length === 0;
  replace(
    home,
    running.map((run) => {
      const label = `${run.label ?? run.suite}: ${run.done} of ${count(run.planned, "point")}`;
      return h(
        "div",
        { class: "run" },
        h("progress", { max: run.planned, value: run.done, "aria-label": label }),
        h("span", {}, label, ", ", run.done ? `the last ${ago(run.last)}` : `started ${ago(run.started)}`),
      );
    }),
  );
}
