"""Which results count, and which are of the same configuration. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from skyline.bench.estimate import Estimate
from skyline.bench.results import AccuracyResult, PointResult
from skyline.bench.stats.replicates import combine


def eligible(point: PointResult, accuracy: Sequence[AccuracyResult]) -> str | None:
    """Why a point must not stand on a frontier, be compared or be followed; None if it may."""
    if point.status != "ok":
        return point.reason or point.status
    if point.client is not None and point.client.limited:
        return f"limited by the load generator: {point.client.reason}"
    for result in accuracy:
        asked = (result.run, result.engine, result.model) == (point.run, point.spec.engine.name, point.spec.model.name)
        if asked and not result.passed:
            return result.reason or "the accuracy gate was not passed"
    return None


def configuration(point: PointResult) -> Hashable:
    """What is measured again and again: the machine, the engine by its name in the suite, the model, precision,
    parallelism, speculation, workload and step of the ladder. Versions of an engine are one configuration."""
    spec, engine = point.spec, point.spec.engine
    return (
        point.provenance.hardware.name,
        engine.name,
        spec.model.name,
        engine.precision,
        (engine.tensor_parallel, engine.data_parallel, engine.expert_parallel, engine.devices),
        engine.speculation,
        spec.workload,
        spec.level,
    )


def newest(points: Iterable[PointResult]) -> list[list[PointResult]]:
    """The replicates of each configuration from the newest run that has it, well or badly measured."""
    found: dict[Hashable, dict[str, list[PointResult]]] = {}
    for point in points:
        found.setdefault(configuration(point), {}).setdefault(point.run, []).append(point)
    return [max(runs.values(), key=lambda group: max(point.started for point in group)) for runs in found.values()]


def combined(replicates: Sequence[PointResult]) -> dict[str, Estimate]:
    """Each metric over the replicates that have it."""
    keys = dict.fromkeys(key for point in replicates for key in point.metrics)
    return {key: combine([point.metrics[key] for point in replicates if key in point.metrics]) for key in keys}
