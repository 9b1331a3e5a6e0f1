"""What the page shows, as plain JSON: `page_data()`.

    metrics    {key: {title, unit, better, formula}} of every key that a point may hold
    runs       {id, label, suite, started, status, done, planned, last}, oldest first
    series     {id, config, hardware, engine, engine_version, model, precision, parallelism, devices, speculation,
               workload}; `config` is the same for all versions of an engine
    points     one level of one series in one run; replicates (`ids`) are combined. `series` is an index, `off` says why
               the point cannot be on a frontier (None if it can), `latest` whether no newer run has this level of its
               configuration. A metric is [value, low, high, n], and a fifth cell says why where the interval, or even
               the value, was refused
    frontiers  of the newest results, see frontier.py
    changes    over dates, see frontier.py
    prices     {hardware: $ per device-hour, or null}

Keys, tokens and passwords in commands and flags are left out (redact.py): the page is made to be published.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from skyline.bench import metrics
from skyline.bench.dashboard import frontier, redact
from skyline.bench.estimate import Estimate
from skyline.bench.hardware import price_of
from skyline.bench.loads import Level
from skyline.bench.results import AccuracyResult, PointResult, Run
from skyline.bench.standing import combined
from skyline.bench.suite import EngineSpec, PointSpec, Suite, Workload, single
from skyline.bench.wording import number_of

Json = dict[str, Any]

KEYS = metrics.keys()


def page_data(
    runs: Sequence[Run], points: Sequence[PointResult], accuracy: Sequence[AccuracyResult], prices: dict[str, float]
) -> Json:
    """The page's data (see above). Points and accuracy results whose run is not among `runs` are left out. `prices` are
    by pattern of the hardware's name, as `hardware.prices()` has them."""
    ordered = sorted(runs, key=lambda run: (run.started, run.id))
    suites = {run.id: run.suite for run in ordered}
    kept = _last_of_each(point for point in points if point.run in suites)
    gates = _gates(result for result in accuracy if result.run in suites)
    versions = _versions(kept)

    series: dict[tuple[Any, ...], Json] = {}
    shown: list[Json] = []
    for group in _replicates(kept):
        identity = _series(group[0], versions)
        found = series.setdefault(tuple(identity.values()), {**identity, "index": len(series)})
        gate = gates.get((group[0].run, group[0].spec.engine.name, group[0].spec.model.name), [])
        shown.append({**_point(group, gate, suites[group[0].run]), "series": found["index"]})
    rows = [_with_ids(identity) for identity in series.values()]
    place = {run.id: index for index, run in enumerate(ordered)}
    shown.sort(key=lambda point: (point["series"], place[point["run"]], point["level"]["order"], point["id"]))
    _mark_latest(shown, rows, place)

    return {
        "metrics": {key: _vocabulary(key) for key in KEYS},
        "runs": [_run(run, [point for point in kept if point.run == run.id]) for run in ordered],
        "series": rows,
        "points": shown,
        "frontiers": frontier.frontiers(shown, rows),
        "changes": frontier.changes_over_runs(shown, rows, place),
        "prices": {row["hardware"]: price_of(row["hardware"], prices) for row in rows},
    }


def _last_of_each(points: Iterable[PointResult]) -> list[PointResult]:
    """A resumed run measures failed points again: the last result of each counts. Oldest first."""
    found = {(point.run, point.key): point for point in sorted(points, key=lambda point: (point.finished, point.id))}
    return sorted(found.values(), key=lambda point: (point.started, point.id))


def _replicates(points: Iterable[PointResult]) -> list[list[PointResult]]:
    """Points of one run that differ in nothing but replicate and seed."""
    groups: dict[tuple[str, str], list[PointResult]] = defaultdict(list)
    for point in points:
        groups[point.run, _but_replicate(point.spec).key].append(point)
    return list(groups.values())


def _but_replicate(spec: PointSpec) -> PointSpec:
    return spec.model_copy(update={"replicate": 0, "seed": 0})


