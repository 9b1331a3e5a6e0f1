// The statistics that depend on what the viewer picks, by simulation as skyline.bench.stats.frontier has it: each value
// is drawn on the logarithmic scale from two half normals that meet at the value and have its interval's ends as their
// 2.5 % bounds; one without interval is exact, unless the interval was refused: then nothing is known of its spread, and
// nothing is said that depends on it. Draws are seeded: one view has one number.

const DRAWS = 2000;
const Z95 = 1.959963984540054;

// Mulberry32, a small generator of 2³² states:
// https://gist.github.com/tommyettinger/46a874533244883189143505d203312c
function uniform(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

// Box and Muller (1958).
export function normals(seed) {
  const next = uniform(seed);
  return () => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next());
}

// Standard deviations of the logarithm below and above the value. An end at 0 is taken to be as far as the other one.
function spread({ value, low, high }) {
  if (low === null || high === null || !(value > 0)) return null;
  const above = Math.max(0, Math.log(high / value) / Z95);
  return [low > 0 ? Math.max(0, Math.log(value / low) / Z95) : above, above];
}

const known = ({ x, y }) => !x.refused && !y.refused;

function draw({ value }, deviations, normal) {
  if (deviations === null) return value;
  const distance = normal();
  return value * Math.exp(distance * deviations[distance < 0 ? 0 : 1]);
}

export function quantile(sorted, share) {
  const at = (sorted.length - 1) * share;
  const below = Math.floor(at);
  const above = Math.min(below + 1, sorted.length - 1);
  return sorted[below] + (sorted[above] - sorted[below]) * (at - below);
}

// Indices of the points that none beats: no other is at least as good in both and better in one. More is better.
export function pareto(xs, ys) {
  const order = [...xs.keys()].sort((a, b) => xs[b] - xs[a] || ys[b] - ys[a]);
  const found = [];
  let best = -Infinity;
  for (let start = 0; start < order.length;) {
    let end = start;
    while (end < order.length && xs[order[end]] === xs[order[start]]) end += 1;
    const most = ys[order[start]];
    if (most > best) found.push(...order.slice(start, end).filter((index) => ys[index] === most));
    best = Math.max(best, most);
    start = end;
  }
  return found;
}

// Candidates {x, y} of estimates, both more-is-better. Returns who is on the frontier, how often in the draws, and the
// best y at least at each of `grid` as [middle, low, high], among the draws that reach it; null where no value does.
// Only candidates whose intervals are known are drawn; the others and those that their values beat have probability
// null.
export function frontier(candidates, grid, seed = 0) {
  const normal = normals(seed);
  const drawn = candidates.filter(known);
  const others = candidates.filter((candidate) => !known(candidate));
  const deviations = drawn.map(({ x, y }) => [spread(x), spread(y)]);
  const hits = new Map(drawn.map((candidate) => [candidate, 0]));
  const heights = grid.map(() => []);
  const reach = Math.max(...drawn.map(({ x }) => x.value));
  for (let round = 0; round < DRAWS && drawn.length > 0; round += 1) {
    const xs = drawn.map(({ x }, index) => draw(x, deviations[index][0], normal));
    const ys = drawn.map(({ y }, index) => draw(y, deviations[index][1], normal));
    const members = pareto(xs, ys);
    for (const index of members) hits.set(drawn[index], hits.get(drawn[index]) + 1);
    // The highest y that reaches x is always one of the frontier's.
    grid.forEach((at, step) => {
      let best = -Infinity;
      for (const index of members) if (xs[index] >= at && ys[index] > best) best = ys[index];
      if (best > -Infinity) heights[step].push(best);
    });
  }
  const on = new Set(
    pareto(
      candidates.map(({ x }) => x.value),
      candidates.map(({ y }) => y.value),
    ),
  );
  return {
    on: candidates.map((_, index) => on.has(index)),
    probability: candidates.map((candidate) =>
      known(candidate) && !others.some((other) => beats(other, candidate)) ? hits.get(candidate) / DRAWS : null,
    ),
    band: heights.map((found, step) => {
      if (grid[step] > reach || found.length === 0) return null;
      found.sort((a, b) => a - b);
      return [0.5, 0.025, 0.975].map((share) => quantile(found, share));
    }),
  };
}

