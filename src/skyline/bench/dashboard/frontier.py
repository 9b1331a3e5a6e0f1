"""Who is on the frontier, how surely, and what changed over dates: for the page's points (data.py).

A frontier is of one model under one workload: all hardware, engines and settings compete. It is computed here for the
newest result of every level of every configuration, which is what the page opens with; for what a viewer filters, picks
or prices, the page repeats the same computation in the browser (assets/statistics.js, tested against this).

    frontiers  [{model, workload, x, y, points: {id: [on, probability]}, band: [[x, middle, low, high], ...]}];
               the probability is None where it is not known
    changes    [{config, model, workload, level, metric, run, before, after, relative, p, regression}]; the new level
               begins with `run`
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

from skyline.bench import metrics
from skyline.bench.estimate import Estimate
from skyline.bench.stats import changepoint
from skyline.bench.stats import frontier as pareto

Json = dict[str, Any]

# (x, y): throughput per device against what one user sees, and tokens for energy.
AXES = (
    ("interactivity", "output_per_device"),
    ("ttft_p50", "output_per_device"),
    ("e2e_p50", "output_per_device"),
    ("interactivity", "tokens_per_mw"),
)
HISTORY = ("output_per_device", "interactivity", "ttft_p50", "e2e_p50")
BAND_STEPS = 60


def frontiers(points: list[Json], series: list[Json]) -> list[Json]:
    """The frontier of each model, workload and pair of axes, of the newest results that may be on one."""
    groups: dict[tuple[str, str], list[Json]] = defaultdict(list)
    for point in points:
        if point["latest"] and point["off"] is None:
            row = series[point["series"]]
            groups[row["model"], row["workload"]].append(point)
    found = []
    for (model, workload), members in sorted(groups.items()):
        for x, y in AXES:
            candidates = tuple(
                (point["id"], *pair) for point in members if (pair := _coordinates(point, x, y)) is not None
            )
            if candidates:
                on, band = _frontier(candidates, x)
                found.append({"model": model, "workload": workload, "x": x, "y": y, "points": on, "band": band})
    return found


def _coordinates(point: Json, x: str, y: str) -> tuple[Estimate, Estimate] | None:
    """Both as more-is-better: seconds become 1/s, which keeps the order."""
    if y == "tokens_per_mw" and (point["energy"] or {}).get("status") != "valid":
        return None
    pair = [_estimate(point, key) for key in (x, y)]
    if pair[0] is None or pair[1] is None:
        return None
    return (pair[0].inverted() if metrics.metric_of(x).better == "lower" else pair[0]), pair[1]


def _estimate(point: Json, key: str) -> Estimate | None:
    value, low, high, n, *refused = point["metrics"].get(key, [None] * 4)
    if value is None or value <= 0:
        return None
    return Estimate(value=value, low=low, high=high, n=n, refused=refused[0] if refused else None)


# A running benchmark changes one group at a time; the others are not computed again.
@functools.lru_cache(maxsize=1024)
def _frontier(
    rows: tuple[tuple[str, Estimate, Estimate], ...], x: str
) -> tuple[dict[str, list[Any]], list[list[float]]]:
    candidates = [pareto.Candidate(name, first, second) for name, first, second in rows]
    on: dict[str, list[Any]] = {
        placed.name: [placed.on_frontier, placed.probability] for placed in pareto.frontier(candidates)
    }
    values = [first.value for _, first, _ in rows if first.value is not None]
    least, most = min(values), max(values)
    # Equal ratios, so that 1/x is covered as evenly as x.
    steps = [least * (most / least) ** (step / (BAND_STEPS - 1)) for step in range(BAND_STEPS)]
    inverse = metrics.metric_of(x).better == "lower"
    band = [
        [1 / at if inverse else at, *map(float, found)]
        for at, found in zip(steps, pareto.band(candidates, steps), strict=True)
        if found is not None
    ]
    return on, band


def changes_over_runs(points: list[Json], series: list[Json], place: dict[str, int]) -> list[Json]:
    """Changes in the history of every configuration and level, newest first. `place` orders the runs."""
    histories: dict[tuple[str, str], list[Json]] = defaultdict(list)
    for point in points:
        if point["off"] is None:
            histories[series[point["series"]]["config"], point["level"]["label"]].append(point)
    found = []
    for (config, level), members in histories.items():
        members.sort(key=lambda point: place[point["run"]])
        row = series[members[-1]["series"]]
        for metric in HISTORY:
            dated = [(point["run"], value) for point in members if (value := point["metrics"].get(metric, [None])[0])]
            for change in _changes(tuple(value for _, value in dated), metrics.metric_of(metric).better):
                found.append(
                    {
                        "config": config,
                        "model": row["model"],
                        "workload": row["workload"],
                        "level": level,
                        "metric": metric,
                        "run": dated[change.index][0],
                        "before": change.before,
                        "after": change.after,
                        "relative": change.relative,
                        "p": change.p,
                        "regression": change.regression,
                    }
                )
    return sorted(found, key=lambda change: (-place[change["run"]], change["config"], change["level"]))


@functools.lru_cache(maxsize=20_000)
def _changes(values: tuple[float, ...], better: str) -> tuple[changepoint.Change, ...]:
    return tuple(changepoint.changes(list(values), better))
