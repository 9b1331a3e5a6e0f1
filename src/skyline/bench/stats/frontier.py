"""Which configurations no other beats, how surely, and the curve that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from skyline.bench.estimate import Estimate
from skyline.bench.stats.dependence import Floats


@dataclass(frozen=True)
class Candidate:
    """More is better on both axes. Ends of intervals are read as 95 % bounds."""

    name: str
    x: Estimate
    y: Estimate


@dataclass(frozen=True)
class Placed:
    """`on_frontier`: no other is at least as good on both axes and better on one, by the values. `probability`: how
    often that is so when all values are drawn from their intervals; None where that is not known."""

    name: str
    on_frontier: bool
    probability: float | None


def frontier(candidates: Sequence[Candidate], seed: int = 0, draws: int = 2000) -> list[Placed]:
    """One for each candidate, in their order. Where an axis has no value a candidate is off and beats nobody. Exact
    ties are all on.

    Values are drawn on the logarithmic scale from two half normals that meet at the value and have the interval's ends
    as their 2.5 % bounds, independently for each axis and candidate: noise that all share would not change who beats
    whom. A value that is exact is not moved; nor is one that is not positive, at the bottom of the scale.

    Where an interval was refused, nothing is known of the probability: of the candidate itself, and of those that its
    value beats. The others' are among the candidates whose intervals are known.
    """
    valued = [i for i, candidate in enumerate(candidates) if _valued(candidate)]
    known = [i for i, candidate in enumerate(candidates) if _known(candidate)]
    unknown = [i for i in valued if i not in set(known)]
    on: dict[int, bool] = {}
    probability: dict[int, float] = {}
    if valued:
        undominated = _undominated(*(_values([candidates[i] for i in valued], axis)[None, :] for axis in "xy"))[0]
        on = dict(zip(valued, undominated.tolist(), strict=True))
    if known:
        often = _undominated(*_drawn([candidates[i] for i in known], seed, draws)).mean(axis=0)
        beaten = _beaten([candidates[i] for i in known], [candidates[i] for i in unknown])
        of_each = zip(known, often.tolist(), beaten.tolist(), strict=True)
        probability = {i: share for i, share, hidden in of_each if not hidden}
    return [Placed(candidate.name, on.get(i, False), probability.get(i)) for i, candidate in enumerate(candidates)]


def band(
    candidates: Sequence[Candidate], xs: Sequence[float], seed: int = 0, draws: int = 2000
) -> list[tuple[float, float, float] | None]:
    """For each x: median, 2.5 % and 97.5 % bound of the highest y among points with at least that x, among the draws
    in which a point reaches it. None where no point's value does. Candidates whose intervals are not known are left
    out."""
    known = [candidate for candidate in candidates if _known(candidate)]
    if not known:
        return [None] * len(xs)
    reach = float(_values(known, "x").max())
    x, y = _drawn(known, seed, draws)
    found: list[tuple[float, float, float] | None] = []
    for at in np.log(np.maximum(np.asarray(xs, dtype=np.float64), np.finfo(np.float64).tiny)).tolist():
        highest = np.where(x >= at, y, -np.inf).max(axis=1)
        reached = (x >= at).any(axis=1)
        if at > reach or not reached.any():
            found.append(None)
        else:
            low, middle, high = np.exp(np.quantile(highest[reached], [0.025, 0.5, 0.975], method="nearest")).tolist()
            found.append((middle, low, high))
    return found


def _valued(candidate: Candidate) -> bool:
    return candidate.x.value is not None and candidate.y.value is not None


def _known(candidate: Candidate) -> bool:
    """Whether its spread is known too."""
    return _valued(candidate) and candidate.x.refused is None and candidate.y.refused is None


def _beaten(candidates: Sequence[Candidate], others: Sequence[Candidate]) -> npt.NDArray[np.bool_]:
    """Which of the candidates the value of one of the others beats."""
    x, y = (_values(candidates, axis)[:, None] for axis in "xy")
    over_x, over_y = (_values(others, axis)[None, :] for axis in "xy")
    beats = (over_x >= x) & (over_y >= y) & ((over_x > x) | (over_y > y))
    return np.asarray(beats.any(axis=1), dtype=np.bool_)


def _log(value: float | None) -> float:
    return float(np.log(value)) if value is not None and value > 0 else -np.inf


def _values(candidates: Sequence[Candidate], axis: str) -> Floats:
    return np.array([_log(getattr(candidate, axis).value) for candidate in candidates])


def _drawn(candidates: Sequence[Candidate], seed: int, draws: int) -> tuple[Floats, Floats]:
    """Logarithms of shape [draws, candidates] of either axis."""
    rng = np.random.default_rng(seed)
    drawn = []
    for axis in "xy":
        values = _values(candidates, axis)
        below, above = np.array([_spread(getattr(candidate, axis)) for candidate in candidates]).T
        normal = rng.standard_normal((draws, len(candidates)))
        drawn.append(values + np.where(normal < 0, below, above) * normal)
    return drawn[0], drawn[1]


def _spread(estimate: Estimate) -> tuple[float, float]:
    """Standard deviations of the logarithm below and above the value, 0 where it is exact. An end at 0, which has no
    logarithm, is taken to be as far as the other one."""
    value = _log(estimate.value)
    if estimate.low is None or estimate.high is None or value == -np.inf:
        return 0.0, 0.0
    bound = float(special.ndtri(0.975))
    above = (_log(estimate.high) - value) / bound
    below = (value - _log(estimate.low)) / bound if estimate.low > 0 else above
    return max(below, 0.0), max(above, 0.0)


def _undominated(x: Floats, y: Floats) -> npt.NDArray[np.bool_]:
    """[draws, candidates]: which of a row are on its frontier."""
    order = np.lexsort((-y, -x), axis=-1)
    x, y = np.take_along_axis(x, order, axis=1), np.take_along_axis(y, order, axis=1)
    # In this order whoever beats a point comes before it, and so do its exact ties.
    best_before = np.maximum.accumulate(np.pad(y, ((0, 0), (1, 0)), constant_values=-np.inf)[:, :-1], axis=1)
    on = y > best_before
    on[:, 0] = True
    tied = (x[:, 1:] == x[:, :-1]) & (y[:, 1:] == y[:, :-1])
    for place in np.flatnonzero(tied.any(axis=0)).tolist():
        on[:, place + 1] |= tied[:, place] & on[:, place]
    unsorted = np.empty_like(on)
    np.put_along_axis(unsorted, order, on, axis=1)
    return unsorted
