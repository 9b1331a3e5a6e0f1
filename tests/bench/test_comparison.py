from __future__ import annotations

import pytest

from skyline.bench.comparison import (
    beyond_reach,
    counted,
    default_margin,
    in_turns,
    paired_suite,
    pairs_of,
    self_pairs,
)
from skyline.bench.stats.compare import compare
from skyline.bench.suite import SuiteError, parse_suite
from tests.bench.points import gate, limited_client, point

SUITE = parse_suite(
    """
    name: s
    models: [{name: m, source: demo}, {name: n, source: demo}]
    engines: [{engine: skyline}, {engine: vllm}, {engine: sglang}]
    scenarios: [{name: w, input: 64, output: 16, load: {kind: closed, concurrency: [1, 2]}}]
    """
)


def test_the_two_take_turns() -> None:
    suite = paired_suite(SUITE, "vllm", "skyline", pairs=4)
    order = in_turns(suite.points())
    assert sorted(spec.key for spec in order) == sorted(spec.key for spec in suite.points())
    blocks = list(dict.fromkeys((spec.replicate, spec.engine.name) for spec in order))
    assert [name[0] for _, name in blocks] == ["v", "s", "s", "v", "v", "s", "s", "v"]


def test_one_engine_against_itself() -> None:
    suite = paired_suite(SUITE, "vllm", "vllm", pairs=3)
    assert [engine.name for engine in suite.engines] == ["vllm", "vllm again"]
    assert len({spec.key for spec in suite.points()}) == 2 * 2 * 2 * 3


def test_unknown_engines() -> None:
    with pytest.raises(SuiteError, match="no engine 'vlm'; it has skyline, vllm, sglang"):
        paired_suite(SUITE, "skyline", "vlm", 3)


def test_pairs_are_what_both_measured() -> None:
    a = [point("a", n, {"output_per_device": 10.0 * n + i}, replicate=i) for n in (1, 2) for i in range(3)]
    b = [point("b", n, {"output_per_device": 20.0 * n + i}, replicate=i) for n in (1, 2, 4) for i in range(2)]
    pairs, missing = pairs_of(a, b, ["output_per_device", "ttft_p50"])
    assert [(pair.name, pair.a, pair.b, pair.better) for pair in pairs] == [
        ("m · 1k/1k · concurrency 1 · output_per_device", [10.0, 11.0], [20.0, 21.0], "higher"),
        ("m · 1k/1k · concurrency 2 · output_per_device", [20.0, 21.0], [40.0, 41.0], "higher"),
    ]
    assert missing == [
        "m · 1k/1k · concurrency 1 · output_per_device: 1 replicate of A alone",
        "m · 1k/1k · concurrency 1 · ttft_p50: measured by neither side",
        "m · 1k/1k · concurrency 2 · output_per_device: 1 replicate of A alone",
        "m · 1k/1k · concurrency 2 · ttft_p50: measured by neither side",
        "m · 1k/1k · concurrency 4 · output_per_device: 2 replicates of B alone",
        "m · 1k/1k · concurrency 4 · ttft_p50: measured by neither side",
    ]
    assert pairs_of(a, b, ["output_per_device"])[1][-1] == "m · 1k/1k · concurrency 4: 2 replicates of B alone"


def test_a_level_that_only_the_baseline_reaches_is_not_passed_over() -> None:
    a = [point("a", n, {"output_per_device": 10.0}, replicate=i) for n in (1, 16) for i in range(4)]
    b = [point("b", 1, {"output_per_device": value}, replicate=i) for i, value in enumerate((10.0, 10.01, 9.99, 10.0))]
    same = compare(pairs_of(a, b, ["output_per_device"])[0])
    assert same.verdict == "same"
    found = beyond_reach(same, a, b)
    assert (found.verdict, found.exit_code) == ("undecided", 3)
    assert found.advice == "nothing of B counts at m · 1k/1k · concurrency 16, where A was measured"
    assert beyond_reach(same, b, a) == same, "that B reaches more is no reason to hold it back"
    worse = compare(
        pairs_of(
            a,
            [
                p.model_copy(
                    update={"metrics": {**p.metrics, "output_per_device": p.metrics["output_per_device"].scaled(0.5)}}
                )
                for p in b
            ],
            ["output_per_device"],
        )[0]
    )
    assert beyond_reach(worse, a, b) == worse


def test_noise_raises_the_margin_only_so_far() -> None:
    assert [default_margin(floor) for floor in (0.0, 0.03, 20.0, None)] == [0.02, 0.03, 0.05, 0.05]


def test_neighbours_of_one_side() -> None:
    a = [point("a", 1, {"output_per_device": 10.0 + i}, replicate=i) for i in range(4)]
    b = [point("b", 1, {"output_per_device": 20.0 + i}, replicate=i) for i in range(4)]
    (pair,) = self_pairs(a, b, "output_per_device")
    # Measured as a0 b0 b1 a1 a2 b2 b3 a3
    assert (pair.a, pair.b) == ([11.0, 20.0, 22.0], [12.0, 21.0, 23.0])
    assert self_pairs(a[:1], b[:1], "output_per_device") == []


def test_what_may_not_stand_on_a_frontier_is_not_compared() -> None:
    good = point("a", 1, {"output_per_device": 10.0})
    invalid = point("a", 2, {"output_per_device": 10.0}, status="invalid", reason="the cache was hit")
    limited = point("a", 4, {"output_per_device": 10.0}, client=limited_client())
    wrong = point("b", 1, {"output_per_device": 10.0})
    kept, left_out = counted([good, invalid, limited, wrong], [gate("a", passed=True), gate("b")])
    assert kept == [good]
    assert left_out == [
        "a · m · 1k/1k · concurrency 2: the cache was hit",
        "a · m · 1k/1k · concurrency 4: limited by the load generator: the workers' CPUs are full",
        "b · m · 1k/1k · concurrency 1: 10.0% of 500 right, 90.0% asked for",
    ]
    assert pairs_of([good], kept, ["output_per_device"])[0][0].b == [10.0]
