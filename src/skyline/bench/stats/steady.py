"""Where the warm-up ends, and whether what follows stands still."""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from skyline.bench.stats.dependence import Floats, Samples, long_run, memory, series
from skyline.bench.wording import number_of

BATCH = 5
# The halves' means are compared from so many samples on.
LEAST = 16


def truncation(samples: Samples) -> int:
    """How many samples at the start to leave out, at most half of them: MSER-5.

    The cut is where the standard error of the mean of what follows, taken for independent, is least; a transient makes
    it larger than the samples that are lost with it. In batches of 5 (White 1997, An Effective Truncation Heuristic for
    Bias Reduction in Simulation Output, Simulation 69; White, Cobb, Spratt 2000, A Comparison of Five Steady-State
    Truncation Heuristics for Simulation, Winter Simulation Conference).
    """
    x = series(samples)
    batches = x[: x.size // BATCH * BATCH].reshape(-1, BATCH).mean(axis=1)
    m = batches.size
    if m < 2:
        return 0
    batches = batches - batches.mean()
    # Of the last m, m − 1, … batches.
    count = np.arange(m, 0, -1)
    sums = np.cumsum(batches[::-1])[::-1]
    squares = np.cumsum(batches[::-1] ** 2)[::-1]
    error = np.maximum(squares - sums**2 / count, 0) / count**2
    return BATCH * int(np.argmin(error[: m // 2 + 1]))


def little(running_mean: float, rate: float, residence_mean: float) -> float:
    """L / (λ·W), 1 in a steady state: requests under way on average, by those that end per second times the mean
    seconds of one (Little 1961, A Proof for the Queuing Formula L = λW, Operations Research 9). Raises ValueError
    unless all are positive."""
    if not (running_mean > 0 and rate > 0 and residence_mean > 0):
        raise ValueError(
            f"Little's law needs requests under way, that end and that last: L = {running_mean:g}, "
            f"λ = {rate:g}/s, W = {residence_mean:g} s"
        )
    return running_mean / (rate * residence_mean)


def is_steady(
    samples: Samples, ratio: float | None = None, drift: float = 0.05, tolerance: float = 0.1, alpha: float = 0.01
) -> tuple[bool, str]:
    """Whether a series (after truncation) stands still, and why.

    Not if the mean of its second half differs from that of its first by more than the share `drift`, and by more than
    chance explains at level `alpha`; nor if Little's `ratio` is further than `tolerance` from 1. Short series that
    drift by chance as much are given the benefit of the doubt.
    """
    x = series(samples)
    if ratio is not None and not abs(ratio - 1) <= tolerance:
        return False, f"Little's law is off: requests under way / (rate · residence) = {ratio:.2f}"
    if x.size < LEAST:
        return True, f"{number_of(x.size, 'sample')} {'is' if x.size == 1 else 'are'} too few to see a drift"
    first, second = np.array_split(x, 2)
    change = float(second.mean() - first.mean())
    relative = change / abs(float(first.mean())) if first.mean() else math.copysign(math.inf, change) if change else 0.0
    p = _same_mean(first, second)
    said = f"{relative:+.1%} from the first half to the second (p = {p:.2g})"
    if abs(relative) > drift and p < alpha:
        return False, f"it drifts: {said}"
    return True, said


def _same_mean(first: Floats, second: Floats) -> float:
    """Two-sided p of Welch's t test with long-run variances. A drift within the halves only makes it larger."""
    parts = [(run.variance / half.size, run.df) for half in (first, second) for run in [long_run(half, memory(half))]]
    variance = math.fsum(part for part, _ in parts)
    change = abs(float(second.mean() - first.mean()))
    if variance == 0:
        return 0.0 if change > 0 else 1.0
    df = variance**2 / math.fsum(part**2 / df for part, df in parts)
    return 2 * float(special.stdtr(df, -change / math.sqrt(variance)))
