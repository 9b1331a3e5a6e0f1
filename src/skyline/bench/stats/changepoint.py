"""Since when a recurring measurement has changed.

Intervals of many lengths are searched for the split whose two sides differ most (seeded binary segmentation: Kovács,
Bühlmann, Li, Munk 2023, Biometrika 110), so that a bump is found that a split of the whole series would not show. Two
sides are compared by Student's t, twice: without the highest sample of the higher side, and without the lowest of the
lower one; the smaller t counts. A single outlier can therefore make no change, whichever side it falls on, and two
dates at a new level can. The largest of all these statistics is tested as one, against the same search over simulated
noise, so that a series of up to 120 dates without a change raises a false alarm with probability alpha, however often
it is split; longer ones do for each further 60 dates.

MongoDB and Apache Otava use E-divisive means (Matteson & James 2014, JASA 109) with permutations or t tests (Daly et
al. 2020; Fleming et al. 2023, both ICPE). A permutation test of six dates cannot fall below p = 1/15 for the best
split, and one test after another has no overall error rate; this has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import special

from skyline.bench.stats.dependence import Floats, series

Indices = npt.NDArray[np.intp]

# More dates are searched in stretches of so many, each from the middle of the one before.
LONGEST = 120
SIMULATIONS = 999
# Nightly results have heavier tails than the normal distribution; noise is simulated with those of Student's t.
NOISE_DF = 5
SHRINK = 2**-0.5


@dataclass(frozen=True)
class Change:
    """The new level begins with values[index]. `before` and `after` are medians of the levels around it, `relative` =
    after / before − 1 (infinite from 0). `p` is that noise alone would show as much anywhere in the searched part."""

    index: int
    before: float
    after: float
    relative: float
    p: float
    regression: bool


def changes(
    values: Sequence[float], better: str, min_segment: int = 2, alpha: float = 0.01, minimal: float = 0.02
) -> list[Change]:
    """The changes of a series in order of date, of which `better` says which way is good ("higher" or "lower").

    A level lasts at least `min_segment` dates, which is how soon a large change can be found. Levels that differ by
    less than the share `minimal` are one. Noise is taken for independent from date to date. Raises ValueError for
    values that are not finite, and for min_segment below 2.
    """
    if better not in ("higher", "lower"):
        raise ValueError(f'better must be "higher" or "lower", not {better!r}')
    if min_segment < 2:
        raise ValueError("min_segment must be at least 2: a single value may be an outlier")
    x = series(values, "values")
    found: dict[int, float] = {}
    _search(x, 0, x.size, min_segment, alpha, found)
    while found:
        levels = _levels(x, sorted(found))
        sizes = {index: abs(_relative(before, after)) for index, before, after in levels}
        smallest = min(sizes, key=lambda index: sizes[index])
        if sizes[smallest] >= minimal:
            break
        del found[smallest]
    if not found:
        return []
    return [
        Change(
            index=index,
            before=before,
            after=after,
            relative=_relative(before, after),
            p=found[index],
            regression=(after < before) == (better == "higher"),
        )
        for index, before, after in _levels(x, sorted(found))
    ]


def _levels(x: Floats, found: Sequence[int]) -> list[tuple[int, float, float]]:
    edges = [0, *found, x.size]
    medians = [float(np.median(x[begin:end])) for begin, end in pairwise(edges)]
    return [(index, *around) for index, around in zip(found, pairwise(medians), strict=True)]


def _relative(before: float, after: float) -> float:
    if before == 0:
        return math.inf if after > 0 else -math.inf if after < 0 else 0.0
    return (after - before) / abs(before)


def _search(x: Floats, begin: int, end: int, least: int, alpha: float, found: dict[int, float]) -> None:
    """Adds the changes within x[begin:end] to `found`, with their p."""
    p, at = min((_tested(x, *stretch, least) for stretch in _stretches(begin, end)), default=(1.0, begin))
    if p < alpha:
        found[at] = p
        _search(x, begin, at, least, alpha, found)
        _search(x, at, end, least, alpha, found)


def _stretches(begin: int, end: int) -> list[tuple[int, int]]:
    if end - begin <= LONGEST:
        return [(begin, end)]
    return [(at, min(at + LONGEST, end)) for at in range(begin, end - LONGEST // 2, LONGEST // 2)]


def _tested(x: Floats, begin: int, end: int, least: int) -> tuple[float, int]:
    """p of the strongest split of x[begin:end], and where it is."""
    if end - begin < 2 * least:
        return 1.0, begin
    score, split = _strongest(x[None, begin:end], least)
    noise = _noise(_rounded_up(end - begin), least)
    return (1 + float(np.count_nonzero(noise >= score[0]))) / (1 + noise.size), begin + int(split[0])


@lru_cache(maxsize=64)
def _noise(n: int, least: int) -> Floats:
    """The strongest split's score in series of n dates without a change."""
    return _strongest(np.random.default_rng(n).standard_t(NOISE_DF, size=(SIMULATIONS, n)), least)[0]


