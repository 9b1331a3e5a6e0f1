from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyline.bench.estimate import Estimate
from skyline.bench.stats.frontier import Candidate, Placed, band, frontier

GRID = st.integers(1, 5).map(float)


def exact(name: str, x: float, y: float) -> Candidate:
    return Candidate(name, Estimate(value=x, n=1), Estimate(value=y, n=1))


def uncertain(value: float, sd: float) -> Estimate:
    """Log-normal with this standard deviation of the logarithm."""
    factor = math.exp(1.959963984540054 * sd)
    return Estimate(value=value, low=value / factor, high=value * factor, n=100)


@given(st.lists(st.tuples(GRID, GRID), max_size=12))
def test_against_the_definition(points: list[tuple[float, float]]) -> None:
    placed = frontier([exact(str(i), *point) for i, point in enumerate(points)], draws=3)
    for (x, y), found in zip(points, placed, strict=True):
        beaten = any(x2 >= x and y2 >= y and (x2, y2) != (x, y) for x2, y2 in points)
        assert (found.on_frontier, found.probability) == (not beaten, float(not beaten))


def test_probability_where_it_is_known() -> None:
    """Two points at the same x: the better y is on the frontier with Φ(difference / sd of the difference)."""
    sd = 0.05
    ahead, behind = frontier(
        [
            Candidate("ahead", Estimate(value=10, n=1), uncertain(105, sd)),
            Candidate("behind", Estimate(value=10, n=1), uncertain(100, sd)),
        ],
        draws=20_000,
    )
    expected = 0.5 * (1 + math.erf(math.log(1.05) / (sd * math.sqrt(2)) / math.sqrt(2)))
    assert ahead.probability == pytest.approx(expected, abs=0.012)
    assert behind.probability == pytest.approx(1 - expected, abs=0.012)
    assert (ahead.on_frontier, behind.on_frontier) == (True, False)


def test_refused_and_exact_ties() -> None:
    refused = Candidate("refused", Estimate.refuse("no tokens"), Estimate(value=1e9))
    twin = exact("one", 2, 2)
    placed = frontier([refused, twin, exact("two", 2, 2), exact("lower", 1, 1), exact("zero", 3, 0)])
    assert placed == [
        Placed("refused", False, None),
        Placed("one", True, 1.0),
        Placed("two", True, 1.0),
        Placed("lower", False, 0.0),
        Placed("zero", True, 1.0),
    ]
    assert frontier([]) == [] and frontier([refused]) == [Placed("refused", False, None)]


def test_nothing_is_known_of_a_value_whose_interval_was_refused() -> None:
    """It stands on the frontier by its value, without a probability; and whom it beats has none either."""
    short = Candidate("short", Estimate(value=20, refused="needs 60 requests"), Estimate(value=100, n=9))
    beaten, above, right = (
        Candidate("beaten", uncertain(15, 0.01), uncertain(90, 0.01)),
        Candidate("above", uncertain(10, 0.01), uncertain(150, 0.01)),
        Candidate("right", uncertain(30, 0.01), uncertain(50, 0.01)),
    )
    placed = frontier([short, beaten, above, right])
    assert [(one.on_frontier, one.probability) for one in placed] == [
        (True, None), (False, None), (True, 1.0), (True, 1.0),
    ]  # fmt: skip
    assert frontier([short]) == [Placed("short", True, None)]


def test_the_band_is_of_known_intervals_only() -> None:
    unknown = Candidate("unknown", Estimate(value=20), Estimate(value=1000, refused="needs 60 requests"))
    known = Candidate("known", Estimate(value=10), uncertain(100, 0.1))
    assert band([known, unknown], [5.0, 15.0]) == [*band([known], [5.0]), None]
    assert band([unknown], [5.0]) == [None]


def test_draws_are_seeded() -> None:
    candidates = [Candidate(str(i), uncertain(10 + i, 0.1), uncertain(20 - i, 0.1)) for i in range(10)]
    assert frontier(candidates, seed=1) == frontier(candidates, seed=1)
    assert frontier(candidates, seed=1) != frontier(candidates, seed=2)
    assert band(candidates, [12.0], seed=1) == band(candidates, [12.0], seed=1)


def test_lopsided_intervals_and_ends_at_zero() -> None:
    """Half of the draws are above the value, however far the other end is; an end at 0 is drawn as the other."""
    one = Candidate("one", Estimate(value=1), Estimate(value=10, low=1, high=11, n=9))
    two = Candidate("two", Estimate(value=1), Estimate(value=10, n=9))
    assert frontier([one, two], draws=20_000)[0].probability == pytest.approx(0.5, abs=0.02)
    (found,) = band([Candidate("zero", Estimate(value=1), Estimate(value=10, low=0, high=20, n=9))], [1.0])
    assert found is not None and found == pytest.approx((10, 5, 20), rel=0.1)


def test_the_band_of_one_point_is_its_interval() -> None:
    middle, low, high = (
        band([Candidate("a", Estimate(value=5), uncertain(100, 0.1))], [1.0], draws=20_000)[0] or (0,) * 3
    )
    assert middle == pytest.approx(100, rel=0.01)
    assert (low, high) == pytest.approx((100 / math.exp(0.196), 100 * math.exp(0.196)), rel=0.015)


def test_the_band_is_a_staircase() -> None:
    candidates = [exact("a", 10, 300), exact("b", 20, 200), exact("c", 30, 100), exact("d", 15, 50)]
    found = band(candidates, [0, 10, 10.5, 20, 25, 30, 30.5])
    assert [None if one is None else round(one[0], 6) for one in found] == [300, 300, 200, 200, 100, 100, None]
    assert all(one is None or max(one) - min(one) < 1e-9 for one in found)
    assert band([], [1.0, 2.0]) == [None, None]


def test_the_band_falls_and_holds_its_median() -> None:
    rng = np.random.default_rng(0)
    candidates = [
        Candidate(str(i), uncertain(x, 0.05), uncertain(1000 / x, 0.05)) for i, x in enumerate(rng.uniform(5, 50, 30))
    ]
    found = band(candidates, list(np.linspace(5, 40, 20)))
    ends = [one for one in found if one is not None]
    assert len(ends) == 20
    assert all(low <= middle <= high for middle, low, high in ends)
    assert all(a[0] >= b[0] * (1 - 1e-9) for a, b in pairwise(ends))
