// The frontier drawn as what the project is named after.

import { axes } from "./frame.js";
import { fade } from "./palette.js";

// The band, and the frontier as a row of towers: what lies under its steps is beaten by a point at a corner.
export function skyline(data, state, on, box, colours) {
  const { x, y } = axes(state);
  const upward = data.metrics[y].better === "higher";
  const floor = state.logy ? box.y[0] / 1.6 : 0;
  const first = state.logx ? box.x[0] / 1.15 : 0;
  const last = box.x[1] * 1.04;
  const steps = [];
  on.path.forEach((corner, index) => {
    // More is better on x: a tower reaches from the corner to the left, and its neighbour on the right is lower.
    if (data.metrics[x].better === "higher") {
      if (index === 0) steps.push([first, corner.y]);
      steps.push([corner.x, corner.y]);
      if (index + 1 < on.path.length) steps.push([corner.x, on.path[index + 1].y]);
    } else {
      if (index > 0) steps.push([corner.x, on.path[index - 1].y]);
      steps.push([corner.x, corner.y]);
      if (index + 1 === on.path.length) steps.push([last, corner.y]);
    }
  });
  const common = { type: "scatter", hoverinfo: "skip", showlegend: false, mode: "lines" };
  const traces = [];
  if (upward) {
    const outline = [[steps[0][0], floor], ...steps, [steps.at(-1)[0], floor]];
    traces.push({
      ...common,
      x: outline.map(([at]) => at),
      y: outline.map(([, at]) => at),
      fill: "toself",
      fillcolor: fade(colours.tower, 0.1),
      fillpattern: {
        shape: ".",
        size: 14,
        solidity: 0.05,
        fgcolor: fade(colours.window, 0.55),
        bgcolor: fade(colours.tower, 0.1),
      },
      line: { width: 0 },
    });
  }
  if (state.bands && on.band.length > 1) {
    // Beyond the slowest point nothing changes: the band goes on to the edge, as the frontier does.
    const edge = data.metrics[x].better === "higher" ? first : last;
    const rows = [[edge, ...on.band[0].slice(1)], ...on.band];
    const stepped = rows.flatMap((row, index) => (index === 0 ? [row] : [[rows[index - 1][0], ...row.slice(1)], row]));
    const back = stepped.toReversed();
    traces.push({
      ...common,
      x: [...stepped, ...back].map((row) => row[0]),
      y: [...stepped.map((row) => row[3]), ...back.map((row) => row[2])],
      fill: "toself",
      fillcolor: fade(colours.accent, 0.22),
      line: { width: 0 },
      name: "95 % band of the frontier",
      showlegend: true,
    });
  }
  traces.push({
    ...common,
    x: steps.map(([at]) => at),
    y: steps.map(([, at]) => at),
    line: { color: colours.frontier, width: 2.2 },
    name: "Frontier",
    showlegend: true,
  });
  traces.push({
    ...common,
    mode: "markers",
    x: on.path.map((corner) => corner.x),
    y: on.path.map((corner) => corner.y),
    marker: { size: 24, color: fade(colours.window, 0.4) },
    cliponaxis: false,
  });
  return traces;
}
