"""Percentiles of one run, with intervals, and refused where there is too little to say anything."""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize, special, stats

from skyline.bench.estimate import Estimate
from skyline.bench.stats.dependence import Floats, Samples, effective_size, long_run, series, tail

# Serial correlation is measured at a level with at least so many samples beyond it.
SEEN_BEYOND = 20
# So many independent samples must be expected beyond a quantile; see `quantile`.
LEAST_BEYOND = 2.0


def required_samples(q: float) -> int:
    """The smallest n of which at least two lie beyond the q-quantile with 99 % probability (662 for p99).

    Beyond is above it for q ≥ 0.5 and below it otherwise. Raises ValueError outside (0, 1).
    """
    if not 0 < q < 1:
        raise ValueError(f"a quantile is between 0 and 1, not {q:g}")
    beyond = min(q, 1 - q)
    enough = 2
    while stats.binom.cdf(1, enough, beyond) > 0.01:
        enough *= 2
    short = enough // 2
    while enough - short > 1:
        middle = (short + enough) // 2
        if stats.binom.cdf(1, middle, beyond) > 0.01:
            short = middle
        else:
            enough = middle
    return enough


def quantile(samples: Samples, q: float, confidence: float = 0.95) -> Estimate:
    """The q-quantile of samples in order of time. Raises ValueError for non-finite ones.

    The value is the linearly interpolated order statistic (numpy's default). For the interval, the share of samples
    below the quantile is a mean of indicators; how many independent samples would tell it as well is estimated from
    their long-run variance (`dependence.effective_size`), and the share's interval is turned into one of the quantile
    (Woodruff 1952, Confidence Intervals for Medians and Other Position Measures, JASA 47) by fractional order
    statistics (Hutson 1999, Calculating Nonparametric Confidence Intervals for Quantiles Using Fractional Order
    Statistics, J. Applied Statistics 26), which are exact for independent samples up to interpolation.

    Refused below `required_samples(q)`, and where the samples are so correlated that fewer than 2 of the independent
    ones they are worth would be expected beyond the quantile. That is judged by the ranks, hence mostly by the body of
    the distribution. Judged by the tail, runs whose tail happens to be empty would pass and those that show it be
    refused: intervals that are right over all runs would be wrong over those that are reported. Close to that limit,
    they are in part, where excursions are long (tests/bench/stats/test_coverage.py has the figures).
    """
    x = series(samples)
    n = x.size
    name = f"p{100 * q:g}"
    needed = required_samples(q)
    outside = tail(confidence)
    if n < needed:
        return Estimate.refuse(f"{name} needs {needed} requests, there {'is' if n == 1 else 'are'} {n}", n)
    worth = n / long_run(stats.rankdata(x)).effect
    least = LEAST_BEYOND / min(q, 1 - q)
    if worth < least:
        return Estimate.refuse(
            f"{name} needs about {_round_up(n * least / worth)} requests as correlated as these {n}, which are worth "
            f"{worth:.0f} independent ones",
            n,
        )
    ordered = np.sort(x)
    value = float(np.quantile(ordered, q))
    level = float(np.clip(q, min(0.5, SEEN_BEYOND / n), max(0.5, 1 - SEEN_BEYOND / n)))
    effective = effective_size(x <= np.quantile(ordered, level), confidence)
    low = _order_statistic(ordered, effective, q, outside)
    high = _order_statistic(ordered, effective, q, 1 - outside)
    return Estimate(value=value, low=min(low, value), high=max(high, value), n=n)


def _order_statistic(ordered: Floats, effective: float, q: float, above: float) -> float:
    """The order statistic that exceeds the q-quantile with probability `above`, if `effective` of the samples were
    independent; the outermost one where it lies beyond.

    The k-th of m has the quantile of a Beta(k, m + 1 − k) variable for its level; k is real.
    """

    def miss(k: float) -> float:
        return float(special.betaincc(k, effective + 1 - k, q)) - above

    edge = 1e-9 * (effective + 1)
    ends = (edge, effective + 1 - edge)
    k = optimize.brentq(miss, *ends) if miss(ends[0]) < 0 < miss(ends[1]) else ends[int(miss(ends[1]) <= 0)]
    position = k / (effective + 1) * (ordered.size + 1) - 1
    return float(np.interp(position, np.arange(ordered.size), ordered))


def _round_up(x: float) -> int:
    """To two significant digits."""
    unit = 10 ** max(0, math.floor(math.log10(x)) - 1)
    return int(math.ceil(x / unit) * unit)
