"""Simulated servers whose true means, quantiles and rates are known, in plain numpy.

Each function gives one run in order of time, in its steady state from the first sample on.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import signal, special

Floats = npt.NDArray[np.float64]


def correlated_normal(rng: np.random.Generator, n: int, phi: float) -> Floats:
    """AR(1) with standard normal marginals."""
    steps = rng.standard_normal(n) * math.sqrt(1 - phi**2)
    steps[0] /= math.sqrt(1 - phi**2)
    found: Floats = signal.lfilter([1.0], [1.0, -phi], steps)
    return found


def closed_loop(rng: np.random.Generator, n: int, phi: float, sigma: float = 0.5) -> Floats:
    """Lognormal latencies of median 1 s whose logarithms follow an AR(1) process: clients that wait for one another."""
    latencies: Floats = np.exp(sigma * correlated_normal(rng, n, phi))
    return latencies


def closed_loop_mean(sigma: float = 0.5) -> float:
    return math.exp(sigma**2 / 2)


def closed_loop_quantile(q: float, sigma: float = 0.5) -> float:
    return math.exp(sigma * float(special.ndtri(q)))


def queue(rng: np.random.Generator, n: int, load: float) -> Floats:
    """Response times of M/M/1 with mean service time 1 s, by Lindley's recursion from a stationary start."""
    service = rng.exponential(size=n)
    gaps = rng.exponential(1 / load, size=n)
    waiting = rng.exponential(1 / (1 - load)) if rng.random() < load else 0.0
    # W₀ = waiting, Wᵢ₊₁ = max(0, Wᵢ + Uᵢ) is S − min(S₀ … Sᵢ, −waiting) with the partial sums S of U.
    sums = np.concatenate([[0.0], np.cumsum((service - gaps)[:-1])])
    return sums - np.minimum(np.minimum.accumulate(sums), -waiting) + service


def queue_mean(load: float) -> float:
    return 1 / (1 - load)


def queue_quantile(q: float, load: float) -> float:
    """Response times of M/M/1 are exponential."""
    return -math.log(1 - q) / (1 - load)


def tokens(rng: np.random.Generator, bins: int, phi: float, per_bin: float = 50.0, swing: float = 0.1) -> Floats:
    """Tokens in each bin: Poisson around a level that swings slowly (AR(1) logarithm of deviation `swing`)."""
    level = per_bin * np.exp(swing * correlated_normal(rng, bins, phi) - swing**2 / 2)
    return rng.poisson(level).astype(np.float64)
