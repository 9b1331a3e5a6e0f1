from __future__ import annotations

import numpy as np
import pytest

from skyline.bench.stats.goodput import meets
from skyline.bench.suite import Slo

NAN = float("nan")


def test_every_objective_must_be_kept() -> None:
    ttft = [0.1, 0.6, 0.1, 0.1, 0.5]
    tpot = [0.02, 0.02, 0.06, 0.02, 0.05]
    e2e = [1.0, 1.0, 1.0, 9.0, 2.0]
    kept = meets(ttft, tpot, e2e, Slo(ttft_s=0.5, tpot_s=0.05, e2e_s=2.0))
    assert kept.tolist() == [True, False, False, False, True]
    assert kept.dtype == np.bool_


def test_what_is_not_asked_is_kept() -> None:
    assert meets([9.0], [9.0], [9.0], Slo()).tolist() == [True]
    assert meets([9.0, 0.1], [NAN, 9.0], [9.0, 9.0], Slo(ttft_s=1.0)).tolist() == [False, True]


def test_one_token_has_no_time_per_further_token_but_no_token_is_late() -> None:
    slo = Slo(ttft_s=0.5, tpot_s=0.05)
    assert meets([0.1, NAN], [NAN, NAN], [1.0, 1.0], slo).tolist() == [True, False]
    assert meets([NAN], [NAN], [NAN], Slo(e2e_s=1.0)).tolist() == [False]


def test_lengths() -> None:
    assert meets([], [], [], Slo(ttft_s=1.0)).tolist() == []
    with pytest.raises(ValueError, match="differ in length"):
        meets([0.1], [0.1, 0.2], [0.1], Slo())