def _versions(points: Iterable[PointResult]) -> dict[tuple[str, str], str]:
    """What an engine of a run said of itself, also for its points that failed before it could say it."""
    return {
        (point.run, point.spec.engine.name): point.provenance.engine_version
        for point in points
        if point.provenance.engine_version
    }


def _series(point: PointResult, versions: dict[tuple[str, str], str]) -> Json:
    engine = point.spec.engine
    return {
        "hardware": point.provenance.hardware.name,
        "engine": engine.name,
        "engine_version": versions.get((point.run, engine.name)) or engine.version or "",
        "model": point.spec.model.name,
        "precision": engine.precision,
        "parallelism": _parallelism(engine),
        "devices": engine.devices,
        "speculation": engine.speculation,
        "workload": point.spec.workload.name,
    }


def _parallelism(engine: EngineSpec) -> str:
    sizes = {"TP": engine.tensor_parallel, "DP": engine.data_parallel, "EP": engine.expert_parallel}
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "none"


def _with_ids(identity: Json) -> Json:
    """Ids that stay the same from one store or export to the next, for links into the page."""
    fields = {name: value for name, value in identity.items() if name != "index"}
    without_version = {name: value for name, value in fields.items() if name != "engine_version"}
    return {"id": _short_hash(fields), "config": _short_hash(without_version), **fields}


def _short_hash(fields: Json) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:10]


def _gates(results: Iterable[AccuracyResult]) -> dict[tuple[str, str, str], list[AccuracyResult]]:
    """The last result of each task for (run, engine, model)."""
    last: dict[tuple[str, str, str, str], AccuracyResult] = {}
    for result in sorted(results, key=lambda result: (result.finished, result.id)):
        last[result.run, result.engine, result.model, result.task] = result
    found: dict[tuple[str, str, str], list[AccuracyResult]] = defaultdict(list)
    for (run, engine, model, _), result in last.items():
        found[run, engine, model].append(result)
    return found


def _point(group: list[PointResult], gate: list[AccuracyResult], suite: Suite) -> Json:
    """One shown point of all replicates of it. Those that went well count; if none did, those that were measured."""
    by_status = {status: [point for point in group if point.status == status] for status in ("ok", "invalid", "failed")}
    status = next(status for status in ("ok", "invalid", "failed") if by_status[status])
    counted = by_status[status]
    last = counted[-1]
    lost = [point for point in group if point.status != status]
    notes = []
    if lost:
        verb = "does" if len(lost) == 1 else "do"
        why = lost[0].reason or lost[0].status
        notes.append(f"{len(lost)} of {number_of(len(group), 'replicate')} {verb} not count: {why}")
    limited = next((point.client for point in counted if point.client and point.client.limited), None)
    spec = last.spec
    shown: Json = {
        "id": last.id,
        "ids": [point.id for point in group],
        "run": last.run,
        "level": {"label": spec.level.label, "kind": spec.level.kind, "order": _order(spec.level)},
        "status": status,
        "reason": last.reason,
        "notes": notes,
        "replicates": len(counted),
        "metrics": {key: _row(estimate) for key, estimate in combined(counted).items()},
        "client": None if last.client is None else (limited or last.client).model_dump(mode="json"),
        "cache": last.cache and last.cache.model_dump(mode="json"),
        "tokens": last.tokens and last.tokens.model_dump(mode="json"),
        "energy": last.energy and {"source": last.energy.source, **last.energy.verdict.model_dump(mode="json")},
        "window": last.window
        and {"seconds": last.window.seconds, "steady": last.window.steady, "reason": last.window.reason},
        "server": last.server and last.server.model_dump(mode="json"),
        "accuracy": _accuracy(gate),
        "started": last.started.isoformat(),
        "finished": last.finished.isoformat(),
        "workload": _describe(spec.workload),
        "source": spec.model.source,
        "engine_command": redact.command(last.provenance.engine_command or ""),
        "command": None if last.provenance.imported_from else f"skyline bench rerun {last.id}",
        "imported_from": last.provenance.imported_from,
        "packages": last.provenance.engine_packages,
        "machine": last.provenance.hardware.model_dump(mode="json", exclude={"flags", "name"}),
        "suite": _suite_of(spec, suite),
    }
    shown["off"] = _off(shown, limited.reason if limited else None)
    return shown


