from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyline.bench.stats.dependence import cosines, effective_size, long_run, series, skewness_of_mean
from tests.bench.stats import servers


def test_cosines_keep_the_sum_of_squares() -> None:
    x = np.random.default_rng(0).normal(size=257)
    x -= x.mean()
    assert np.sum(cosines(x) ** 2) == pytest.approx(np.sum(x**2))


@pytest.mark.parametrize(("phi", "effect"), [(0.0, 1.0), (0.5, 3.0), (0.8, 9.0), (-0.5, 1 / 3)])
def test_the_design_effect_of_a_process_where_it_is_known(phi: float, effect: float) -> None:
    """(1 + φ) / (1 − φ) for AR(1)."""
    rng = np.random.default_rng(1)
    found = [long_run(servers.correlated_normal(rng, 4000, phi)).effect for _ in range(300)]
    assert np.mean(found) == pytest.approx(effect, rel=0.08)


def test_the_variance_of_a_mean_is_that_over_many_runs() -> None:
    rng = np.random.default_rng(2)
    runs = [servers.queue(rng, 2000, 0.5) for _ in range(1000)]
    true = np.var([run.mean() for run in runs]) * 2000
    assert np.mean([long_run(run).variance for run in runs]) == pytest.approx(true, rel=0.1)


def test_few_cosines_where_few_independent_samples_are() -> None:
    rng = np.random.default_rng(3)
    assert long_run(rng.normal(size=1000)).df == 12
    assert all(long_run(servers.correlated_normal(rng, 200, 0.98)).df <= 6 for _ in range(20))
    assert long_run(rng.normal(size=3)).df == 2


def test_constant_series() -> None:
    found = long_run(np.full(100, 0.1))
    assert (found.variance, found.effect) == (0.0, 1.0)
    assert skewness_of_mean(np.full(100, 0.1), found) == 0.0


def test_a_regular_swing_tells_more_of_the_mean_than_chance_would() -> None:
    x = np.tile([1.0, 2.0], 500)
    assert 0 < long_run(x).effect < 0.01


def test_the_skewness_of_a_queues_mean() -> None:
    """Samples are skewed by 2, the mean of 1,000 independent ones by 2 / √1000. A queue's mean is, over many runs, by
    more than three times what the design effect (9) makes of that: 0.19. The estimate finds some of it."""
    rng = np.random.default_rng(4)
    runs = [servers.queue(rng, 1000, 0.5) for _ in range(1500)]
    means = np.array([run.mean() for run in runs])
    true = np.mean((means - means.mean()) ** 3) / np.std(means) ** 3
    found = np.mean([skewness_of_mean(run, long_run(run)) for run in runs])
    assert 0.25 < found < true
    independent = [rng.exponential(size=1000) for _ in range(500)]
    assert 1 < np.mean([skewness_of_mean(x, long_run(x)) for x in independent]) / (2 / 1000**0.5) < 2


def test_rare_hits_are_worth_less_in_clusters() -> None:
    n = 2000
    spread, clustered = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    places = np.random.default_rng(5).permutation(n)
    spread[places[:40]] = True
    for start in places[:4]:
        clustered[start : start + 10] = True
    assert effective_size(clustered, 0.95) < 0.2 * effective_size(spread, 0.95)
    assert effective_size(np.zeros(n, dtype=bool), 0.95) == n


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60), st.floats(0.01, 100), st.floats(-1e6, 1e6))
def test_units_and_origin_do_not_matter(samples: list[float], scale: float, shift: float) -> None:
    x = np.array(samples)
    moved = scale * x + shift
    before, after = long_run(x), long_run(moved)
    if np.ptp(x) > 1e-3 and np.ptp(moved) > 1e-3:
        assert after.effect == pytest.approx(before.effect, rel=1e-3)
        assert after.variance == pytest.approx(scale**2 * before.variance, rel=1e-3)


def test_wrong_samples() -> None:
    with pytest.raises(ValueError, match="2 of 3 samples are not finite"):
        series([1.0, float("nan"), float("inf")])
    with pytest.raises(ValueError, match="sequence of numbers"):
        series(np.zeros((2, 2)))
