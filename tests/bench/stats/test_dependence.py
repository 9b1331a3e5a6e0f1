from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyline.bench.stats.dependence import (
    Floats,
    LongRun,
    Memory,
    cosines,
    effective_size,
    far_tail,
    is_worth,
    long_run,
    longer,
    memory,
    series,
    skewness_of_mean,
)
from tests.bench.stats import servers


def found_in(x: Floats) -> LongRun:
    return long_run(x, memory(x))


def test_cosines_keep_the_sum_of_squares() -> None:
    x = np.random.default_rng(0).normal(size=257)
    x -= x.mean()
    assert np.sum(cosines(x) ** 2) == pytest.approx(np.sum(x**2))


@pytest.mark.parametrize(("phi", "effect"), [(0.0, 1.0), (0.5, 3.0), (0.8, 9.0), (-0.5, 1 / 3)])
def test_the_design_effect_of_a_process_where_it_is_known(phi: float, effect: float) -> None:
    """(1 + φ) / (1 − φ) for AR(1)."""
    rng = np.random.default_rng(1)
    found = [found_in(servers.correlated_normal(rng, 4000, phi)).effect for _ in range(300)]
    assert np.mean(found) == pytest.approx(effect, rel=0.08)


def test_the_variance_of_a_mean_is_that_over_many_runs() -> None:
    rng = np.random.default_rng(2)
    runs = [servers.queue(rng, 2000, 0.5) for _ in range(1000)]
    true = np.var([run.mean() for run in runs]) * 2000
    assert np.mean([found_in(run).variance for run in runs]) == pytest.approx(true, rel=0.1)


def test_few_cosines_where_few_independent_samples_are() -> None:
    rng = np.random.default_rng(3)
    assert found_in(rng.normal(size=1000)).df == 12
    assert all(found_in(servers.correlated_normal(rng, 200, 0.98)).df <= 6 for _ in range(20))
    assert found_in(rng.normal(size=3)).df == 2


def test_constant_series() -> None:
    found = found_in(np.full(100, 0.1))
    assert (found.variance, found.effect) == (0.0, 1.0)
    assert memory(np.full(100, 0.1)) == Memory(100, 0.0)
    assert skewness_of_mean(np.full(100, 0.1), found, Memory(100, 0.0)) == 0.0


def test_a_regular_swing_tells_more_of_the_mean_than_chance_would() -> None:
    x = np.tile([1.0, 2.0], 500)
    assert 0 < found_in(x).effect < 0.01


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.8, 0.95])
def test_what_samples_are_worth(phi: float) -> None:
    """Ranks of a normal AR(1) process are correlated by 6/π · arcsin(φᵏ / 2) at lag k."""
    lags = 6 / np.pi * np.arcsin(phi ** np.arange(1, 2000) / 2)
    rng = np.random.default_rng(6)
    found = [memory(servers.closed_loop(rng, 4000, phi)) for _ in range(100)]
    assert np.mean([4000 / one.worth for one in found]) == pytest.approx(1 + 2 * lags.sum(), rel=0.1)
    first = (1 + lags[0]) / (1 - lags[0])
    assert np.mean([one.strength for one in found]) == pytest.approx(1 - 1 / first, abs=0.03)


def test_one_outlier_hides_nothing() -> None:
    x = servers.correlated_normal(np.random.default_rng(7), 1000, 0.9)
    spoilt = x.copy()
    spoilt[500] = 1e9
    assert memory(spoilt).worth == pytest.approx(memory(x).worth, rel=0.2)


def test_the_far_end_moves_out_with_correlation_and_few_samples() -> None:
    assert far_tail(0.95, Memory(30, 0.0)) == pytest.approx(0.025)
    assert far_tail(0.95, Memory(1000, 0.9)) == pytest.approx(0.025)
    tails = [far_tail(0.95, Memory(30, strength)) for strength in (0.1, 0.5, 0.9)]
    assert 0.025 > tails[0] > tails[1] > tails[2] > 0
    assert far_tail(0.95, Memory(1000, 0.9), 0.01) < far_tail(0.95, Memory(1000, 0.9), 0.05) < 0.025


def test_what_is_too_few_and_how_many_would_do() -> None:
    assert is_worth(50, Memory(15.0, 0.5), 15) and not is_worth(50, Memory(14.9, 0.5), 15)
    assert is_worth(10, Memory(6.0, 0.5), 15) and not is_worth(10, Memory(4.0, 0.5), 15)
    assert (longer(700, 12.3, 15.0), longer(700, 50.0, 530.0), longer(7, 3.0, 4.0)) == (860, 7500, 10)


def test_the_skewness_of_a_queues_mean() -> None:
    """Samples are skewed by 2, the mean of 1,000 independent ones by 2 / √1000. A queue's mean is, over many runs, by
    more than three times what the design effect (9) makes of that: 0.19. It is corrected for up to 0.45."""
    rng = np.random.default_rng(4)
    runs = [servers.queue(rng, 1000, 0.5) for _ in range(1000)]
    means = np.array([run.mean() for run in runs])
    true = np.mean((means - means.mean()) ** 3) / np.std(means) ** 3
    found = np.mean([skewness_of_mean(run, found_in(run), memory(run)) for run in runs[:300]])
    assert 0.6 < true < 0.9 and 0.4 < found <= 0.45
    independent = [rng.exponential(size=1000) for _ in range(300)]
    assert 1 < np.mean([skewness_of_mean(x, found_in(x), memory(x)) for x in independent]) / (2 / 1000**0.5) < 1.3


def test_rare_hits_are_worth_less_in_clusters() -> None:
    n = 2000
    spread, clustered = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    places = np.random.default_rng(5).permutation(n)
    spread[places[:40]] = True
    for start in places[:4]:
        clustered[start : start + 10] = True
    near, far = effective_size(clustered, 0.95, memory(clustered))
    assert near < 0.2 * min(effective_size(spread, 0.95, memory(spread)))
    # Four clusters say little of how large others are, which matters where these may have been small ones.
    assert far < 0.9 * near
    assert effective_size(np.zeros(n, dtype=bool), 0.95, Memory(n, 0.0)) == (n, n)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60), st.floats(0.01, 100), st.floats(-1e6, 1e6))
def test_units_and_origin_do_not_matter(samples: list[float], scale: float, shift: float) -> None:
    x = np.array(samples)
    moved = scale * x + shift
    before, after = found_in(x), found_in(moved)
    if np.ptp(x) > 1e-3 and np.ptp(moved) > 1e-3:
        assert after.effect == pytest.approx(before.effect, rel=1e-3)
        assert after.variance == pytest.approx(scale**2 * before.variance, rel=1e-3)


def test_wrong_samples() -> None:
    with pytest.raises(ValueError, match="2 of 3 samples are not finite"):
        series([1.0, float("nan"), float("inf")])
    with pytest.raises(ValueError, match="sequence of numbers"):
        series(np.zeros((2, 2)))
