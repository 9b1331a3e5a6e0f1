// Draws the page from the data and the viewer's choices, again whenever one of them changes.

import { comparable, compareFigure, compareTable, pair, ratioCard } from "./compare.js";
import { renderAxes, renderFilters, renderPair, renderPrices, renderTabs } from "./controls.js";
import { details, frontierList } from "./details.js";
import { byId, copy, h, replace } from "./dom.js";
import { saveCsv } from "./files.js";
import { headline } from "./headline.js";
import { changesIn, changesTable, chosenLevel, historyFigure, historyLines } from "./history.js";
import { ladderFigure } from "./ladderfigure.js";
import { follow } from "./live.js";
import { groups, join, matching, price, selected } from "./model.js";
import { looks, theme } from "./palette.js";
import { Panel } from "./panel.js";
import { createStore } from "./state.js";
import { showProgress, showSource } from "./status.js";
import { placesOf, renderTable } from "./table.js";
import { onThemeChange } from "./theme.js";
import { hideTip } from "./tooltip.js";

const panels = new Map();
let data = null;
const store = createStore(() => render());

function render() {
  if (!data) return;
  const { state } = store;
  const empty = data.points.length === 0;
  document.body.dataset.view = state.view;
  byId("loading").hidden = true;
  byId("empty").hidden = !empty;
  const running = data.runs.some((run) => run.status === "running");
  byId("empty-idle").hidden = running;
  byId("empty-running").hidden = !running;
  byId("results").hidden = empty;
  showProgress(data);
  if (empty) return;
  hideTip();
  renderTabs(store);
  renderFilters(data, store);
  renderAxes(data, store);
  renderPrices(data, store);

  const points = state.view === "history" ? matching(data, state) : selected(data, state);
  const context = {
    data,
    state,
    compact: innerWidth < 640 || (state.view !== "compare" && groups(points).length > 1),
    looks: looks(data, state.colour),
    colours: theme(),
    places: placesOf(data, state, selected(data, state)),
  };
  byId("nothing").hidden = points.length > 0;
  byId("price-editor").hidden = state.view !== "cost";
  byId("unpriced").hidden =
    state.view !== "cost" || points.every((point) => price(data, state, point.series.hardware) !== null);
  byId("power-note").hidden = state.view !== "power";
  replace(byId("headline"), charted(state) && groups(points).length === 1 ? headline(data, state, points, pick) : []);
  drawPanels(context, points);
  renderTable(context, points, (sort) => store.set({ sort }));
  showDetails(context, points);
}

function drawPanels(context, points) {
  const figures = new Map();
  replace(byId("extra"), []);
  replace(byId("ratio"), []);
  byId("pair").hidden = context.state.view !== "compare";
  if (context.state.view === "compare") drawComparison(context, points, figures);
  else if (context.state.view === "history") {
    const found = groups(points);
    for (const group of found) figures.set(group.key, historyFigure({ ...context, group }));
    const lines = found.flatMap((group) => historyLines(group.points, chosenLevel(context.state, group.points)));
    replace(byId("extra"), changesTable(data, context.state, changesIn(data, context.state, lines)));
  } else if (context.state.view !== "table") {
    for (const group of groups(points)) figures.set(group.key, ladderFigure({ ...context, group }));
  }
  byId("extra").hidden = byId("extra").childElementCount === 0;

  for (const [key, panel] of panels) {
    if (figures.has(key)) continue;
    panel.remove();
    panels.delete(key);
  }
  const home = byId("panels");
  home.hidden = figures.size === 0;
  home.classList.toggle("many", figures.size > 1);
  for (const [key, figure] of figures) {
    if (!panels.has(key)) panels.set(key, new Panel(key, { onZoom: zoom, onPick: pick }));
    const panel = panels.get(key);
    if (panel.element.parentNode !== home) home.append(panel.element);
    panel.update(figure, context.state.zoom[key]);
  }
  showBusy(home);
  const summary = [...figures.values()].map((figure) => figure.summary).join(" ");
  if (byId("live-summary").textContent !== summary) byId("live-summary").textContent = summary;
}

let drawing = 0;

function showBusy(home) {
  const mine = (drawing += 1);
  home.setAttribute("aria-busy", "true");
  Promise.all([...panels.values()].map((panel) => panel.drawn)).then(() => {
    if (mine === drawing) home.setAttribute("aria-busy", "false");
  });
}

function drawComparison(context, points, figures) {
  const offered = comparable(data, context.state, points);
  const found = pair(context.state, offered);
  renderPair(store, offered, found);
  if (found.a && found.b) {
    const figure = compareFigure({ ...context, ...found });
    figures.set("comparison", figure);
    replace(byId("ratio"), ratioCard(figure.ratio, found));
    replace(byId("extra"), compareTable(data, context.state, found.a, found.b));
  } else {
    replace(
      byId("extra"),
      h(
        "p",
        { class: "empty-note" },
        "Two ladders of one model and scenario are needed, each with two points that count.",
      ),
    );
  }
}

const charted = ({ view }) => ["frontier", "cost", "power"].includes(view);

// The chosen point, or the list of the frontier beside a chart that has one.
function showDetails({ state, places }, points) {
  const point = data.pointsById.get(state.point) ?? null;
  const listed = charted(state);
  byId("side").hidden = point === null && !listed;
  document.body.classList.toggle("aside", point !== null || listed);
  byId("details-close").hidden = point === null;
  const panel = byId("details");
  const place = point && places.get(point.id);
  const signature = JSON.stringify(
    point ? [point, place, state.prices, data.prices, state.view] : [...places, state.view],
  );
  if (panel.dataset.signature === signature) return;
  panel.dataset.signature = signature;
  replace(
    byId("details-body"),
    point ? details(data, state, point, place) : frontierList(data, state, places, groups(points)),
  );
}

// Opens a point's details; focus goes there from the table and the keyboard, and back by Escape.
let opener = null;
function pick(id) {
  if (!data.pointsById.has(id)) return;
  opener = document.activeElement?.id ?? null;
  store.set({ point: id });
  byId("details").focus({ preventScroll: false });
}

function closeDetails() {
  store.set({ point: "" });
  if (opener) byId(opener)?.focus();
}

function zoom(key, range) {
  const { [key]: _, ...rest } = store.state.zoom;
  store.set({ zoom: range ? { ...rest, [key]: range } : rest });
}

if (matchMedia("(max-width: 640px)").matches) byId("filters").open = false;
// The address after "#" is the view's, so this link only moves the focus.
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("table-title").focus();
});
byId("details-close").addEventListener("click", closeDetails);
byId("clear").addEventListener("click", () => store.clearFilters());
byId("share").addEventListener("click", () => copy(location.href));
byId("csv").addEventListener("click", () =>
  saveCsv(
    data,
    store.state,
    store.state.view === "history" ? matching(data, store.state) : selected(data, store.state),
  ),
);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && byId("details").contains(document.activeElement)) closeDetails();
});
document.addEventListener("click", (event) => {
  const opened = event.target.closest("[data-point]");
  if (opened) pick(opened.dataset.point);
});
addEventListener("scroll", () => panels.forEach((panel) => panel.moved()), { passive: true });
onThemeChange(render);

function take(fresh) {
  data = join(fresh);
  render();
  performance.mark("skyline-data");
}

follow(take, (source) => {
  showSource(source);
  if (data) showProgress(data);
});
