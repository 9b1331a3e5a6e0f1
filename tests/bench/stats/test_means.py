from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyline.bench.estimate import Estimate
from skyline.bench.stats.means import mean, rate, share
from tests.bench.stats import servers

NUMBERS = st.floats(0, 1e6)


def ends(estimate: Estimate) -> tuple[float, float, float]:
    assert estimate.value is not None and estimate.low is not None and estimate.high is not None
    return estimate.low, estimate.value, estimate.high


@given(st.lists(NUMBERS, min_size=2, max_size=100))
def test_the_interval_is_around_the_mean_and_not_below_zero(samples: list[float]) -> None:
    estimate = mean(samples)
    assert estimate.value == pytest.approx(math.fsum(samples) / len(samples))
    if estimate.refused is None:
        low, value, high = ends(estimate)
        assert 0 <= low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9) and math.isfinite(high)


@given(st.lists(NUMBERS, min_size=2, max_size=50), st.floats(1e-3, 1e3))
def test_units_do_not_matter(samples: list[float], scale: float) -> None:
    here, there = mean(samples), mean([scale * sample for sample in samples])
    # Scaling may tie two samples that were not.
    if here.refused is None and there.refused is None:
        assert ends(there) == pytest.approx(tuple(scale * end for end in ends(here)), rel=1e-6, abs=1e-9)


def test_a_constant_is_known_exactly() -> None:
    assert ends(mean([0.25] * 40)) == (0.25, 0.25, 0.25)
    assert ends(mean([0.0] * 40)) == (0.0, 0.0, 0.0)


def test_largest_numbers() -> None:
    low, value, high = ends(mean([1e300, 2e300, 3e300, 2e300]))
    assert 0 <= low < value < high < math.inf


def test_more_confidence_is_wider_and_skew_points_upwards() -> None:
    samples = np.random.default_rng(0).exponential(size=200)
    (low, value, high), (low99, _, high99) = ends(mean(samples)), ends(mean(samples, 0.99))
    assert low99 < low < high < high99
    assert high - value > value - low
    with pytest.raises(ValueError, match="confidence"):
        mean(samples, 95)


def test_correlated_samples_say_less() -> None:
    """The same 1,000 values in random order and as they came."""
    samples = servers.closed_loop(np.random.default_rng(1), 1000, 0.8)
    low, _, high = ends(mean(np.random.default_rng(2).permutation(samples)))
    wide_low, _, wide_high = ends(mean(samples))
    assert wide_high - wide_low > 2 * (high - low)
    # The end on the side of the skewness is further out.
    assert wide_high - samples.mean() > 1.2 * (samples.mean() - wide_low)


def test_too_correlated_for_an_interval_is_a_value_with_what_is_missing() -> None:
    samples = np.sort(np.random.default_rng(1).normal(10, 1, size=400))
    for estimate in (mean(samples), rate(samples, 1.0)):
        assert estimate.value == pytest.approx(samples.mean())
        assert (estimate.low, estimate.high, estimate.n) == (None, None, 400)
        said = re.fullmatch(
            r"an interval needs about (\d+) samples as correlated as these 400, which are worth (\d+) independent ones",
            estimate.refused or "",
        )
        assert said is not None and int(said[1]) > 400 and int(said[2]) < 15
    # A run that is as much longer as it says passes, give or take the noise in it.
    rng = np.random.default_rng(5)
    short = mean(servers.closed_loop(rng, 100, 0.9)).refused
    assert short is not None
    assert mean(servers.closed_loop(rng, 2 * int(short.split()[4]), 0.9)).refused is None


def test_too_little() -> None:
    assert mean([]).refused == "a mean needs 2 samples, there are 0"
    assert mean([3.0]).refused == "a mean needs 2 samples, there is 1"
    assert rate([3.0], 1.0).refused == "a rate needs 2 bins, there is 1"
    assert share([]).refused == "a share needs at least 1 sample, there is none"
    with pytest.raises(ValueError, match="1 of 2 samples are not finite"):
        mean([1.0, math.nan])
    with pytest.raises(ValueError, match="bins are not finite"):
        rate([1.0, math.inf], 1.0)
    with pytest.raises(ValueError, match="bin_s"):
        rate([1.0, 2.0], 0.0)
    with pytest.raises(ValueError, match="booleans"):
        share([0.5, 1.0])


def test_a_rate_is_per_second() -> None:
    counts = [50, 52, 49, 51, 47, 55, 50, 48]
    estimate = rate(counts, 0.1)
    assert ends(estimate) == pytest.approx(tuple(10 * end for end in ends(mean(counts))))
    assert estimate.n == 8 and estimate.value == pytest.approx(502.5)


@pytest.mark.parametrize("n", [1, 20, 500])
def test_shares_of_none_and_all(n: int) -> None:
    """Wilson's interval at 0 is [0, z² / (n + z²)]."""
    z2 = 1.959963984540054**2
    assert ends(share([False] * n)) == pytest.approx((0, 0, z2 / (n + z2)))
    assert ends(share([True] * n)) == pytest.approx((1 - z2 / (n + z2), 1, 1))


def test_shares_mirror() -> None:
    hits = np.random.default_rng(2).random(300) < 0.1
    low, value, high = ends(share(hits))
    assert 0 < low < value < high < 1
    assert ends(share(~hits)) == pytest.approx((1 - high, 1 - value, 1 - low))


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_shares_stay_shares(hits: list[bool]) -> None:
    low, value, high = ends(share(hits))
    assert 0 <= low <= value <= high <= 1
