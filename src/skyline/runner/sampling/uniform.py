"""Random numbers as a pure function of (seed, position), so that a request never depends on its neighbours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output of SplitMix64 after advancing `state` once, elementwise (Steele, Lea, Flood, OOPSLA 2014)."""
    z = state + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits for each (seed, position); arrays [R], result float64 [R].

    The seed is hashed before the position is mixed in: neighbouring seeds must not give shifted copies of one stream.
    """
    bits = splitmix64(splitmix64(seeds) + positions * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
