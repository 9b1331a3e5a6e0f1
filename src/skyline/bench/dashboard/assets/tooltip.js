// The small card beside a point.

import { byId, h, replace } from "./dom.js";

// `told`: {title, lines, exact, warning}; `exact` are pairs of a name and a text to be read letter by letter. `place`: a
// point of the window.
export function showTip({ title, lines, exact = [], warning }, { left, top }) {
  const tip = byId("tip");
  replace(
    tip,
    h("strong", {}, title),
    lines.map((line) => h("div", {}, line)),
    exact.map(([name, text]) => h("div", {}, `${name} `, h("code", {}, text))),
    warning ? h("div", { class: "warning" }, warning) : null,
  );
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const gap = 14;
  const right = left + gap + box.width < innerWidth - 8;
  tip.style.left = `${Math.max(8, right ? left + gap : left - gap - box.width)}px`;
  tip.style.top = `${Math.min(Math.max(8, top - box.height / 2), innerHeight - box.height - 8)}px`;
}

export function hideTip() {
  byId("tip").hidden = true;
}
