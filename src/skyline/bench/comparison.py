"""Two configurations measured in turns, and what their difference is worth."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from skyline.bench.metrics import metric_of
from skyline.bench.results import AccuracyResult, PointResult
from skyline.bench.standing import eligible
from skyline.bench.stats.compare import EXIT_CODES, Comparison, Pair
from skyline.bench.suite import EngineSpec, PointSpec, Suite, SuiteError
from skyline.bench.wording import number_of

# One for each axis of the frontier, and what a user feels first.
DEFAULT_METRICS = ("output_per_device", "interactivity", "ttft_p50")
# What does not matter, where the user does not say: as much as a machine disagrees with itself, within these. A loss of
# 5 % matters on any machine; where it cannot be seen, that is to be said.
LEAST_MARGIN, MOST_MARGIN = 0.02, 0.05


def paired_suite(suite: Suite, a: str, b: str, pairs: int) -> Suite:
    """The suite with these two of its engines only, each ladder measured `pairs` times by both. Raises SuiteError."""
    engines = {engine.name: engine for engine in suite.engines}
    chosen: list[EngineSpec] = []
    for name in (a, b):
        if name not in engines:
            raise SuiteError(f"the suite has no engine {name!r}; it has {', '.join(engines)}")
        chosen.append(engines[name])
    if a == b:  # A/A: how far a machine disagrees with itself
        chosen[1] = chosen[1].model_copy(update={"name": f"{b} again"})
    return suite.model_copy(
        update={
            "engines": chosen,
            "measure": suite.measure.model_copy(update={"replicates": pairs}),
            "exclude": [rule for rule in suite.exclude if rule.get("engine") in (None, a, b)],
        }
    )


def in_turns(points: Iterable[PointSpec]) -> list[PointSpec]:
    """A B B A A B B A …: neighbours in time are compared, and drift takes both sides equally. Neighbours of one side
    serve twice from one start, and say how far a side disagrees with itself."""
    by_replicate: dict[int, list[PointSpec]] = defaultdict(list)
    for point in points:
        by_replicate[point.replicate].append(point)
    ordered: list[PointSpec] = []
    for replicate, specs in sorted(by_replicate.items()):
        names = list(dict.fromkeys(spec.engine.name for spec in specs))
        if replicate % 2:
            names.reverse()
        for name, model in itertools.product(names, dict.fromkeys(spec.model.name for spec in specs)):
            ordered += [spec for spec in specs if (spec.engine.name, spec.model.name) == (name, model)]
    return ordered


def counted(points: Iterable[PointResult], accuracy: Sequence[AccuracyResult]) -> tuple[list[PointResult], list[str]]:
    """Those that may stand on a frontier, and why each of the others does not count."""
    kept, left_out = [], []
    for point in points:
        why = eligible(point, accuracy)
        if why is None:
            kept.append(point)
        else:
            left_out.append(f"{point.spec.label}: {why}")
    return kept, left_out


def default_margin(floor: float | None) -> float:
    """The relative difference that does not matter, on a machine with this noise floor, or an unknown one."""
    return MOST_MARGIN if floor is None else min(max(LEAST_MARGIN, floor), MOST_MARGIN)


def pairs_of(
    a: Sequence[PointResult], b: Sequence[PointResult], metrics: Sequence[str] = DEFAULT_METRICS
) -> tuple[list[Pair], list[str]]:
    """The pairs that both sides measured, by model, scenario, level and metric; and what is missing on one side. Of
    points that count (`counted`)."""
    left, right = _by_place(a), _by_place(b)
    pairs, missing = [], []
    for place in dict.fromkeys([*left, *right]):
        alone: dict[str, list[str]] = {}
        for metric in metrics:
            values_a, values_b = _values(left.get(place, {}), metric), _values(right.get(place, {}), metric)
            both = sorted(values_a.keys() & values_b.keys())
            name = " · ".join((*place, metric))
            if both:
                better = metric_of(metric).better
                pairs.append(Pair(name, [values_a[i] for i in both], [values_b[i] for i in both], better))
            why = _without_counterpart(values_a, values_b)
            if why is not None:
                alone.setdefault(why, []).append(metric)
        for why, lost in alone.items():
            which = [] if len(lost) == len(metrics) else [", ".join(lost)]
            missing.append(f"{' · '.join((*place, *which))}: {why}")
    return pairs, missing


def beyond_reach(comparison: Comparison, a: Sequence[PointResult], b: Sequence[PointResult]) -> Comparison:
    """The comparison, undecided where it would pass B though A has levels that B has not: an engine that crashes at
    one has nothing there that could be worse."""
    there = _by_place(b)
    lost = [" · ".join(place) for place in _by_place(a) if place not in there]
    if not lost or EXIT_CODES[comparison.verdict] != 0:
        return comparison
    advice = f"nothing of B counts at {'; '.join(lost)}, where A was measured"
    return dataclasses.replace(comparison, verdict="undecided", advice=advice)


def _without_counterpart(a: Mapping[int, float], b: Mapping[int, float]) -> str | None:
    if not a and not b:
        return "measured by neither side"
    only = [(side, len(mine.keys() - other)) for side, mine, other in (("A", a, b), ("B", b, a))]
    said = [f"{number_of(count, 'replicate')} of {side} alone" for side, count in only if count]
    return ", ".join(said) or None


def self_pairs(a: Sequence[PointResult], b: Sequence[PointResult], metric: str) -> list[Pair]:
    """What the two sides say about themselves, as A/A pairs: measurements of one side that followed each other when
    they were taken `in_turns`. Those are replicates 1 and 2, 3 and 4, … of the first side and 0 and 1, 2 and 3, … of
    the second.
    """
    left, right = _by_place(a), _by_place(b)
    found = []
    for place in dict.fromkeys([*left, *right]):
        earlier, later = [], []
        for values, begin in ((_values(left.get(place, {}), metric), 1), (_values(right.get(place, {}), metric), 0)):
            for i in range(begin, max(values, default=0), 2):
                if i in values and i + 1 in values:
                    earlier.append(values[i])
                    later.append(values[i + 1])
        if earlier:
            found.append(Pair(" · ".join((*place, metric)), earlier, later, metric_of(metric).better))
    return found


def _by_place(points: Sequence[PointResult]) -> dict[tuple[str, str, str], dict[int, PointResult]]:
    places: dict[tuple[str, str, str], dict[int, PointResult]] = {}
    for point in points:
        spec = point.spec
        place = (spec.model.name, spec.workload.name, spec.level.label)
        places.setdefault(place, {})[spec.replicate] = point
    return places


def _values(by_replicate: dict[int, PointResult], metric: str) -> dict[int, float]:
    return {i: value for i, point in by_replicate.items() if (value := point.value(metric)) is not None}
