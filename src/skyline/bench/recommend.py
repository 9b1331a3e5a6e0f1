"""The measured configuration with the most throughput under an objective. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy.special import ndtr, ndtri

from skyline.bench.estimate import Estimate
from skyline.bench.metrics import DISTRIBUTIONS, METRICS, STATISTICS, metric_of
from skyline.bench.results import AccuracyResult, PointResult
from skyline.bench.standing import combined, eligible, newest
from skyline.bench.stats import frontier as pareto

# What a bare name means: nine of ten requests keep to it.
DEFAULT_STATISTIC = "p90"

_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "": 1.0}
_QUANTITY = re.compile(r"^([0-9.]+(?:e[+-]?[0-9]+)?)\s*(s|ms|us)?$")


class ObjectiveError(ValueError):
    """The objective cannot be understood; the message says how to write it."""


@dataclass(frozen=True)
class Limit:
    """`key` at most `limit`, or at least where more is better. In the metric's unit."""

    key: str
    limit: float

    @property
    def text(self) -> str:
        return f"{self.key} {'≤' if metric_of(self.key).better == 'lower' else '≥'} {self._amount(self.limit)}"

    def _amount(self, value: float) -> str:
        unit = metric_of(self.key).unit
        return f"{1000 * value:.4g} ms" if unit == "s" else f"{value:.4g} {unit}"

    def unknown(self, estimate: Estimate | None) -> str | None:
        """Why it cannot be judged; None if it can."""
        if estimate is None:
            return f"{self.key}: not measured"
        if estimate.refused is None:
            return None
        value = "" if estimate.value is None else f" is {self._amount(estimate.value)}"
        return f"{self.key}{value}: {estimate.refused}"

    def kept_by_value(self, estimate: Estimate | None) -> bool:
        """Whether the value keeps the limit, however uncertain it is."""
        if estimate is None or estimate.value is None:
            return False
        lower = metric_of(self.key).better == "lower"
        return estimate.value <= self.limit if lower else estimate.value >= self.limit

    def probability(self, estimate: Estimate | None) -> float:
        """That the limit is kept, reading the interval as a log-normal's 95 %; 0 where nothing is known."""
        if estimate is None or estimate.refused or estimate.value is None or estimate.value <= 0:
            return 0.0
        sign = 1.0 if metric_of(self.key).better == "lower" else -1.0
        margin = sign * (math.log(self.limit) - math.log(estimate.value))
        if not estimate.low or not estimate.high or estimate.low <= 0 or estimate.high <= estimate.low:
            return 1.0 if margin >= 0 else 0.0
        spread = (math.log(estimate.high) - math.log(estimate.low)) / (2 * ndtri(0.975))
        return float(ndtr(margin / spread))


def parse_objective(text: str) -> list[Limit]:
    """`ttft=500ms,tpot=50ms`, `ttft_p99=2s,interactivity=20`. Raises ObjectiveError."""
    limits = []
    for part in text.split(","):
        name, equals, amount = (piece.strip() for piece in part.partition("="))
        key = f"{name}_{DEFAULT_STATISTIC}" if name in DISTRIBUTIONS else name
        try:
            metric = metric_of(key)
        except KeyError:
            known = ", ".join(n for n, m in METRICS.items() if m.kind != "rate" or n == "goodput_share")
            raise ObjectiveError(
                f"no metric {name!r}; write for example ttft=500ms,tpot_p99=50ms; there are {known}"
            ) from None
        match = _QUANTITY.match(amount)
        if not equals or match is None or (match.group(2) and metric.unit != "s"):
            raise ObjectiveError(
                f"{part!r} is not NAME=AMOUNT with an amount in {'s or ms' if metric.unit == 's' else metric.unit}"
            )
        limit = float(match.group(1)) * _UNITS[match.group(2) or ""]
        if not 0 < limit < math.inf:
            raise ObjectiveError(f"{part!r}: the amount must be above 0")
        limits.append(Limit(key, limit))
    return limits


@dataclass(frozen=True)
class Candidate:
    """A configuration at one level, by the newest run that has it. `point` is its last replicate of `replicates`.

    `probability` that it keeps the objective; `missing` says why that cannot be judged, and `by_value` whether its
    values keep it, however uncertain they are. `best`: the probability that none of those that keep it has more
    throughput; None where that is not known, or it does not keep the objective.
    """

    point: PointResult
    replicates: int
    throughput: Estimate
    probability: float
    missing: str | None = None
    by_value: bool = False
    best: float | None = None

    @property
    def label(self) -> str:
        spec = self.point.spec
        return " · ".join((spec.engine.name, spec.model.name, spec.workload.name, spec.level.label))


def recommend(
    points: Sequence[PointResult],
    accuracy: Sequence[AccuracyResult],
    objective: Sequence[Limit],
    confidence: float = 0.5,
) -> tuple[list[Candidate], list[Candidate]]:
    """Configurations that keep the objective with at least that probability, most output per device first, and the
    others, likeliest first, then those whose values keep it. Replicates are one candidate with their mean. What must
    not stand on a frontier is in neither, though an older run may have measured it well: the newest counts.
    """
    keeping: list[Candidate] = []
    others: list[Candidate] = []
    for replicates in newest(points):
        counted = [point for point in replicates if point.status == "ok"]
        if not counted or any(eligible(point, accuracy) is not None for point in counted):
            continue
        candidate = _judged(counted, objective)
        if candidate is not None:
            keeps = candidate.missing is None and candidate.probability >= confidence
            (keeping if keeps else others).append(candidate)
    keeping.sort(key=lambda c: -(c.throughput.value or 0.0))
    others.sort(key=lambda c: (-c.probability, not c.by_value, -(c.throughput.value or 0.0)))
    return _with_best(keeping), others


def _judged(replicates: Sequence[PointResult], objective: Sequence[Limit]) -> Candidate | None:
    """None where there is no throughput."""
    metrics = combined(replicates)
    throughput = metrics.get("output_per_device")
    if throughput is None or throughput.value is None:
        return None
    missing = "; ".join(why for limit in objective if (why := limit.unknown(metrics.get(limit.key))) is not None)
    by_value = all(limit.kept_by_value(metrics.get(limit.key)) for limit in objective)
    probability = math.prod(limit.probability(metrics.get(limit.key)) for limit in objective)
    last = max(replicates, key=lambda point: point.started)
    return Candidate(last, len(replicates), throughput, probability, missing or None, by_value)


def _with_best(candidates: Sequence[Candidate]) -> list[Candidate]:
    # On a frontier whose other axis is the same for all stands who has the most.
    same = Estimate(value=1.0)
    placed = pareto.frontier([pareto.Candidate(c.label, same, c.throughput) for c in candidates])
    return [replace(c, best=place.probability) for c, place in zip(candidates, placed, strict=True)]


assert DEFAULT_STATISTIC in STATISTICS
