// How a point is measured again: by its id where its store is at hand, else by a suite that holds this point only.

const file = (point) => `suite-${point.id.slice(0, 12)}.yaml`;

// The command, or null for a point that another tool measured. A site of files is read far from the store.
export function repeatCommand(data, point) {
  if (point.imported_from) return null;
  return data.exported ? `skyline bench run ${file(point)}` : point.command;
}

// The suite as a file: {name, text}. JSON is YAML too.
export const suiteFile = (point) => ({ name: file(point), text: `${JSON.stringify(point.suite, null, 2)}\n` });

// What tells the point's configuration from others, with the engine's own options.
export function configuration(point) {
  const { series, suite } = point;
  const [engine] = suite.engines;
  const parts = [series.hardware, series.precision];
  for (const name of ["parallelism", "speculation"]) if (series[name] !== "none") parts.push(series[name]);
  const set = Object.entries(engine.env ?? {}).map(([name, value]) => `${name}=${value}`);
  return [...parts, [...set, ...(engine.args ?? [])].join(" ")].filter(Boolean).join(" · ");
}
