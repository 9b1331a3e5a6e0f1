"""Simulated servers whose true means, quantiles and rates are known, in plain numpy.

Each function gives one run in order of time, in its steady state from the first sample on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
from scipy import optimize, signal, special

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
    """Response times of M/M/1 with mean service time 1 s."""
    waiting = rng.exponential(1 / (1 - load)) if rng.random() < load else 0.0
    return responses(rng.exponential(size=n), rng.exponential(1 / load, size=n), waiting)


def responses(service: Floats, gaps: Floats, waiting: float) -> Floats:
    """Of a queue by Lindley's recursion, from what the first one waits."""
    # W₀ = waiting, Wᵢ₊₁ = max(0, Wᵢ + Uᵢ) is S − min(S₀ … Sᵢ, −waiting) with the partial sums S of U.
    sums = np.concatenate([[0.0], np.cumsum((service - gaps)[:-1])])
    return sums - np.minimum(np.minimum.accumulate(sums), -waiting) + service


def queue_mean(load: float) -> float:
    return 1 / (1 - load)


def queue_quantile(q: float, load: float) -> float:
    """Response times of M/M/1 are exponential."""
    return -math.log(1 - q) / (1 - load)


def constant_queue(rng: np.random.Generator, n: int, load: float) -> Floats:
    """Response times of M/D/1 with service time 1 s."""
    return responses(np.ones(n), rng.exponential(1 / load, size=n), _constant_waiting(rng, 1, load)[0])


def constant_queue_mean(load: float) -> float:
    """Pollaczek and Khinchine."""
    return 1 + load / (2 * (1 - load))


@lru_cache
def _constant_queue_responses(load: float) -> Floats:
    return np.sort(1 + _constant_waiting(np.random.default_rng(0), 2_000_000, load))


def constant_queue_quantile(q: float, load: float) -> float:
    """From two million independent ones, whose standard error is below 0.3 % of any run's here."""
    return float(np.quantile(_constant_queue_responses(load), q))


def _constant_waiting(rng: np.random.Generator, count: int, load: float) -> Floats:
    """A sum of uniform remainders, geometric in number (Pollaczek and Khinchine)."""
    return _sums(rng, count, load, lambda size: rng.random(size))


def heavy_queue(rng: np.random.Generator, n: int, load: float) -> Floats:
    """Response times of M/G/1 with lognormal service times of mean 1 s and σ = 1."""
    service = np.exp(rng.standard_normal(n) - 0.5)
    return responses(service, rng.exponential(1 / load, size=n), _heavy_waiting(rng, 1, load)[0])


def heavy_queue_mean(load: float) -> float:
    return 1 + load * math.e / (2 * (1 - load))


@lru_cache
def _heavy_queue_responses(load: float) -> Floats:
    rng = np.random.default_rng(0)
    waiting = _heavy_waiting(rng, 2_000_000, load)
    return np.sort(waiting + np.exp(rng.standard_normal(waiting.size) - 0.5))


def heavy_queue_quantile(q: float, load: float) -> float:
    """As `constant_queue_quantile`."""
    return float(np.quantile(_heavy_queue_responses(load), q))


def _heavy_waiting(rng: np.random.Generator, count: int, load: float) -> Floats:
    """What remains of a lognormal time is a uniform share of one that is chosen by its length."""
    return _sums(rng, count, load, lambda size: rng.random(size) * np.exp(rng.standard_normal(size) + 0.5))


def _sums(rng: np.random.Generator, count: int, load: float, remainders: Callable[[int], Floats]) -> Floats:
    numbers = rng.geometric(1 - load, size=count) - 1
    found: Floats = np.bincount(
        np.repeat(np.arange(count), numbers), weights=remainders(int(numbers.sum())), minlength=count
    ).astype(np.float64)
    return found


@dataclass(frozen=True)
class Bursts:
    """A queue of rate 1/s whose arrivals come in bursts: Poisson while they are on, which they are half of the time,
    for 10 s on average. Gaps between arrivals are then a mixture of two exponential ones, and response times are
    exponential of rate 1 − `delayed`, the share of arrivals that wait (GI/M/1)."""

    load: float

    def run(self, rng: np.random.Generator, n: int) -> Floats:
        fast, slow, share = self._gaps
        gaps = np.where(rng.random(n) < share, rng.exponential(1 / fast, n), rng.exponential(1 / slow, n))
        waiting = rng.exponential(1 / (1 - self.delayed)) if rng.random() < self.delayed else 0.0
        return responses(rng.exponential(size=n), gaps, waiting)

    @cached_property
    def delayed(self) -> float:
        """The root of σ = E exp(−(1 − σ) gap)."""
        fast, slow, share = self._gaps

        def excess(x: float) -> float:
            return share * fast / (fast + 1 - x) + (1 - share) * slow / (slow + 1 - x) - x

        return float(optimize.brentq(excess, 1e-9, 1 - 1e-7))

    @property
    def mean(self) -> float:
        return 1 / (1 - self.delayed)

    def quantile(self, q: float) -> float:
        return -math.log(1 - q) / (1 - self.delayed)

    @property
    def _gaps(self) -> tuple[float, float, float]:
        rate, switch = 2 * self.load, 0.1
        middle = rate / 2 + switch
        fast, slow = (middle + sign * math.sqrt(middle**2 - rate * switch) for sign in (1, -1))
        return fast, slow, (rate - slow) / (fast - slow)


def tokens(rng: np.random.Generator, bins: int, phi: float, per_bin: float = 50.0, swing: float = 0.1) -> Floats:
    """Tokens in each bin: Poisson around a level that swings slowly (AR(1) logarithm of deviation `swing`)."""
    level = per_bin * np.exp(swing * correlated_normal(rng, bins, phi) - swing**2 / 2)
    return rng.poisson(level).astype(np.float64)
