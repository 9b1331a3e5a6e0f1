from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyline.bench.stats.means import mean
from skyline.bench.stats.quantiles import quantile, required_samples
from tests.bench.stats import servers


@pytest.mark.parametrize(("q", "n"), [(0.5, 11), (0.9, 64), (0.95, 130), (0.99, 662), (0.999, 6636)])
def test_required_samples(q: float, n: int) -> None:
    """Against the binomial distribution written out: fewer than two beyond with at most 1 %."""

    def fewer_than_two(n: int) -> float:
        return q**n + n * (1 - q) * q ** (n - 1)

    assert required_samples(q) == n
    assert fewer_than_two(n) <= 0.01 < fewer_than_two(n - 1)
    assert required_samples(1 - q) == n


def test_what_is_missing_is_said() -> None:
    estimate = quantile([1.0] * 40, 0.99)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (None, None, None, 40)
    assert estimate.refused == "p99 needs 662 requests, there are 40"
    assert quantile([], 0.5).refused == "p50 needs 11 requests, there are 0"
    assert quantile([1.0], 0.999).refused == "p99.9 needs 6636 requests, there is 1"
    assert quantile(np.arange(661) % 7, 0.99).refused is not None
    assert quantile(np.random.default_rng(0).random(662), 0.99).refused is None


def test_samples_that_are_worth_too_few_are_refused() -> None:
    rng = np.random.default_rng(1)
    refusals = [quantile(servers.closed_loop(rng, 700, 0.9), 0.99).refused for _ in range(20)]
    assert all(why is not None and "as correlated as these 700, which are worth" in why for why in refusals)
    assert all(quantile(rng.exponential(size=700), 0.99).refused is None for _ in range(200))
    assert np.mean([quantile(rng.exponential(size=n), 0.9).refused is None for n in range(64, 264)]) > 0.97
    # The number that is asked for is enough, give or take the noise in it.
    asked = [int(why.split()[3]) for why in refusals if why is not None]
    enough = quantile(servers.closed_loop(rng, 2 * max(asked), 0.9), 0.99)
    assert enough.value is not None


def test_correlated_samples_keep_their_value_without_an_interval() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        samples = servers.closed_loop(rng, 700, 0.95)
        estimate = quantile(samples, 0.99)
        assert estimate.refused is not None
        assert (estimate.value, estimate.low, estimate.high) == (np.quantile(samples, 0.99), None, None)


def test_the_upper_end_is_further_out_where_samples_are_correlated() -> None:
    """In levels, which are alike for all distributions: the median's interval is symmetrical without correlation."""
    rng = np.random.default_rng(5)
    for phi, least, most in ((0.0, 0.9, 1.1), (0.9, 1.15, 2.0)):
        above, below = [], []
        for _ in range(100):
            samples = servers.closed_loop(rng, 1000, phi)
            one = quantile(samples, 0.5)
            if one.low is not None and one.high is not None:
                above.append(np.mean(samples <= one.high) - 0.5)
                below.append(0.5 - np.mean(samples < one.low))
        assert least < np.mean(above) / np.mean(below) < most


def test_wrong_arguments() -> None:
    for q in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            quantile([1.0] * 1000, q)
    with pytest.raises(ValueError, match="1 of 20 samples are not finite"):
        quantile([1.0] * 19 + [math.nan], 0.5)
    with pytest.raises(ValueError, match="confidence"):
        quantile([1.0] * 19, 0.5, confidence=1.0)


@given(st.integers(11, 120), st.integers(0, 10_000), st.sampled_from([0.1, 0.5, 0.9]), st.booleans())
def test_the_interval_is_around_the_quantile_and_within_the_samples(n: int, seed: int, q: float, ties: bool) -> None:
    samples = np.random.default_rng(seed).lognormal(size=n)
    if ties:
        samples = np.round(samples)
    estimate = quantile(samples, q)
    if estimate.refused is None:
        assert estimate.value is not None and estimate.low is not None and estimate.high is not None
        assert estimate.value == np.quantile(samples, q)
        assert samples.min() <= estimate.low <= estimate.value <= estimate.high <= samples.max()


@given(st.integers(0, 10_000))
def test_order_is_all_that_counts(seed: int) -> None:
    """The interval of log x is the logarithm of x's, but for interpolation between neighbours."""
    samples = np.random.default_rng(seed).lognormal(sigma=0.1, size=400)
    plain, logarithmic = quantile(samples, 0.9), quantile(np.log(samples), 0.9)
    assert plain.low is not None and plain.high is not None
    assert (logarithmic.low, logarithmic.high) == pytest.approx((math.log(plain.low), math.log(plain.high)), abs=2e-3)


def test_quantiles_mirror() -> None:
    samples = np.random.default_rng(2).normal(size=500)
    low, high = quantile(samples, 0.1), quantile(-samples, 0.9)
    assert low.value is not None and low.low is not None and low.high is not None
    assert (high.value, high.high, high.low) == pytest.approx((-low.value, -low.low, -low.high))


def test_a_constant_is_known_exactly() -> None:
    estimate = quantile([0.25] * 700, 0.99)
    assert (estimate.value, estimate.low, estimate.high) == (0.25, 0.25, 0.25)


def test_independent_samples_give_the_textbook_interval() -> None:
    """The exact 95 % interval of the median of 1,001 lies between the 470th and the 532nd; here with t instead of z."""
    estimates = [quantile(np.random.default_rng(seed).permutation(1001) + 1.0, 0.5) for seed in range(200)]
    half = np.mean([(e.high or 0) - (e.low or 0) for e in estimates]) / 2
    assert half == pytest.approx(31 * 2.18 / 1.96, rel=0.05)


def test_a_point_is_analysed_within_two_seconds() -> None:
    """5,000 requests and 10 metrics, each with its mean and 4 quantiles."""
    rng = np.random.default_rng(3)
    series = [servers.closed_loop(rng, 5000, 0.5) for _ in range(10)]
    begin = time.process_time()
    for samples in series:
        mean(samples)
        for q in (0.5, 0.9, 0.95, 0.99):
            quantile(samples, q)
    assert time.process_time() - begin < 2
