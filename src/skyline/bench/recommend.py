"""The measured configuration with the most throughput under an objective. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import norm

from skyline.bench.estimate import Estimate
from skyline.bench.metrics import DISTRIBUTIONS, METRICS, STATISTICS, metric_of
from skyline.bench.results import AccuracyResult, PointResult

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
        metric = metric_of(self.key)
        amount = f"{1000 * self.limit:g} ms" if metric.unit == "s" else f"{self.limit:g} {metric.unit}"
        return f"{self.key} {'≤' if metric.better == 'lower' else '≥'} {amount}"

    def probability(self, estimate: Estimate | None) -> float:
        """That the limit is kept, reading the interval as a log-normal's 95 %; 0 where nothing is known."""
        if estimate is None or estimate.refused or estimate.value is None or estimate.value <= 0:
            return 0.0
        sign = 1.0 if metric_of(self.key).better == "lower" else -1.0
        margin = sign * (math.log(self.limit) - math.log(estimate.value))
        if not estimate.low or not estimate.high or estimate.low <= 0 or estimate.high <= estimate.low:
            return 1.0 if margin >= 0 else 0.0
        spread = (math.log(estimate.high) - math.log(estimate.low)) / (2 * norm.ppf(0.975))
        return float(norm.cdf(margin / spread))


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
    """`probability` that the point keeps the objective; `missing` says why it cannot be judged."""

    point: PointResult
    throughput: Estimate
    probability: float
    missing: str | None = None


def eligible(point: PointResult, accuracy: Sequence[AccuracyResult]) -> str | None:
    """Why a point must not stand on a frontier, or None."""
    if point.status != "ok":
        return point.reason or point.status
    if point.client is not None and point.client.limited:
        return point.client.reason
    for result in accuracy:
        asked = (result.run, result.engine, result.model) == (point.run, point.spec.engine.name, point.spec.model.name)
        if asked and not result.passed:
            return result.reason or "the accuracy gate was not passed"
    return None


def recommend(
    points: Sequence[PointResult],
    accuracy: Sequence[AccuracyResult],
    objective: Sequence[Limit],
    confidence: float = 0.5,
) -> tuple[list[Candidate], list[Candidate]]:
    """Points that keep the objective with at least that probability, most output per device first, and the others,
    likeliest first. Points that must not stand on a frontier are in neither."""
    keeping: list[Candidate] = []
    others: list[Candidate] = []
    for point in points:
        throughput = point.metrics.get("output_per_device")
        if eligible(point, accuracy) is not None or throughput is None or throughput.value is None:
            continue
        missing = None
        probability = 1.0
        for limit in objective:
            estimate = point.metrics.get(limit.key)
            if estimate is None or estimate.refused or estimate.value is None:
                missing = f"{limit.key}: {estimate.refused if estimate is not None else 'not measured'}"
            probability *= limit.probability(estimate)
        candidate = Candidate(point, throughput, probability, missing)
        (keeping if missing is None and probability >= confidence else others).append(candidate)
    keeping.sort(key=lambda c: -(c.throughput.value or 0.0))
    others.sort(key=lambda c: -c.probability)
    return keeping, others


assert DEFAULT_STATISTIC in STATISTICS
