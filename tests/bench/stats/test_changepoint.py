from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyline.bench.stats.changepoint import Change, changes


def noisy(rng: np.random.Generator, levels: list[float], noise: float) -> list[float]:
    found: list[float] = (np.array(levels) * (1 + noise * rng.standard_normal(len(levels)))).tolist()
    return found


def test_a_step_is_found_where_it_is() -> None:
    values = noisy(np.random.default_rng(0), [100.0] * 20 + [90.0] * 10, 0.01)
    (change,) = changes(values, "higher")
    assert (change.index, change.regression, change.p) == (20, True, 0.001)
    assert change.before == np.median(values[:20]) and change.after == np.median(values[20:])
    assert change.relative == pytest.approx(change.after / change.before - 1) == pytest.approx(-0.1, abs=0.01)
    assert changes(values, "lower") == [Change(**{**vars(change), "regression": False})]


def test_steps_and_bumps() -> None:
    rng = np.random.default_rng(1)
    up_and_down = noisy(rng, [100.0] * 25 + [90.0] * 6 + [100.0] * 25, 0.01)
    assert [(c.index, c.regression) for c in changes(up_and_down, "higher")] == [(25, True), (31, False)]
    stairs = noisy(rng, [100.0] * 15 + [110.0] * 15 + [120.0] * 15 + [90.0] * 15, 0.01)
    assert [(c.index, c.regression) for c in changes(stairs, "higher")] == [(15, False), (30, False), (45, True)]


def test_without_noise() -> None:
    (change,) = changes([5.0] * 6 + [4.0] * 6, "higher")
    assert (change.index, change.before, change.after, change.relative) == (6, 5.0, 4.0, pytest.approx(-0.2))
    assert changes([5.0] * 12, "higher") == []
    (from_zero,) = changes([0.0] * 6 + [0.1] * 6, "lower")
    assert from_zero.relative == math.inf and from_zero.regression


def test_a_large_step_shows_after_two_dates() -> None:
    rng = np.random.default_rng(2)
    found = [changes(noisy(rng, [100.0] * 4 + [86.0] * 2, 0.01), "higher") for _ in range(40)]
    assert sum([c.index for c in one] == [4] for one in found) >= 32
    later = [changes(noisy(rng, [100.0] * 20 + [86.0] * 2, 0.01), "higher") for _ in range(40)]
    assert all([c.index for c in one] == [20] for one in later)


@pytest.mark.parametrize("size", [0.2, 3.0, 1e6])
def test_one_outlier_is_no_change(size: float) -> None:
    rng = np.random.default_rng(3)
    alarms = 0
    for trial in range(60):
        values = noisy(rng, [100.0] * 30, 0.01)
        values[trial % 30] *= size
        alarms += bool(changes(values, "higher"))
    assert alarms <= 2


def test_an_outlier_does_not_hide_a_step() -> None:
    values = noisy(np.random.default_rng(4), [100.0] * 20 + [90.0] * 20, 0.01)
    values[7], values[33] = 300.0, 10.0
    (change,) = changes(values, "higher")
    assert change.index == 20 and change.relative == pytest.approx(-0.1, abs=0.01)


def test_small_steps_do_not_matter() -> None:
    values = noisy(np.random.default_rng(5), [100.0] * 30 + [99.0] * 30, 0.001)
    assert changes(values, "higher") == []
    (change,) = changes(values, "higher", minimal=0.005)
    assert change.index == 30


def test_long_series() -> None:
    """Searched in stretches: changes far apart, and one where two stretches meet."""
    levels = [100.0] * 60 + [90.0] * 120 + [100.0] * 200
    found = changes(noisy(np.random.default_rng(6), levels, 0.02), "higher")
    assert [c.regression for c in found] == [True, False]
    assert [c.index for c in found] == pytest.approx([60, 180], abs=2)


def test_too_short_and_wrong() -> None:
    assert changes([], "higher") == changes([1.0, 2.0, 3.0], "lower") == []
    with pytest.raises(ValueError, match="not 'more'"):
        changes([1.0] * 10, "more")
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        changes([1.0, math.nan], "higher")
    with pytest.raises(ValueError, match="may be an outlier"):
        changes([1.0] * 10, "higher", min_segment=1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), max_size=40), st.floats(0.01, 1000))
def test_changes_are_ordered_apart_and_independent_of_the_unit(values: list[float], scale: float) -> None:
    found = changes(values, "higher")
    indices = [change.index for change in found]
    edges = [0, *indices, len(values)]
    assert all(b - a >= 2 for a, b in pairwise(edges)) or not found
    assert all(0 < change.p < 0.01 and abs(change.relative) >= 0.02 for change in found)
    assert changes(values, "higher") == found
    assert [change.index for change in changes(values[::-1], "higher")] == [
        len(values) - i for i in indices[::-1]
    ] or found


@pytest.mark.parametrize("n", [20, 50, 100])
def test_false_alarms_on_noise(n: int) -> None:
    """The bar is 5 %; alpha is 1 %. Differences of any size count here."""
    rng = np.random.default_rng(n)
    for draw in (rng.standard_normal, lambda k: rng.standard_t(3, k)):
        alarms = [bool(changes((100 + 2 * draw(n)).tolist(), "higher", minimal=0.0)) for _ in range(150)]
        assert np.mean(alarms) <= 0.04


def test_the_delay_of_a_five_percent_step_in_two_percent_noise() -> None:
    """Half are found within 6 dates, nine of ten within 12."""
    rng = np.random.default_rng(8)
    delays = []
    for _ in range(40):
        values = noisy(rng, [100.0] * 20 + [95.0] * 16, 0.02)
        seen = (k for k in range(2, 17) if any(abs(c.index - 20) <= 3 for c in changes(values[: 20 + k], "higher")))
        delays.append(next(seen, math.inf))
    assert np.median(delays) <= 6 and np.quantile(delays, 0.9, method="higher") <= 12
