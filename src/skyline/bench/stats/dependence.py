"""How much a serially correlated series is worth.

The variance of a mean of n samples is S / n, where S, the long-run variance, is the sum of all autocovariances; it is
the spectrum at frequency zero. It is estimated here as the mean of the first few squared cosine coefficients of the
series (equal-weighted cosines), which are nearly independent and each have expectation S, so that a mean over it has
Student's t distribution with as many degrees of freedom as there are cosines. This holds coverage where a bootstrap
over blocks, whose variance is too small by the same truncation and which has no t correction, does not.

Lazarus, Lewis, Stock, Watson (2018), HAR Inference: Recommendations for Practice, J. Business & Economic Statistics 36.
Müller (2014), HAC Corrections for Strongly Autocorrelated Time Series, same journal 32.

A congested queue is harder. A run that happens to hold few of its excursions has a small mean, a thin tail, a short
memory and a small S, all together (their logarithms are correlated by 0.8), and looks like a faster server's run that
was long enough. Two things follow. Where a run is correlated and short, the end of an interval that lies towards the
excursions is moved out (`far_tail`), the further the fewer independent samples it is worth: such runs are right or
wrong together, and the end must hold for the lucky ones too. And where it is worth too few, the interval is refused;
judged by ranks, hence mostly by the body of the distribution. The constants here are from simulated servers;
tests/bench/stats/test_coverage.py has the figures, and the limit of what can be had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft, special, stats

Floats = npt.NDArray[np.float64]
Samples = Sequence[float] | npt.NDArray[np.generic]

# With B cosines S is too small by about 0.82 (B / worth)² (for a spectrum as of an AR(1) process), which is 3 % at
# B = 0.18 worth. A queue's spectrum has a sharper peak. More than 12 would gain little: t is 2.18 there.
SHARE_OF_WORTH, SHARE_WHERE_CORRELATED = 0.18, 0.10
FEWEST, MOST = 3, 12
# Few cosines may all be small by chance: S is at least this share of what the autocovariances add up to.
LEAST_OF_SUM = 0.5
# No interval for a run that is worth fewer.
LEAST_WORTH = 15.0
# With so many independent samples expected on the sparser side, nothing is moved out.
MANY = 100.0
# What clusters of hits add to 1 / df, times their number where that is taken to be hits / effect. Exponential sizes
# make it 1.5 (E X⁴ is 6 E² X², and the effect is twice the mean size); those of congested queues have longer tails.
OF_CLUSTERS = 2.0
# How much more skewed than by the central limit theorem the mean of a queue with a long memory is taken to be, and the
# most that is corrected for.
QUEUE_SKEW, MOST_SKEW = 5.0, 0.45


@dataclass(frozen=True)
class Memory:
    """So many independent samples a series is `worth`, at most its length; `strength` is 1 − 1 / effect for the effect
    that its first autocorrelation alone would have: 0 where there is none, and close to 1 for long memories."""

    worth: float
    strength: float


@dataclass(frozen=True)
class LongRun:
    """`variance` is S, with `df` degrees of freedom; `effect` is S over the variance of one sample (the design effect):
    n samples tell as much as n / effect independent ones."""

    variance: float
    df: int
    effect: float


def series(samples: Samples, what: str = "samples") -> Floats:
    """`samples` as a 1-D array of floats. Raises ValueError where it is not, or where a value is not finite."""
    array = np.asarray(samples, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{what} must be a sequence of numbers, not an array of shape {array.shape}")
    wrong = int(np.count_nonzero(~np.isfinite(array)))
    if wrong:
        raise ValueError(f"{wrong} of {array.size} {what} are not finite; leave them out or count them as failed")
    return array


def tail(confidence: float) -> float:
    """The share on either side of a two-sided interval: 0.025 for 0.95. Raises ValueError outside (0, 1)."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence:g}")
    return (1 - confidence) / 2


def far_tail(confidence: float, memory: Memory, share: float = 0.5) -> float:
    """What is left out on the side of the excursions, of which `share` is the smaller part of the samples."""
    near = min(1.0, memory.worth * share / MANY)
    return float(tail(confidence) * near ** math.sqrt(memory.strength))


def critical(confidence: float, df: float) -> float:
    """Student's t for a two-sided interval."""
    return float(special.stdtrit(df, 1 - tail(confidence)))


def memory(x: Floats) -> Memory:
    """Of at least one sample in order of time, by ranks: one outlier does not hide how alike the rest is."""
    n = x.size
    effect, first = _sum_of_autocorrelations(stats.rankdata(x))
    return Memory(n / max(effect, 1.0), max(2 * first / (1 + first), 0.0))