const beats = (a, b) =>
  a.x.value >= b.x.value && a.y.value >= b.y.value && (a.x.value > b.x.value || a.y.value > b.y.value);

// y of a ladder at x, on straight lines between its points; null outside.
function along(xs, ys, at) {
  const order = [...xs.keys()].sort((a, b) => xs[a] - xs[b]);
  for (let step = 0; step + 1 < order.length; step += 1) {
    const [left, right] = [order[step], order[step + 1]];
    if (xs[left] <= at && at <= xs[right]) {
      const part = xs[right] === xs[left] ? 0 : (at - xs[left]) / (xs[right] - xs[left]);
      return ys[left] + (ys[right] - ys[left]) * part;
    }
  }
  return null;
}

// Ladder a's y by ladder b's at equal x: {grid, ratios: [[value, low, high] or null], mean: [value, low, high]}. `mean`
// is the geometric mean over the grid. Null where the ladders have no x in common; ends are null where an interval of
// either was refused.
export function ladderRatio(a, b, steps = 40, seed = 0) {
  const range = (ladder) => ladder.map(({ x }) => x.value);
  const low = Math.max(Math.min(...range(a)), Math.min(...range(b)));
  const high = Math.min(Math.max(...range(a)), Math.max(...range(b)));
  if (!(high > low)) return null;
  const grid = Array.from({ length: steps }, (_, step) => low + ((high - low) * step) / (steps - 1));
  const normal = normals(seed);
  const once = (values) => {
    const [top, bottom] = [a, b].map((ladder) => [ladder.map((p) => values(p.x)), ladder.map((p) => values(p.y))]);
    return grid.map((at) => {
      const [over, under] = [along(...top, at), along(...bottom, at)];
      return over === null || under === null ? null : over / under;
    });
  };
  const draws = grid.map(() => []);
  const means = [];
  const rounds = [...a, ...b].every(known) ? DRAWS : 0;
  for (let round = 0; round < rounds; round += 1) {
    const ratios = once((estimate) => draw(estimate, spread(estimate), normal));
    ratios.forEach((ratio, step) => ratio !== null && draws[step].push(ratio));
    means.push(geometricMean(ratios));
  }
  const value = once((estimate) => estimate.value);
  return {
    grid,
    ratios: value.map((ratio, step) => (ratio === null ? null : withEnds(ratio, draws[step]))),
    mean: withEnds(geometricMean(value), means.filter(Number.isFinite)),
  };
}

function geometricMean(ratios) {
  const known = ratios.filter((ratio) => ratio !== null);
  return Math.exp(known.reduce((sum, ratio) => sum + Math.log(ratio), 0) / known.length);
}

function withEnds(value, found) {
  if (found.length < DRAWS / 2) return [value, null, null];
  found.sort((p, q) => p - q);
  return [value, quantile(found, 0.025), quantile(found, 0.975)];
}

// a / b of two independent estimates. Distances of the ends add in quadrature on the logarithmic scale (MOVER: Zou and
// Donner 2008, Construction of confidence limits about effect measures, Statistics in Medicine 27).
export function quotient(a, b) {
  const value = a.value / b.value;
  const refused = a.refused || b.refused;
  if (refused) return { value, low: null, high: null, refused };
  const [top, bottom] = [spread(a), spread(b)];
  if (top === null && bottom === null) return { value, low: null, high: null };
  const [topBelow, topAbove] = top ?? [0, 0];
  const [bottomBelow, bottomAbove] = bottom ?? [0, 0];
  return {
    value,
    low: value * Math.exp(-Z95 * Math.hypot(topBelow, bottomAbove)),
    high: value * Math.exp(Z95 * Math.hypot(topAbove, bottomBelow)),
  };
}
