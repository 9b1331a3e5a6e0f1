// The frontier of what is shown: as it came with the data where that is of the same points, else computed here.

import { inverse } from "./model.js";
import { frontier } from "./statistics.js";

const STEPS = 60;
const remembered = new Map();

// Candidates: [{id, x, y}] of estimates. Returns {points: Map of id to {on, probability}, path: the frontier's corners
// from left to right, band: [[x, middle, low, high]]}.
export function frontierOf(data, group, keys, candidates) {
  if (candidates.length === 0) return { points: new Map(), path: [], band: [] };
  const found = shipped(data, group, keys, candidates) ?? computed(data, keys, candidates);
  const path = candidates
    .filter(({ id }) => found.points.get(id).on)
    .map(({ x, y }) => ({ x: x.value, y: y.value }))
    .sort((a, b) => a.x - b.x || a.y - b.y);
  return { ...found, path };
}

function shipped(data, group, { x, y }, candidates) {
  const entry = data.frontiers.find(
    (other) => other.model === group.model && other.workload === group.workload && other.x === x && other.y === y,
  );
  if (!entry || Object.keys(entry.points).length !== candidates.length) return null;
  if (!candidates.every(({ id }) => id in entry.points)) return null;
  const points = Object.entries(entry.points).map(([id, [on, probability]]) => [id, { on, probability }]);
  return { points: new Map(points), band: entry.band };
}

function computed(data, { x, y }, candidates) {
  const signature = JSON.stringify([x, y, candidates]);
  if (remembered.has(signature)) return remembered.get(signature);
  const flip = { x: data.metrics[x].better === "lower", y: data.metrics[y].better === "lower" };
  // Seconds and dollars become their inverse, which keeps the order and makes more better.
  const turned = candidates.map((candidate) => ({
    x: flip.x ? inverse(candidate.x) : candidate.x,
    y: flip.y ? inverse(candidate.y) : candidate.y,
  }));
  const values = turned.map((candidate) => candidate.x.value);
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const grid = Array.from({ length: STEPS }, (_, step) => least * (most / least) ** (step / (STEPS - 1)));
  const found = frontier(turned, grid);
  const band = found.band.flatMap((row, step) => {
    if (row === null) return [];
    const [middle, low, high] = flip.y ? [1 / row[0], 1 / row[2], 1 / row[1]] : row;
    return [[flip.x ? 1 / grid[step] : grid[step], middle, low, high]];
  });
  const points = candidates.map(({ id }, index) => [
    id,
    { on: found.on[index], probability: found.probability[index] },
  ]);
  const result = { points: new Map(points), band };
  if (remembered.size > 50) remembered.clear();
  remembered.set(signature, result);
  return result;
}
