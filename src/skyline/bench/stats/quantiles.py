"""Percentiles of one run, with intervals, and refused where there is too little to say anything."""

from __future__ import annotations

import numpy as np
from scipy import optimize, special, stats

from skyline.bench.estimate import Estimate
from skyline.bench.stats.dependence import (
    LEAST_WORTH,
    Floats,
    Samples,
    effective_size,
    far_tail,
    is_worth,
    longer,
    memory,
    series,
    tail,
)

# Serial correlation is measured at a level with at least so many samples beyond it.
SEEN_BEYOND = 20
# An interval needs samples that are worth this share of the independent ones that are needed. The rest of them is for
# the noise in what samples are worth: independent ones must pass.
LEAST_OF_REQUIRED = 0.8


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

    Its end away from the median (the upper one of the median itself) is further out where the samples are correlated
    and worth few (`dependence.far_tail`).

    Refused below `required_samples(q)`. Where the samples are so correlated that they are worth less than that, only
    the interval is; the value, which is a fact about the run, is not: a server that stalls once correlates its requests
    by that, and its p99 must be seen. What samples are worth is judged by ranks (`dependence.memory`). Judged by the
    tail, runs whose tail happens to be empty would pass and those that show it be refused.
    """
    x = series(samples)
    n = x.size
    name = f"p{100 * q:g}"
    needed = required_samples(q)
    outside = tail(confidence)
    if n < needed:
        return Estimate.refuse(f"{name} needs {needed} requests, there {'is' if n == 1 else 'are'} {n}", n)
    beyond = min(q, 1 - q)
    kept = memory(x)
    ordered = np.sort(x)
    value = float(np.quantile(ordered, q))
    least = max(LEAST_WORTH, LEAST_OF_REQUIRED * needed)
    if not is_worth(n, kept, least):
        return Estimate(
            value=value,
            n=n,
            refused=f"{name} needs about {longer(n, kept.worth, least)} requests as correlated as "
            f"these {n}, which are worth {kept.worth:.0f} independent ones",
        )
    level = float(np.clip(q, min(0.5, SEEN_BEYOND / n), max(0.5, 1 - SEEN_BEYOND / n)))
    sizes = effective_size(x <= np.quantile(ordered, level), confidence, kept)
    near, far = zip(sizes, (outside, far_tail(confidence, kept, beyond)), strict=True)
    (size_below, below), (size_above, above) = (near, far) if q >= 0.5 else (far, near)
    low = _order_statistic(ordered, size_below, q, below)
    high = _order_statistic(ordered, size_above, q, 1 - above)
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