def _row(estimate: Estimate) -> list[Any]:
    row: list[Any] = [estimate.value, estimate.low, estimate.high, estimate.n]
    return [*row, estimate.refused] if estimate.refused is not None else row


def _accuracy(gate: list[AccuracyResult]) -> Json:
    fields = {"task", "exact_match", "standard_error", "total", "at_least", "passed", "reason"}
    verdict = "none" if not gate else "passed" if all(result.passed for result in gate) else "failed"
    return {"verdict": verdict, "tasks": [result.model_dump(mode="json", include=fields) for result in gate]}


def _off(point: Json, limited: str | None) -> str | None:
    """Why the point can be on no frontier, in a sentence."""
    if point["status"] != "ok":
        return f"{point['status']}: {point['reason'] or 'no reason was recorded'}"
    if limited is not None:
        return f"limited by the load generator: {limited}"
    failed = [task for task in point["accuracy"]["tasks"] if not task["passed"]]
    if not failed:
        return None
    task = failed[0]
    if task["exact_match"] is None:
        return f"accuracy gate: {task['task']} could not be evaluated: {task['reason'] or 'no reason was recorded'}"
    return f"accuracy gate: {task['exact_match']:.1%} on {task['task']}, {task['at_least']:.1%} is asked for"


def _order(level: Level) -> float:
    """Levels of a ladder from the lightest to the heaviest load."""
    return float(level.concurrency or level.rate or 0)


def _describe(workload: Workload) -> str:
    sizes = f"{number_of(workload.input, 'token')} in, {workload.output} out"
    if workload.ratio < 1:
        sizes += f", each from {workload.ratio:g} of that"
    if workload.sessions is not None:
        sizes += f", {workload.sessions.turns} turns after {number_of(workload.sessions.shared_prefix, 'shared token')}"
    return sizes + (", chat" if workload.chat else ", completions")


def _suite_of(spec: PointSpec, suite: Suite) -> Json:
    """The suite that measures this point again, without what is left to its defaults."""
    alone = single(spec, suite.accuracy)
    plain = alone.model_dump(mode="json", exclude_defaults=True)
    # By default it follows from the parallelism, and is not the default of the field.
    (engine,) = plain["engines"]
    return {**plain, "engines": [redact.engine({**engine, "devices": spec.engine.devices})]}


def _run(run: Run, points: list[PointResult]) -> Json:
    return {
        "id": run.id,
        "label": run.label,
        "suite": run.suite.name,
        "started": run.started.isoformat(),
        "status": run.status,
        "done": len(points),
        "planned": sum(1 for _ in run.suite.points()),
        "last": max((point.finished for point in points), default=run.started).isoformat(),
    }


def _mark_latest(points: list[Json], series: list[Json], place: dict[str, int]) -> None:
    """Level by level: a run that repeats one point, or is still under way, leaves the rest of the ladder in sight."""

    def what(point: Json) -> tuple[str, str]:
        return series[point["series"]]["config"], point["level"]["label"]

    newest: dict[tuple[str, str], int] = {}
    for point in points:
        newest[what(point)] = max(newest.get(what(point), -1), place[point["run"]])
    for point in points:
        point["latest"] = place[point["run"]] == newest[what(point)]


def _vocabulary(key: str) -> Json:
    metric = metrics.metric_of(key)
    title = metrics.title_of(key).replace(", p50", ", median")
    return {"title": title, "unit": metric.unit, "better": metric.better, "formula": metric.formula}
