from __future__ import annotations

import datetime

import pytest

from skyline.bench.estimate import Estimate
from skyline.bench.recommend import Limit, ObjectiveError, parse_objective, recommend
from tests.bench.points import WHEN, gate, limited_client, point


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
    gates = [gate("b")]
    keeping, others = recommend(points, gates, parse_objective("ttft=500ms"))
    assert [c.point.spec.level.concurrency for c in keeping] == [8, 1]
    assert {c.point.spec.level.concurrency for c in others} == {32, 64}
    assert next(c for c in others if c.point.spec.level.concurrency == 64).missing == "ttft_p90: not measured"
    keeping, _ = recommend(points, gates, parse_objective("ttft=500ms"), confidence=0.9999999)
    assert [c.point.spec.level.concurrency for c in keeping] == [1]


def test_what_cannot_be_judged_says_why_and_those_whose_values_keep_it_come_first() -> None:
    bare = Estimate(value=0.2, refused="its file holds no interval")
    slow = Estimate(value=0.9, refused="its file holds no interval")
    points = [
        point("a", 8, {"output_per_device": 90.0, "ttft_p90": slow}),
        point("b", 8, {"output_per_device": 50.0, "ttft_p90": bare, "tpot_p90": bare}),
        point("c", 8, {"output_per_device": 60.0, "ttft_p90": bare}),
        point("d", 8, {"output_per_device": 10.0, "ttft_p90": (0.6, 0.4, 0.9)}),
    ]
    keeping, others = recommend(points, [], parse_objective("ttft=500ms"), confidence=0.9)
    assert keeping == [] and [c.label[0] for c in others] == ["d", "c", "b", "a"]
    assert [c.by_value for c in others] == [False, True, True, False]
    assert others[1].missing == "ttft_p90 is 200 ms: its file holds no interval"
    _, others = recommend(points, [], parse_objective("ttft=500ms,tpot=1s"), confidence=0.9)
    assert [c.label[0] for c in others if c.by_value] == ["b"]
    assert next(c.missing for c in others if c.label[0] == "c") == (
        "ttft_p90 is 200 ms: its file holds no interval; tpot_p90: not measured"
    )
    interactive = Limit("interactivity", 20.0)
    assert interactive.kept_by_value(Estimate(value=21.0)) and not interactive.kept_by_value(Estimate(value=19.0))


OBJECTIVE = parse_objective("ttft=500ms")
SOON = (0.1, 0.09, 0.11)


def test_replicates_are_one_candidate_and_none_is_lucky() -> None:
    """One engine's best replicate has the most; the mean of the other's is more."""
    points = [
        *(point("a", 8, {"output_per_device": y, "ttft_p90": SOON}, replicate=i) for i, y in enumerate((90.0, 99.0))),
        *(point("b", 8, {"output_per_device": y, "ttft_p90": SOON}, replicate=i) for i, y in enumerate((96.0, 97.0))),
    ]
    keeping, _ = recommend(points, [], OBJECTIVE)
    assert [(c.label, c.replicates, c.throughput.value) for c in keeping] == [
        ("b · m · 1k/1k · concurrency 8", 2, 96.5),
        ("a · m · 1k/1k · concurrency 8", 2, 94.5),
    ]
    assert keeping[0].throughput.low is not None  # by the replicates' spread
    limited = points[0].model_copy(update={"client": limited_client()})
    (kept,) = recommend([limited, *points[1:]], [], OBJECTIVE)[0]
    assert kept.label.startswith("b "), "what is left of a's replicates would be a selection"


def test_the_newest_run_counts_whatever_it_says() -> None:
    later = WHEN + datetime.timedelta(days=1)
    old = point("a", 8, {"output_per_device": 90.0, "ttft_p90": SOON}, run="old")
    new = point("a", 8, {"output_per_device": 50.0, "ttft_p90": SOON}, run="new", when=later)
    keeping, _ = recommend([new, old], [], OBJECTIVE)
    assert [(c.point.run, c.throughput.value) for c in keeping] == [("new", 50.0)]
    failed = point("a", 8, run="new", when=later, status="failed")
    assert recommend([old, failed], [], OBJECTIVE) == ([], [])
    assert recommend([old, new], [gate("a", run="new")], OBJECTIVE) == ([], [])
    elsewhere = point("a", 8, {"output_per_device": 50.0, "ttft_p90": SOON}, run="new", hardware="GPU", when=later)
    assert len(recommend([old, elsewhere], [], OBJECTIVE)[0]) == 2


def test_the_probability_of_being_the_best() -> None:
    """Of equals it is a half each; of one far ahead it is 1; of one whose interval was refused, not known."""
    equal = [point(name, 8, {"output_per_device": (50.0, 45.0, 55.0), "ttft_p90": SOON}) for name in ("a", "b")]
    keeping, _ = recommend(equal, [], OBJECTIVE)
    assert [c.best for c in keeping] == pytest.approx([0.5, 0.5], abs=0.05)
    ahead = point("c", 8, {"output_per_device": (90.0, 89.0, 91.0), "ttft_p90": SOON})
    assert [c.best for c in recommend([*equal, ahead], [], OBJECTIVE)[0]] == [1.0, 0.0, 0.0]
    short = Estimate(value=80.0, n=9, refused="an interval needs about 40 samples")
    unsure = point("d", 8, {"output_per_device": short, "ttft_p90": SOON})
    assert [c.best for c in recommend([*equal, unsure], [], OBJECTIVE)[0]] == [None, None, None]
    assert [c.best for c in recommend([*equal, ahead, unsure], [], OBJECTIVE)[0]] == [1.0, None, None, None]
    slow = point("e", 8, {"output_per_device": (999.0, 990.0, 1010.0), "ttft_p90": (5.0, 4.9, 5.1)})
    keeping, others = recommend([*equal, slow], [], OBJECTIVE)
    assert [c.best for c in keeping] == pytest.approx([0.5, 0.5], abs=0.05), "only among those that keep the objective"
    assert [c.best for c in others] == [None]