def _rounded_up(n: int) -> int:
    """So that a growing series does not need new simulations on every date; a little longer is a little stricter."""
    step = 1 if n <= 20 else 5 if n <= 60 else 20
    return -(-n // step) * step


def _strongest(x: Floats, least: int) -> tuple[Floats, Indices]:
    """Of each row of x [rows, n]: the highest score of any split of any interval, and where that split is."""
    rows, n = x.shape
    centred = x - np.median(x, axis=1, keepdims=True)
    size = np.abs(centred).max(axis=1, keepdims=True)
    x = centred / np.where(size > 0, size, 1.0)
    best = np.zeros(rows)
    where = np.zeros(rows, dtype=np.intp)
    for size, begins in _intervals(n, 2 * least):
        intervals = x[:, begins[:, None] + np.arange(size)].reshape(-1, size)
        t, splits = _split(intervals, least)
        place = t.argmax(axis=1).reshape(rows, -1)
        highest = t.max(axis=1).reshape(rows, -1)
        interval = highest.argmax(axis=1)
        each = np.arange(rows)
        with np.errstate(divide="ignore"):
            score = -np.log(special.stdtr(size - 3, -highest[each, interval]))
        higher = score > best
        best = np.where(higher, score, best)
        where = np.where(higher, begins[interval] + splits[place[each, interval]], where)
    return best, where


def _intervals(n: int, shortest: int) -> Iterator[tuple[int, Indices]]:
    """Seeded intervals: of lengths n, n/√2, n/2, …, each length shifted by half of it. Length and where they begin."""
    length = float(n)
    while round(length) >= shortest:
        size = round(length)
        count = 2 * math.ceil(n / size) - 1
        yield size, np.round(np.linspace(0, n - size, count)).astype(np.intp)
        length *= SHRINK


def _split(x: Floats, least: int) -> tuple[Floats, Indices]:
    """t [rows, splits] of every split of x [rows, n], and the splits: how many samples come before."""
    n = x.shape[1]
    before = np.arange(least, n - least + 1)
    left, right = _sides(x, before), _sides(x[:, ::-1], n - before)
    rising = right.mean > left.mean
    high, low = _Side.choose(rising, right, left), _Side.choose(rising, left, right)
    return np.minimum(_t(high.without(high.largest), low, n), _t(high, low.without(low.smallest), n)), before


@dataclass(frozen=True)
class _Side:
    """What lies to one side of each split; `squares` are those of deviations from the mean."""

    count: Floats
    mean: Floats
    squares: Floats
    smallest: Floats
    largest: Floats

    @staticmethod
    def choose(condition: npt.NDArray[np.bool_], one: _Side, other: _Side) -> _Side:
        return _Side(*(np.where(condition, getattr(one, f.name), getattr(other, f.name)) for f in fields(_Side)))

    def without(self, value: Floats) -> _Side:
        """The smallest and largest are kept as they were."""
        off = value - self.mean
        left = self.count - 1
        return replace(self, count=left, mean=self.mean - off / left, squares=self.squares - off**2 * self.count / left)


def _sides(x: Floats, counts: Indices) -> _Side:
    """Of the first so many of each row."""
    last = counts - 1
    count = np.broadcast_to(counts.astype(np.float64), (x.shape[0], counts.size))
    mean = np.cumsum(x, axis=1)[:, last] / count
    return _Side(
        count=count,
        mean=mean,
        squares=np.cumsum(x**2, axis=1)[:, last] - count * mean**2,
        smallest=np.minimum.accumulate(x, axis=1)[:, last],
        largest=np.maximum.accumulate(x, axis=1)[:, last],
    )


def _t(high: _Side, low: _Side, n: int) -> Floats:
    """Student's t of n − 1 values in two groups; infinite where both are constant and differ."""
    variance = np.maximum(high.squares + low.squares, 0) / (n - 3) * (1 / high.count + 1 / low.count)
    apart = high.mean - low.mean
    # Values are at most 1 in size here, and sums of them are rounded.
    exact = variance < 1e-14
    t = apart / np.sqrt(np.where(exact, 1.0, variance))
    return np.where(exact, np.where(apart > 1e-6, np.inf, 0.0), t)
