from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from skyline.bench.load.arrivals import lengths, read_trace, schedule
from skyline.bench.loads import Level
from skyline.bench.suite import SuiteError


def level(kind: str, rate: float = 50.0, **fields: object) -> Level:
    return Level.model_validate({"kind": kind, "rate": rate, **fields})


def test_constant_gaps() -> None:
    assert schedule(level("constant", 4.0), 1.0, 0).tolist() == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(("kind", "cv"), [("poisson", None), ("gamma", 0.3), ("gamma", 3.0)])
def test_random_gaps_have_their_mean_and_variation(kind: str, cv: float | None) -> None:
    times = schedule(level(kind, cv=cv), 400.0, seed=1)
    gaps = np.diff(times)
    assert (gaps >= 0).all() and times[-1] < 400.0
    assert len(times) == pytest.approx(20_000, rel=0.08)
    assert gaps.std() / gaps.mean() == pytest.approx(cv or 1.0, rel=0.08)


def test_a_ramp_grows_linearly() -> None:
    times = schedule(level("ramp", 10.0, end_rate=110.0), 200.0, seed=3)
    first, second = (times < 100).sum(), (times >= 100).sum()
    assert first == pytest.approx(3500, rel=0.08)  # 100 s at a mean of 35/s
    assert second == pytest.approx(8500, rel=0.05)
    assert (np.diff(times) >= 0).all()


def test_the_seed_decides() -> None:
    assert np.array_equal(schedule(level("poisson"), 9.0, 5), schedule(level("poisson"), 9.0, 5))
    assert not np.array_equal(schedule(level("poisson"), 9.0, 5), schedule(level("poisson"), 9.0, 6))


def test_too_many_are_refused() -> None:
    with pytest.raises(SuiteError, match="lower max_s or the rate"):
        schedule(level("poisson", 1e6), 600.0, 0)


def test_lengths_keep_to_their_range() -> None:
    drawn = np.array(lengths(1000, 0.8, 20_000, seed=1, stream=0))
    assert (drawn.min(), drawn.max()) == (800, 1000)
    assert drawn.mean() == pytest.approx(900, rel=0.01)
    assert set(lengths(7, 1.0, 50, 1, 0)) == {7}
    assert lengths(1000, 0.8, 9, 1, 0) != lengths(1000, 0.8, 9, 1, 1)


def test_a_trace(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    rows = [(3000, 20, 5), (1000, 10, 2), (1500, 12, 1)]
    names = ("timestamp", "input_length", "output_length")
    file.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    trace = read_trace(str(file), speed=2.0)
    assert trace.times.tolist() == [0.0, 0.25, 1.0]
    assert (trace.input, trace.output) == ([10, 12, 20], [2, 1, 5])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no request"),
        ('{"timestamp": 1}', "line 1"),
        ('\n{"timestamp": "x", "input_length": 1, "output_length": 1}', "line 2"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1}', "at least 1"),
        ("[]", "line 1"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1}', "no number"),
    ],
)
def test_bad_traces(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(text)
    with pytest.raises(SuiteError, match=said):
        read_trace(str(file), 1.0)
    with pytest.raises(SuiteError, match="cannot read"):
        read_trace(str(tmp_path / "none"), 1.0)
