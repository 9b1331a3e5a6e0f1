from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyline.bench.estimate import Estimate
from skyline.bench.stats.replicates import combine


def around(value: float, half: float, n: int = 100) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def test_one_replicate_is_what_it_is() -> None:
    for estimate in (around(10, 1), Estimate.refuse("p99 needs 662 requests, there are 40", 40)):
        assert combine([estimate]) is estimate
    with pytest.raises(ValueError, match="no replicate"):
        combine([])


def test_students_interval_over_the_values() -> None:
    """t of 3 degrees of freedom is 3.182; small spreads are alike on either scale."""
    combined = combine([Estimate(value=value, n=50) for value in (100.0, 101.0, 99.0, 100.0)])
    half = 3.182446 * math.sqrt(2 / 3) / 2
    assert combined.value == 100 and combined.n == 200
    assert (combined.low, combined.high) == pytest.approx((100 - half, 100 + half), abs=0.01)


def test_replicates_that_agree_by_chance_are_not_narrower_than_their_own_intervals() -> None:
    combined = combine([around(100, 4)] * 4)
    assert (combined.low, combined.high) == pytest.approx((98, 102), abs=0.03)
    lopsided = combine([Estimate(value=100, low=99, high=108, n=10)] * 4)
    assert (lopsided.low, lopsided.high) == pytest.approx((99.5, 104), abs=0.1)


def test_one_that_is_refused_refuses_all() -> None:
    combined = combine([around(10, 1), Estimate.refuse("p99 needs 662 requests, there are 40", 40)])
    assert combined.value is None and combined.n == 140
    assert combined.refused == "replicate 2 of 2: p99 needs 662 requests, there are 40"


def test_positive_values_have_positive_ends_and_others_may_not() -> None:
    wide = combine([around(1, 0.1), around(9, 0.1)])
    assert wide.low is not None and wide.low > 0
    zero = combine([Estimate(value=0.0, low=0.0, high=0.1, n=30), Estimate(value=0.0, low=0.0, high=0.1, n=30)])
    assert (zero.value, zero.low) == (0.0, 0.0)
    assert zero.high == pytest.approx(0.1 / math.sqrt(2))


@given(st.lists(st.tuples(st.floats(0.1, 1e6), st.floats(0, 0.09)), min_size=2, max_size=8), st.randoms())
def test_the_order_does_not_matter_and_the_mean_is_inside(runs: list[tuple[float, float]], random) -> None:  # type: ignore[no-untyped-def]
    estimates = [around(value, half * value) for value, half in runs]
    combined = combine(estimates)
    random.shuffle(estimates)
    again = combine(estimates)
    assert combined.value is not None and combined.low is not None and combined.high is not None
    assert combined.value == pytest.approx(np.mean([value for value, _ in runs]))
    assert combined.low <= combined.value <= combined.high
    assert (again.value, again.low, again.high) == pytest.approx((combined.value, combined.low, combined.high))


@pytest.mark.parametrize(("replicates", "between", "within"), [(3, 0.03, 0.01), (5, 0.03, 0.01), (8, 0.02, 0.02)])
def test_coverage(replicates: int, between: float, within: float) -> None:
    """Runs that differ, each with an honest interval of its own. The floor can only widen."""
    rng = np.random.default_rng(replicates)
    trials = 1500
    covered = 0
    for _ in range(trials):
        levels = 100 * (1 + between * rng.standard_normal(replicates))
        combined = combine([around(v + 100 * within * rng.standard_normal(), 196 * within) for v in levels])
        assert combined.low is not None and combined.high is not None
        covered += combined.low <= 100 <= combined.high
    assert 0.935 <= covered / trials <= 0.99
