// The numbers to remember: the best of what is shown, each a door to its point.

import { h } from "./dom.js";
import { inUnit, interval, number } from "./format.js";
import { measure, offReason, seriesName } from "./model.js";

const CARDS = [
  ["output_per_device", "Most throughput"],
  ["interactivity", "Fastest for one user"],
  ["ttft_p50", "Soonest first token"],
  ["cost_per_mtok", "Cheapest token"],
  ["tokens_per_mw", "Most for a megawatt"],
];

const OWN = { cost: "cost_per_mtok", power: "tokens_per_mw" };

export function headline(data, state, points, onPick) {
  // What the view is about comes first.
  const cards = CARDS.toSorted((a, b) => (b[0] === OWN[state.view]) - (a[0] === OWN[state.view]));
  return cards
    .flatMap(([key, name]) => {
      const { better, unit } = data.metrics[key];
      const counted = points
        .filter((point) => offReason(point, key) === null && measure(data, state, point, key))
        .map((point) => ({ point, found: measure(data, state, point, key) }));
      if (counted.length === 0) return [];
      const sign = better === "higher" ? -1 : 1;
      const best = counted.reduce((a, b) => (sign * (b.found.value - a.found.value) < 0 ? b : a));
      const { found, unit: shownIn } = inUnit(best.found, unit);
      return [
        h(
          "button",
          { type: "button", class: "stat card", id: `stat-${key}`, onclick: () => onPick(best.point.id) },
          h("span", { class: "stat-name" }, name),
          h(
            "span",
            { class: "stat-value", title: interval(found).trim() || null },
            number(found.value),
            h("small", {}, ` ${shownIn}`),
          ),
          h("span", { class: "stat-who" }, `${seriesName(data, best.point.series)} · ${best.point.level.label}`),
        ),
      ];
    })
    .slice(0, 4);
}
