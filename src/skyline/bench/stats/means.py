"""Means, shares and rates of one run, with intervals that know of serial correlation and of skewness."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import special

from skyline.bench.estimate import Estimate
from skyline.bench.stats.dependence import (
    Samples,
    critical,
    effective_size,
    long_run,
    series,
    skewness_of_mean,
    tail,
)


def mean(samples: Samples, confidence: float = 0.95) -> Estimate:
    """Of at least two samples in order of time; fewer are refused. Raises ValueError for non-finite ones.

    A t interval with the long-run variance, corrected for skewness: a mean of latencies falls short more often than it
    exceeds, and where it does its spread is underestimated too. The correction is the transformation of Hall (1992),
    On the Removal of Skewness by Transformation, J. Royal Statistical Society B 54, expanded to third order: Hall's own
    has a pole in its slope where skewness is strong, and intervals many times too wide there.
    """
    x = series(samples)
    if x.size < 2:
        return Estimate.refuse(f"a mean needs 2 samples, there {'is' if x.size == 1 else 'are'} {x.size}", x.size)
    # Squares of the largest numbers would overflow.
    size = float(np.abs(x).max()) or 1.0
    x = x / size
    found = long_run(x)
    value = float(x.mean())
    error = (found.variance / x.size) ** 0.5
    t = critical(confidence, found.df)
    skewness = skewness_of_mean(x, found)
    low = value - _without_skewness(t, skewness) * error
    high = value - _without_skewness(-t, skewness) * error
    if x.min() >= 0:
        low = max(low, 0.0)
    return Estimate(value=size * value, low=size * low, high=size * high, n=x.size)


def share(hits: Samples, confidence: float = 0.95) -> Estimate:
    """The share of true ones among booleans in order of time; refused where there is none.

    Wilson's interval (1927) with the effective number of samples. At 0 and 1 nothing shows whether hits would come
    in clusters; the samples are taken for independent there.
    """
    array = np.asarray(hits)
    if array.ndim != 1 or not np.all((array == 0) | (array == 1)):
        raise ValueError("hits must be a sequence of booleans")
    n = array.size
    if n == 0:
        return Estimate.refuse("a share needs at least 1 sample, there is none")
    found: npt.NDArray[np.bool_] = array.astype(np.bool_)
    p = float(found.mean())
    z2 = float(special.ndtri(1 - tail(confidence))) ** 2 / effective_size(found, confidence)
    centre = (p + z2 / 2) / (1 + z2)
    half = (z2 * p * (1 - p) + z2**2 / 4) ** 0.5 / (1 + z2)
    # At 0 and 1 rounding would leave an end a hair beside the value.
    return Estimate(value=p, low=max(min(centre - half, p), 0.0), high=min(max(centre + half, p), 1.0), n=n)


def rate(bins: Samples, bin_s: float, confidence: float = 0.95) -> Estimate:
    """Per second, from counts in consecutive bins of `bin_s` seconds, of which there must be at least two. `n` is the
    number of bins."""
    if not (np.isfinite(bin_s) and bin_s > 0):
        raise ValueError(f"bin_s must be a positive number of seconds, not {bin_s:g}")
    found = mean(series(bins, "bins"), confidence)
    if found.refused is not None:
        return Estimate.refuse(f"a rate needs 2 bins, there {'is' if found.n == 1 else 'are'} {found.n}", found.n)
    return found.scaled(1 / bin_s)


def _without_skewness(t: float, skewness: float) -> float:
    """What a t-ratio of t has become where the mean is skewed, from Hall's transformation to third order."""
    a = skewness / 6
    return t - a - 2 * a * t**2 + 20 / 3 * a**2 * t**3
