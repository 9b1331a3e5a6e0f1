"""How much a serially correlated series is worth, from its lowest frequencies.

The variance of a mean of n samples is S / n, where S, the long-run variance, is the sum of all autocovariances; it is
the spectrum at frequency zero. It is estimated here as the mean of the first few squared cosine coefficients of the
series (equal-weighted cosines), which are nearly independent and each have expectation S, so that a mean over it has
Student's t distribution with as many degrees of freedom as there are cosines. This holds coverage where a bootstrap
over blocks, whose variance is too small by the same truncation and which has no t correction, does not.

Lazarus, Lewis, Stock, Watson (2018), HAR Inference: Recommendations for Practice, J. Business & Economic Statistics 36.
Müller (2014), HAC Corrections for Strongly Autocorrelated Time Series, same journal 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import fft, special

Floats = npt.NDArray[np.float64]
Samples = Sequence[float] | npt.NDArray[np.generic]

# A first guess of S is of the 5 lowest cosines. With B of them S is too small by about 0.82 (B / n_eff)² (for a
# spectrum as of an AR(1) process), which is 3 % at B = 0.18 n_eff. More than 12 would gain little: t is 2.18 there.
PILOT = 5
SHARE_OF_EFFECTIVE = 0.18
FEWEST, MOST = 3, 12
# Frequencies up to the 16th enter the skewness.
SKEW_COSINES = 16


@dataclass(frozen=True)
class LongRun:
    """`variance` is S, with `df` degrees of freedom; `effect` is S over the variance of one sample (the design effect):
    n samples are worth n / effect independent ones."""

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


def critical(confidence: float, df: float) -> float:
    """Student's t for a two-sided interval."""
    return float(special.stdtrit(df, 1 - tail(confidence)))


def long_run(x: Floats) -> LongRun:
    """Of at least two samples in order of time."""
    n = x.size
    deviation = x - x.mean()
    variance = float(np.mean(deviation**2))
    # Rounding leaves a constant series with a variance of its own.
    if variance <= (1e-14 * float(np.max(np.abs(x)))) ** 2:
        return LongRun(0.0, n - 1, 1.0)
    power = cosines(deviation) ** 2
    pilot = float(power[:PILOT].mean())
    effective = min(float(n), n * variance / pilot) if pilot > 0 else float(n)
    df = min(int(np.clip(SHARE_OF_EFFECTIVE * effective, FEWEST, MOST)), n - 1)
    # A series that swings regularly has next to no power at low frequencies; no n samples are worth more than n².
    found = max(float(power[:df].mean()), variance / n)
    return LongRun(found, df, found / variance)


def effective_size(hits: npt.NDArray[np.bool_], confidence: float) -> float:
    """How many independent samples would tell the share of hits as well as these do in order of time.

    The design effect's own uncertainty is in it, by the factor (z / t)² of Korn & Graubard (1998), Confidence Intervals
    for Proportions with Small Expected Number of Positive Counts Estimated from Survey Data, Survey Methodology 24.
    Rare hits that come in clusters tell less about S than its cosines seem to: a few clusters' sizes are all there is.
    Their number therefore limits the degrees of freedom too (the factor 2 is from simulated queues).
    """
    n = hits.size
    rarer = min(int(np.count_nonzero(hits)), n - int(np.count_nonzero(hits)))
    if n < 2 or rarer == 0:
        return float(n)
    found = long_run(hits.astype(np.float64))
    clusters = rarer / max(found.effect, 1.0)
    df = 1 / (1 / found.df + 2 * max(0.0, 1 - 1 / found.effect) / clusters)
    z = float(special.ndtri(1 - tail(confidence)))
    return n / found.effect * (z / critical(confidence, df)) ** 2


def skewness_of_mean(x: Floats, found: LongRun) -> float:
    """The third standardized cumulant of the mean of a serially correlated series, at most 1 in size.

    Clusters of n / n_eff equal samples would give the samples' own skewness / √n_eff. Queues have more: the products of
    cosine coefficients j, k and j + k (the bispectrum near zero) show how much, and are kept within 1 and 3.5 times
    that, beyond which they are noise.
    """
    deviation = x - x.mean()
    variance = float(np.mean(deviation**2))
    highest = min(SKEW_COSINES, x.size - 1)
    if found.variance == 0 or highest < 2:
        return 0.0
    plain = float(np.mean(deviation**3)) / variance**1.5 * (found.effect / x.size) ** 0.5
    c = cosines(deviation)[:highest]
    j, k = _triples(highest)
    scale = float(np.mean(c**2)) ** 1.5
    bispectral = 2**0.5 * float(np.mean(c[j] * c[k] * c[j + k + 1])) / scale if scale > 0 else 0.0
    sign = -1.0 if plain < 0 else 1.0
    return sign * min(float(np.clip(sign * bispectral, abs(plain), 3.5 * abs(plain))), 1.0)


def cosines(deviation: Floats) -> Floats:
    """Coefficients 1 … n − 1 of the orthonormal cosine transform; white noise of variance v gives each variance v."""
    transformed: Floats = fft.dct(deviation, type=2, norm="ortho")
    return transformed[1:]


@lru_cache
def _triples(highest: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Zero-based j ≤ k of all frequencies with (j + 1) + (k + 1) ≤ highest."""
    j, k = np.triu_indices(highest)
    kept = j + k + 2 <= highest
    return j[kept], k[kept]