def long_run(x: Floats, memory: Memory) -> LongRun:
    """Of at least two samples in order of time; `memory` is theirs, or that of what they are made of."""
    n = x.size
    deviation = x - x.mean()
    variance = float(np.mean(deviation**2))
    if _is_constant(x, variance):
        return LongRun(0.0, n - 1, 1.0)
    share = SHARE_OF_WORTH + (SHARE_WHERE_CORRELATED - SHARE_OF_WORTH) * memory.strength
    df = min(int(np.clip(share * memory.worth, FEWEST, MOST)), n - 1)
    effect, _ = _sum_of_autocorrelations(x)
    # A series that swings regularly has next to no power at low frequencies; no n samples are worth more than n².
    least = max(LEAST_OF_SUM * effect, 1 / n)
    found = max(float(np.mean(cosines(deviation)[:df] ** 2)) / variance, least)
    return LongRun(found * variance, df, found)


def effective_size(hits: npt.NDArray[np.bool_], confidence: float, memory: Memory) -> tuple[float, float]:
    """How many independent samples would tell the share of hits as well as these do in order of time: for the end of
    its interval away from the excursions, and for the end towards them.

    The design effect's own uncertainty is in it, by the factor (z / t)² of Korn & Graubard (1998), Confidence Intervals
    for Proportions with Small Expected Number of Positive Counts Estimated from Survey Data, Survey Methodology 24.
    Rare hits that come in clusters tell less about S than its cosines seem to: a few clusters' sizes are all there is.
    Where there are N of them with sizes X, that adds E X⁴ / (N E² X²) to the relative variance of S, which is 2 / df.
    This threatens the end towards the excursions only. A run whose clusters happen to be few or small makes S too small
    and has the truth on that side; one that has the truth on the other side has more than usual, and S is too large.
    """
    n = hits.size
    rarer = min(int(np.count_nonzero(hits)), n - int(np.count_nonzero(hits)))
    if n < 2 or rarer == 0:
        return float(n), float(n)
    found = long_run(hits.astype(np.float64), memory)
    clusters = rarer / max(found.effect, 1.0)
    df = 1 / (1 / found.df + OF_CLUSTERS * max(0.0, 1 - 1 / found.effect) / clusters)
    z = float(special.ndtri(1 - tail(confidence)))
    near, far = (n / found.effect * (z / critical(confidence, each)) ** 2 for each in (found.df, df))
    return near, far


def skewness_of_mean(x: Floats, found: LongRun, memory: Memory) -> float:
    """The third standardized cumulant of the mean of a serially correlated series, at most 0.45 in size.

    Clusters of n / n_eff equal samples would give the samples' own skewness / √n_eff. Queues have more, by 3.5 times at
    load 0.5, and runs that hold few excursions show too little of it: correlated series are taken for queues.
    """
    deviation = x - x.mean()
    variance = float(np.mean(deviation**2))
    if found.variance == 0:
        return 0.0
    plain = float(np.mean(deviation**3)) / variance**1.5 * (found.effect / x.size) ** 0.5
    return float(np.clip(plain * (1 + QUEUE_SKEW * memory.strength), -MOST_SKEW, MOST_SKEW))


def cosines(deviation: Floats) -> Floats:
    """Coefficients 1 … n − 1 of the orthonormal cosine transform; white noise of variance v gives each variance v."""
    transformed: Floats = fft.dct(deviation, type=2, norm="ortho")
    return transformed[1:]


def is_worth(n: int, memory: Memory, least: float) -> bool:
    """Whether n samples are worth `least`. A design effect of 2 may be chance among few, and does not refuse them."""
    return memory.worth >= min(least, n / 2)


def longer(n: int, worth: float, least: float) -> int:
    """How many samples like these n, worth too few, are worth `least`; to two significant digits, rounded up."""
    x = n * least / worth
    unit = 10 ** max(0, math.floor(math.log10(x)) - 1)
    return int(math.ceil(x / unit) * unit)


def _sum_of_autocorrelations(x: Floats) -> tuple[float, float]:
    """Over all lags of either sign, and the first. Pairs of lags are added while they are positive, and none counts for
    more than the one before (the initial monotone sequence of Geyer 1992, Practical Markov Chain Monte Carlo,
    Statistical Science 7). 1 and 0 for a constant series."""
    n = x.size
    deviation = x - x.mean()
    if _is_constant(x, float(np.mean(deviation**2))) or n < 4:
        return 1.0, 0.0
    spectrum = fft.rfft(deviation, fft.next_fast_len(2 * n, real=True))
    covariance = fft.irfft(np.abs(spectrum) ** 2, fft.next_fast_len(2 * n, real=True))[: n // 2 // 2 * 2]
    correlation = covariance / covariance[0]
    pairs = np.minimum.accumulate(correlation[0::2] + correlation[1::2])
    positive = pairs[pairs > 0]
    return 2 * float(positive.sum()) - 1, float(correlation[1])


def _is_constant(x: Floats, variance: float) -> bool:
    """Rounding leaves a constant series with a variance of its own."""
    return variance <= (1e-14 * float(np.max(np.abs(x)))) ** 2
