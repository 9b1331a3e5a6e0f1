from __future__ import annotations

import pytest

from skyline.bench.estimate import Estimate
from skyline.bench.recommend import Limit, ObjectiveError, parse_objective, recommend
from skyline.bench.results import AccuracyResult
from tests.bench.points import point


def test_objectives() -> None:
    assert parse_objective("ttft=500ms, tpot_p99=0.05") == [Limit("ttft_p90", 0.5), Limit("tpot_p99", 0.05)]
    assert parse_objective("interactivity=20") == [Limit("interactivity", 20.0)]
    assert Limit("ttft_p90", 0.5).text == "ttft_p90 ≤ 500 ms" and Limit("interactivity", 20.0).text.startswith(
        "interactivity ≥ 20"
    )


@pytest.mark.parametrize(
    "text",
    ["", "ttft", "ttft=", "ttft=fast", "ttft=-1", "ttft=0", "tftt=1s", "interactivity=5ms", "ttft_p42=1s", "ttft=nan"],
)
def test_what_is_no_objective(text: str) -> None:
    with pytest.raises(ObjectiveError):
        parse_objective(text)


def test_probability_of_keeping_a_limit() -> None:
    limit = Limit("ttft_p90", 0.5)
    assert limit.probability(Estimate(value=0.5, low=0.4, high=0.6)) == pytest.approx(0.5)
    assert limit.probability(Estimate(value=0.4, low=0.3, high=0.5333)) > 0.9
    assert limit.probability(Estimate(value=0.4)) == 1.0 and limit.probability(Estimate(value=0.6)) == 0.0
    assert limit.probability(Estimate(value=0.4, refused="too short")) == 0.0  # a value, but none to rely on
    assert limit.probability(None) == limit.probability(Estimate.refuse("few")) == 0.0
    assert Limit("interactivity", 20.0).probability(Estimate(value=30.0, low=28.0, high=32.0)) > 0.99


def test_the_most_throughput_under_the_objective() -> None:
    points = [
        point("a", 1, {"output_per_device": 10.0, "ttft_p90": (0.1, 0.09, 0.11)}),
        point("a", 8, {"output_per_device": 50.0, "ttft_p90": (0.4, 0.35, 0.45)}),
        point("a", 32, {"output_per_device": 90.0, "ttft_p90": (0.9, 0.8, 1.0)}),
        point("b", 16, {"output_per_device": 99.0, "ttft_p90": (0.1, 0.1, 0.1)}),
        point("c", 16, {"output_per_device": 98.0, "ttft_p90": (0.1, 0.1, 0.1)}, status="invalid"),
        point("a", 64, {"output_per_device": 97.0}),
    ]
    gates = [
        AccuracyResult(
            run="r",
            engine="b",
            model="m",
            task="demo",
            exact_match=0.1,
            standard_error=0.01,
            total=500,
            at_least=0.9,
            passed=False,
        )
    ]
    keeping, others = recommend(points, gates, parse_objective("ttft=500ms"))
    assert [c.point.spec.level.concurrency for c in keeping] == [8, 1]
    assert {c.point.spec.level.concurrency for c in others} == {32, 64}
    assert next(c for c in others if c.point.spec.level.concurrency == 64).missing == "ttft_p90: not measured"
    keeping, _ = recommend(points, gates, parse_objective("ttft=500ms"), confidence=0.9999999)
    assert [c.point.spec.level.concurrency for c in keeping] == [1]
