"""Means, shares and rates of one run, with intervals that know of serial correlation and of skewness."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import special

from skyline.bench.estimate import Estimate
from skyline.bench.stats.dependence import (
    LEAST_WORTH,
    Samples,
    effective_size,
    far_tail,
    is_worth,
    long_run,
    longer,
    memory,
    series,
    skewness_of_mean,
    tail,
)


def mean(samples: Samples, confidence: float = 0.95) -> Estimate:
    """Of at least two samples in order of time; fewer are refused. Raises ValueError for non-finite ones.

    A t interval with the long-run variance, corrected for skewness: a mean of latencies falls short more often than it
    exceeds, and where it does its spread is underestimated too. The correction is the transformation of Hall (1992),
    On the Removal of Skewness by Transformation, J. Royal Statistical Society B 54, expanded to third order: Hall's own
    has a pole in its slope where skewness is strong, and intervals many times too wide there. The end on the side of
    the skewness is further out where the samples are correlated and worth few (`dependence.far_tail`).

    Where they are worth too few, the interval is refused, and the value, which is a fact about the run, is not.
    """
    x = series(samples)
    n = x.size
    outside = tail(confidence)
    if n < 2:
        return Estimate.refuse(f"a mean needs 2 samples, there {'is' if n == 1 else 'are'} {n}", n)
    # Squares of the largest numbers would overflow.
    size = float(np.abs(x).max()) or 1.0
    x = x / size
    value = float(x.mean())
    kept = memory(x)
    if not is_worth(n, kept, LEAST_WORTH):
        return Estimate(
            value=size * value,
            n=n,
            refused=f"an interval needs about {longer(n, kept.worth, LEAST_WORTH)} samples as correlated as these {n}, "
            f"which are worth {kept.worth:.0f} independent ones",
        )
    found = long_run(x, kept)
    error = (found.variance / n) ** 0.5
    skewness = skewness_of_mean(x, found, kept)
    near, far = special.stdtrit(found.df, [1 - outside, 1 - far_tail(confidence, kept)]).tolist()
    below, above = (near, far) if skewness >= 0 else (far, near)
    low = value - _without_skewness(below, skewness) * error
    high = value - _without_skewness(-above, skewness) * error
    if x.min() >= 0:
        low = max(low, 0.0)
    return Estimate(value=size * value, low=size * low, high=size * high, n=n)


def share(hits: Samples, confidence: float = 0.95) -> Estimate:
    """The share of true ones among booleans in order of time; refused where there is none.

    Wilson's interval (1927) with the effective number of samples, its end towards one half further out where the hits
    are correlated and worth few (`dependence.far_tail`). At 0 and 1 nothing shows whether hits would come in clusters;
    the samples are taken for independent there.
    """
    array = np.asarray(hits)
    if array.ndim != 1 or not np.all((array == 0) | (array == 1)):
        raise ValueError("hits must be a sequence of booleans")
    n = array.size
    if n == 0:
        return Estimate.refuse("a share needs at least 1 sample, there is none")
    found: npt.NDArray[np.bool_] = array.astype(np.bool_)
    p = float(found.mean())
    kept = memory(found.astype(np.float64))
    sizes = effective_size(found, confidence, kept)
    near, far = zip(sizes, (tail(confidence), far_tail(confidence, kept, min(p, 1 - p))), strict=True)
    (size_below, below), (size_above, above) = (near, far) if p < 0.5 else (far, near)
    # At 0 and 1 rounding would leave an end a hair beside the value.
    low = min(_wilson(p, size_below, float(special.ndtri(below))), p)
    high = max(_wilson(p, size_above, -float(special.ndtri(above))), p)
    return Estimate(value=p, low=max(low, 0.0), high=high, n=n)


def rate(bins: Samples, bin_s: float, confidence: float = 0.95) -> Estimate:
    """Per second, from counts in consecutive bins of `bin_s` seconds, of which there must be at least two. `n` is the
    number of bins. Bins that are too correlated have a value without an interval, as in `mean`."""
    if not (np.isfinite(bin_s) and bin_s > 0):
        raise ValueError(f"bin_s must be a positive number of seconds, not {bin_s:g}")
    found = mean(series(bins, "bins"), confidence)
    if found.value is None:
        return Estimate.refuse(f"a rate needs 2 bins, there {'is' if found.n == 1 else 'are'} {found.n}", found.n)
    return found.scaled(1 / bin_s)


def _wilson(p: float, n: float, z: float) -> float:
    """The end of Wilson's interval that is z standard errors below (z < 0) or above the share p of n."""
    share = z**2 / n
    return (p + share / 2 + math.copysign((share * p * (1 - p) + share**2 / 4) ** 0.5, z)) / (1 + share)


def _without_skewness(t: float, skewness: float) -> float:
    """What a t-ratio of t has become where the mean is skewed, from Hall's transformation to third order."""
    a = skewness / 6
    return t - a - 2 * a * t**2 + 20 / 3 * a**2 * t**3
