from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyline.bench.stats.steady import is_steady, little, truncation
from tests.bench.stats import servers


def test_a_warm_up_is_cut_off() -> None:
    rng = np.random.default_rng(0)
    for length in (50, 120, 300):
        series = 100 + rng.normal(size=1000)
        series[:length] -= 30 * np.linspace(1, 0.1, length)
        assert length * 0.8 <= truncation(series) <= length + 25


def test_what_is_steady_loses_little() -> None:
    rng = np.random.default_rng(1)
    cuts = [truncation(100 + rng.normal(size=1000)) for _ in range(100)]
    assert np.median(cuts) <= 50 and max(cuts) <= 500


def test_against_the_definition() -> None:
    """The least standard error over all cuts of up to half the batches, written out."""
    rng = np.random.default_rng(2)
    for _ in range(20):
        series = rng.normal(size=83) + np.exp(-np.arange(83) / 10) * 5
        batches = series[:80].reshape(16, 5).mean(axis=1)
        errors = [np.var(batches[cut:]) / (16 - cut) for cut in range(9)]
        assert truncation(series) == 5 * int(np.argmin(errors))


@given(st.lists(st.floats(-1e6, 1e6), max_size=120))
def test_never_more_than_half(samples: list[float]) -> None:
    cut = truncation(samples)
    assert 0 <= cut <= len(samples) / 2 and cut % 5 == 0


def test_little() -> None:
    assert little(8.0, 4.0, 2.0) == 1.0
    assert little(10.0, 4.0, 2.0) == 1.25
    for wrong in ((0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, math.nan)):
        with pytest.raises(ValueError, match="Little's law needs"):
            little(*wrong)


def test_drift_and_littles_law() -> None:
    rng = np.random.default_rng(4)
    flat = 100 + 5 * rng.normal(size=400)
    steady, reason = is_steady(flat, 1.02)
    assert steady and re.match(r"[+-]0\.\d% from the first half to the second", reason)
    assert is_steady(flat, 1.3) == (False, "Little's law is off: requests under way / (rate · residence) = 1.30")
    steady, reason = is_steady(flat * np.linspace(1, 1.3, 400), 1.0)
    assert not steady and reason.startswith("it drifts: +1")
    assert is_steady(flat * np.linspace(1, 1.02, 400))[0]  # too little to matter
    assert is_steady([1.0, 5.0]) == (True, "2 samples are too few to see a drift")
    assert is_steady([1.0] * 20 + [2.0] * 20)[0] is False
    assert is_steady([0.0] * 40) == (True, "+0.0% from the first half to the second (p = 1)")


def test_drift_is_rarely_seen_where_there_is_none() -> None:
    rng = np.random.default_rng(5)
    alarms = [not is_steady(servers.tokens(rng, 300, 0.9))[0] for _ in range(400)]
    assert np.mean(alarms) <= 0.04
