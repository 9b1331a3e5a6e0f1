// The data joined and filtered: points with their series and run, groups that may be compared, ladders.

export function join(data) {
  const runs = new Map(data.runs.map((run, index) => [run.id, { ...run, index }]));
  const points = data.points.map((point) => ({
    ...point,
    series: data.series[point.series],
    run: runs.get(point.run),
  }));
  return {
    ...data,
    runsById: runs,
    points,
    pointsById: new Map(points.flatMap((point) => point.ids.map((id) => [id, point]))),
  };
}

// What each filter offers, in order of first appearance, so that nothing moves when something new is measured.
export function options(data) {
  const of = (field) => [...new Set(data.series.map((series) => series[field]))];
  return {
    model: of("model"),
    scenario: of("workload"),
    engine: of("engine"),
    hardware: of("hardware"),
    precision: of("precision"),
  };
}

// The chosen model or scenario; null stands for all.
export function chosen(data, state, name) {
  if (state[name] === "*") return null;
  const offered = options(data)[name];
  return offered.includes(state[name]) ? state[name] : offered[0];
}

// Every filter but the one of runs, which the history does without.
export function matching(data, state) {
  const model = chosen(data, state, "model");
  const scenario = chosen(data, state, "scenario");
  return data.points.filter(
    ({ series }) =>
      (model === null || series.model === model) &&
      (scenario === null || series.workload === scenario) &&
      ["engine", "hardware", "precision"].every(
        (name) => state[name].length === 0 || state[name].includes(series[name]),
      ),
  );
}

export function selected(data, state) {
  return matching(data, state).filter(
    (point) => state.run === "all" || (state.run === "latest" && point.latest) || state.run === point.run.id,
  );
}

// Only what was measured with one model under one workload may be compared.
export function groups(points) {
  const found = new Map();
  for (const point of points) {
    const { model, workload } = point.series;
    const key = `${model} · ${workload}`;
    if (!found.has(key)) found.set(key, { key, model, workload, points: [] });
    found.get(key).points.push(point);
  }
  return [...found.values()];
}

// A series from its lightest to its heaviest load; where all runs are shown, in each run on its own.
export function ladders(state, points) {
  const found = new Map();
  for (const point of points) {
    const key = state.run === "all" ? `${point.series.id}@${point.run.id}` : point.series.id;
    const { series, run, latest } = point;
    if (!found.has(key)) found.set(key, { key, series, run, latest, points: [] });
    found.get(key).points.push(point);
  }
  for (const ladder of found.values()) ladder.points.sort((a, b) => a.level.order - b.level.order);
  return [...found.values()];
}

export function price(data, state, hardware) {
  return state.prices[hardware] ?? data.prices[hardware] ?? null;
}

// A metric of a point as {value, low, high, n, refused}, or null where it is missing or its value is refused. `refused`
// says why nothing is known of the interval; without it and without ends the value is exact.
export function measure(data, state, point, key) {
  if (key === "cost_per_mtok") return cost(data, state, point);
  const row = point.metrics[key];
  return row && row[0] !== null
    ? { value: row[0], low: row[1], high: row[2], n: row[3], refused: row[4] ?? null }
    : null;
}

// Why there is no interval, or not even a value; null where nothing was refused.
export function refusal(data, state, point, key) {
  const found = measure(data, state, point, key);
  return found ? found.refused : (point.metrics[key]?.[4] ?? null);
}

// As metrics.cost_per_mtok has it, in the same order of operations. More throughput is less cost: the ends swap.
function cost(data, state, point) {
  const hourly = price(data, state, point.series.hardware);
  const output = measure(data, state, point, "output_throughput");
  if (hourly === null || output === null || output.value <= 0) return null;
  const at = (throughput) => ((hourly * point.series.devices) / 3600 / throughput) * 1e6;
  return inverse(output, at);
}

// What falls as the estimate grows, as 1 / x does: the ends change places. An interval that reaches zero has no inverse.
export function inverse(found, of = (value) => 1 / value) {
  const endless = found.low !== null && found.low <= 0;
  const end = (value) => (value === null || endless ? null : of(value));
  const refused = found.refused ?? (endless ? "its interval would be without an end" : null);
  return { ...found, value: of(found.value), low: end(found.high), high: end(found.low), refused };
}

// Why nothing is known of how sure a point's place is, or null.
export function unsure(data, state, point, keys) {
  for (const key of keys) {
    const refused = measure(data, state, point, key)?.refused;
    if (refused) return `${data.metrics[key].title}: ${refused}`;
  }
  return null;
}

// Why a point can be on no frontier with this axis, or null.
export function offReason(point, key) {
  if (point.off) return point.off;
  if (key === "tokens_per_mw" && point.energy?.status !== "valid") {
    return `energy: ${point.energy?.reason ?? "not measured"}`;
  }
  return null;
}

// The fields in which the data's series differ, in words, so that no name is longer than it must be.
export function seriesName(data, series, withVersion = true) {
  const differ = (field) => data.series.some((other) => other[field] !== series[field]);
  const parts = [withVersion ? `${series.engine} ${series.engine_version}`.trim() : series.engine];
  for (const field of ["hardware", "precision"]) if (differ(field)) parts.push(series[field]);
  for (const field of ["parallelism", "speculation"]) {
    if (differ(field) && series[field] !== "none") parts.push(series[field]);
  }
  return parts.join(" · ");
}

export const shortLevel = (level) =>
  level.kind === "closed" ? String(level.order) : level.kind === "trace" ? `${level.order}×` : `${level.order}/s`;
