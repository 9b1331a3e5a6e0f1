from __future__ import annotations

import pytest
import yaml

from skyline.bench.plan import estimate
from skyline.bench.suite import SHIPPED, Accuracy, Suite, SuiteError, load_suite, parse_suite, single

SUITE = """
name: small
models: [{name: m, source: demo}, {name: n, source: /models/n, sources: {llama.cpp: /models/n.gguf}}]
engines: [{engine: skyline}, {engine: vllm, name: vllm-tp2, tensor_parallel: 2, data_parallel: 3}]
scenarios:
  - {name: 1k/1k, input: 1024, output: 1024, ratio: 0.8, load: {kind: closed, concurrency: [1, 4, 16]}}
  - {name: burst, input: 64, output: 16, chat: false, load: {kind: gamma, rate: [2, 5], cv: 2}}
measure: {replicates: 2, warmup_s: 1, min_s: 10, max_s: 20}
exclude: [{engine: vllm-tp2, model: n, scenario: burst}]
"""


def test_every_combination_is_a_point() -> None:
    suite = parse_suite(SUITE)
    points = list(suite.points())
    assert len(points) == 2 * (5 + 5) + 2 * (5 + 3)
    assert len({point.key for point in points}) == len(points)
    assert next(p.engine.devices for p in points if p.engine.name == "vllm-tp2") == 6
    assert (
        suite.models[1].source_for("llama.cpp") == "/models/n.gguf"
        and suite.models[1].source_for("vllm") == "/models/n"
    )
    starts = [(p.engine.name, p.model.name) for p in points]
    assert starts == sorted(starts, key=list(dict.fromkeys(starts)).index), "each engine is started once for a model"
    labels = [point.label for point in points]
    assert labels[0] == "skyline · m · 1k/1k · concurrency 1 · replicate 1"


def test_the_key_is_what_is_measured() -> None:
    first = [point.key for point in parse_suite(SUITE).points()]
    assert first == [point.key for point in parse_suite(SUITE).points()]
    other = parse_suite(SUITE.replace("ratio: 0.8", "ratio: 0.7"))
    changed = sum(a != b for a, b in zip(first, (p.key for p in other.points()), strict=True))
    assert changed == sum(p.workload.name == "1k/1k" for p in other.points())


def test_a_point_is_a_suite_of_its_own() -> None:
    for point in parse_suite(SUITE).points():
        again = list(single(point).points())
        assert len(again) == 1
        assert again[0].model_copy(update={"replicate": point.replicate, "measure": point.measure}) == point


def test_a_point_measured_again_passes_the_same_gate() -> None:
    point = next(parse_suite(SUITE).points())
    gate = Accuracy(at_least=0.9, limit=20)
    assert single(point, gate).accuracy == gate
    of_others, of_it = (gate.model_copy(update={"models": models}) for models in (["x"], ["x", point.model.name]))
    assert single(point, of_others).accuracy is None
    assert single(point, of_it).accuracy == gate


def test_hardware_is_said_of_endpoints_only() -> None:
    endpoint = "engines: [{engine: url, url: 'http://x', hardware: 8x NVIDIA H100}]"
    lines = [endpoint if line.startswith("engines:") else line for line in SUITE.splitlines()[:-1]]
    assert parse_suite("\n".join(lines)).engines[0].hardware == "8x NVIDIA H100"
    with pytest.raises(SuiteError, match="hardware is for an endpoint"):
        parse_suite(SUITE.replace("{engine: skyline}", "{engine: skyline, hardware: x}"))


def test_round_trip() -> None:
    suite = parse_suite(SUITE)
    assert Suite.model_validate_json(suite.model_dump_json()) == suite
    assert parse_suite(yaml.safe_dump(suite.model_dump())).hash == suite.hash


def test_the_plan_adds_up() -> None:
    plan = estimate(parse_suite(SUITE))
    assert (plan.points, plan.starts) == (36, 4)
    assert plan.least_s == 36 * 11 and plan.most_s == 36 * 21
    for load, least in (("kind: ramp, start: 1, end: 9", 21), ("kind: trace, file: trace.jsonl", 1)):
        other = estimate(parse_suite(SUITE.replace("kind: gamma, rate: [2, 5], cv: 2", load)))
        row = next(row for row in other.rows if row.scenario == "burst")
        assert (row.points, row.least_s, row.most_s) == (2, 2 * least, 2 * 21)
    assert {row.levels for row in plan.rows} == {"closed 1, 4, 16", "gamma 2/s, 5/s"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("name: small", "nam: small"), "nam: Extra inputs"),
        (("concurrency: [1, 4, 16]", "concurrency: []"), "at least 1 item"),
        (("concurrency: [1, 4, 16]", "concurrency: [0]"), "greater than or equal to 1"),
        (("kind: closed", "kind: clsed"), "does not match any of the expected tags"),
        (("ratio: 0.8", "ratio: 1.8"), "less than or equal to 1"),
        ((", cv: 2", ""), "goes with kind gamma"),
        (("engine: skyline}", "engine: vllm, name: vllm-tp2}"), "stands there twice"),
        (("scenario: burst}]", "scenario: bursts}]"), "there is no scenario 'bursts'"),
        (("max_s: 20", "max_s: 2"), "must not be below min_s"),
        (("engine: skyline}", "engine: url}"), "needs `url`"),
        (("engine: skyline}", "engine: url, url: 'http://x', args: [a]}"), "leave them out beside"),
    ],
)
def test_what_is_wrong_is_said(change: tuple[str, str], said: str) -> None:
    assert change[0] in SUITE
    with pytest.raises(SuiteError, match=said):
        parse_suite(SUITE.replace(*change))


def test_not_yaml_and_not_there() -> None:
    with pytest.raises(SuiteError, match="not valid YAML"):
        parse_suite("{")
    with pytest.raises(SuiteError, match="must be a mapping"):
        parse_suite("- 1")
    with pytest.raises(SuiteError, match=r"shipped suites: .*quick"):
        load_suite("quik")


def test_sessions_need_a_chat_in_a_closed_loop() -> None:
    sessions = SUITE.replace("ratio: 0.8", "sessions: {turns: 3, shared_prefix: 100}")
    assert next(iter(parse_suite(sessions).points())).workload.sessions is not None
    with pytest.raises(SuiteError, match="conversations"):
        parse_suite(sessions.replace("sessions:", "chat: false, sessions:"))
    with pytest.raises(SuiteError, match="need a closed load"):
        parse_suite(sessions.replace("{kind: closed, concurrency: [1, 4, 16]}", "{kind: poisson, rate: [1]}"))


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_suites(file) -> None:  # type: ignore[no-untyped-def]
    suite = load_suite(file.stem)
    assert suite.name == file.stem and suite.description and list(suite.points())
