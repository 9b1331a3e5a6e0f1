"""Files with several points, files that are wrong, and what the caller says besides."""

from __future__ import annotations

import datetime
import json
import os
import random
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest

from skyline.bench.importers import ResultFileError, import_file
from skyline.bench.results import Export
from tests.bench.importers.test_importers import DATA, FILES
from tests.bench.store.records import make_run


def load(name: str) -> Any:
    return json.loads((DATA / name).read_text())


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def to_file(data: Any, name: str = "result.json") -> Path:
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    return to_file


def test_a_list_of_results_is_a_run_of_several_points(write: Any) -> None:
    one, two = load("inferencex_agg_1k1k_c4.json"), load("inferencex_agg_8k1k_c64.json")
    wide = one | {"tp": 16, "conc": 8}
    for data in ([one, two, wide, one], {"benchmarks": [one, two, wide, one], "evaluations": []}):
        export = import_file(write(data))
        (run,) = export.runs
        assert len(export.points) == len({point.key for point in export.points}) == 4
        # One engine at two widths has two names, and what is there twice is a repetition.
        assert [p.spec.engine.name for p in export.points] == [
            "vllm ×8 tp8 ep1 int4 mtp",
            "vllm ×8 tp8 ep1 int4 mtp",
            "vllm ×16 tp16 ep1 int4 mtp",
            "vllm ×8 tp8 ep1 int4 mtp",
        ]
        assert [p.spec.replicate for p in export.points] == [0, 0, 0, 1]
        assert {engine.name for engine in run.suite.engines} == {p.spec.engine.name for p in export.points}
        loads = {scenario.name: scenario.load.model_dump()["concurrency"] for scenario in run.suite.scenarios}
        assert loads == {"1k/1k": [4, 8], "8k/1k": [64]}
        assert run.suite.hash == run.suite_hash


def test_output_of_disaggregated_servers_is_divided_by_all_gpus(write: Any) -> None:
    """As InferenceX divides its raw result for 8 GPUs that prefill and 4 that decode."""
    raw = load("inferencex_raw_16gpus_c16.json")
    total, output = raw["total_token_throughput"], raw["output_throughput"]
    entry = load("inferencex_agg_1k1k_c4.json")
    for key in ("tp", "ep", "dp_attention"):
        del entry[key]
    entry |= {
        "disagg": True,
        "is_multinode": True,
        "num_prefill_gpu": 8,
        "num_decode_gpu": 4,
        "prefill_tp": 8,
        "decode_tp": 4,
        "tput_per_gpu": total / 12,
        "output_tput_per_gpu": output / 4,
        "input_tput_per_gpu": (total - output) / 8,
    }
    (point,) = import_file(write(entry)).points
    assert point.spec.engine.devices == 12 and point.spec.engine.tensor_parallel == 4
    assert point.value("output_throughput") == pytest.approx(output)
    assert point.value("output_per_device") == pytest.approx(output / 12)
    assert point.value("input_per_device") == pytest.approx((total - output) / 12)
    assert point.value("total_per_device") == pytest.approx(total / 12)
    # Several nodes without servers that only decode: all GPUs do both.
    entry |= {"num_decode_gpu": 0, "tput_per_gpu": total / 8, "output_tput_per_gpu": output / 8}
    (point,) = import_file(write(entry)).points
    assert point.spec.engine.devices == 8
    assert point.value("output_per_device") == pytest.approx(output / 8)


def test_power_is_taken_where_it_is_valid(write: Any) -> None:
    entry = load("inferencex_agg_1k1k_c4.json")
    entry |= {
        "power_valid": 1,
        "avg_total_gpu_power_w": 1000.0,
        "total_gpu_energy_j": 10000.0,
        "joules_per_output_token": 0.1,
        "benchmark_outcome": {"status": "passed", "requested": 40, "completed": 40, "failed": 0},
    }
    (point,) = import_file(write(entry)).points
    assert point.value("power") == 1000.0 and point.value("energy_per_token") == 0.1
    assert point.value("tokens_per_mw") == pytest.approx(entry["output_tput_per_gpu"] * 8 / 1000 * 1e6)
    assert point.energy is not None and (point.energy.joules, point.energy.verdict.status) == (10000.0, "valid")
    assert point.metrics["ttft_p50"].n == 40 and point.spec.measure.requests == 40
    entry |= {"power_valid": 0, "power_invalid_reasons": ["sample_gap"]}
    (point,) = import_file(write(entry)).points
    assert point.value("power") is None and point.value("tokens_per_mw") is None
    assert point.energy is not None and point.energy.verdict.reason == "sample_gap"
    entry["benchmark_outcome"] = {"status": "failed", "requested": 40, "completed": 30, "failed": 10}
    (point,) = import_file(write(entry)).points
    assert point.status == "invalid" and "10 of 40 requests failed" in (point.reason or "")


def test_appended_results_of_vllm(write: Any) -> None:
    lines = [json.dumps(load("vllm_detailed.json")), json.dumps(load("vllm_rate.json"))]
    export = import_file(write("\n".join(lines), "appended.json"))
    assert [point.spec.level.kind for point in export.points] == ["closed", "gamma"]
    assert export.runs[0].started == min(point.started for point in export.points)


def test_loads_of_vllm(write: Any) -> None:
    data = load("vllm_rate.json")

    def level(**changes: Any) -> Any:
        return import_file(write(data | changes)).points[0].spec.level

    assert level(burstiness=1.0).kind == "poisson"
    assert level(burstiness=1.0, max_concurrency=5).concurrency == 5
    # Without a rate and a limit all requests are sent at once.
    assert level(request_rate="inf").concurrency == 12
    ramp = level(request_rate="inf", ramp_up_strategy="linear", ramp_up_start_rps=1, ramp_up_end_rps=9)
    assert (ramp.kind, ramp.rate, ramp.end_rate) == ("ramp", 1.0, 9.0)
    with pytest.raises(ResultFileError, match="exponential"):
        level(request_rate="inf", ramp_up_strategy="exponential", ramp_up_start_rps=1, ramp_up_end_rps=9)


def test_loads_of_guidellm(write: Any) -> None:
    data = load("guidellm_concurrent.json")

    def level(**strategy: Any) -> Any:
        data["benchmarks"][0]["config"]["strategy"] = strategy
        return import_file(write(data)).points[0].spec.level

    assert level(type_="synchronous").concurrency == 1
    assert level(type_="throughput", max_concurrency=None).concurrency == 12
    assert level(type_="throughput", max_concurrency=7).concurrency == 7
    assert (level(type_="constant", rate=2.5).kind, level(type_="constant", rate=2.5).rate) == ("constant", 2.5)
    with pytest.raises(ResultFileError, match="a load of the kind trace"):
        level(type_="trace", time_scale=1.0)


def test_a_sample_of_guidellms_requests_says_nothing_of_all(write: Any) -> None:
    data = load("guidellm_poisson.json")
    data["benchmarks"][0]["config"]["sample_size"] = 2
    (point,) = import_file(write(data)).points
    assert point.requests is None
    assert "tpot_mean" not in point.metrics and "e2e_mean" not in point.metrics
    assert point.value("ttft_mean") is not None


def test_aiperf_before_it_had_phases(write: Any) -> None:
    """Its input_config up to 0.8 (aiperf/common/config/loadgen_config.py)."""
    data = load("aiperf_published_c16.json")
    data["input_config"] = {"endpoint": {"model_names": ["a/b"], "type": "chat"}, "loadgen": {"concurrency": 16}}
    (point,) = import_file(write(data)).points
    assert point.spec.level.concurrency == 16 and point.spec.model.name == "a/b"
    data["input_config"]["loadgen"] = {"request_rate": 3.0, "arrival_pattern": "constant", "request_count": 96}
    (point,) = import_file(write(data)).points
    assert (point.spec.level.kind, point.spec.level.rate) == ("constant", 3.0)


def test_aiperf_that_did_not_end_is_shown_as_invalid(write: Any) -> None:
    (point,) = import_file(write(load("aiperf_published_c16.json") | {"was_cancelled": True})).points
    assert (point.status, point.reason) == ("invalid", "AIPerf was cancelled before its end")


def test_what_the_caller_knows_better(write: Any) -> None:
    path = DATA / "vllm_rate.json"
    export = import_file(
        path,
        "vllm",
        label="nightly",
        engine="sglang",
        engine_version="0.5",
        model="qwen",
        hardware="8 × H100",
        devices=8,
        precision="fp8",
        speculation="eagle",
        input=64,
        output=32,
        ratio=0.8,
    )
    (point,) = export.points
    plain = import_file(path)
    assert export.runs[0].label == "nightly"
    assert (point.spec.engine.name, point.spec.engine.precision, point.spec.engine.speculation) == (
        "sglang",
        "fp8",
        "eagle",
    )
    assert point.provenance.engine_version == "0.5" and point.provenance.hardware.name == "8 × H100"
    assert (point.spec.model.name, point.spec.workload.name, point.spec.workload.ratio) == ("qwen", "64/32", 0.8)
    assert point.value("output_per_device") == pytest.approx((plain.points[0].value("output_per_device") or 0) / 8)
    # The same file: to import it again with better facts replaces what it gave.
    assert (export.runs[0].id, point.id) == (plain.runs[0].id, plain.points[0].id)


def test_when_it_was_measured_if_the_file_does_not_say(write: Any) -> None:
    path = write(load("inferencex_agg_1k1k_c4.json"))
    os.utime(path, (1_750_000_000, 1_750_000_000))
    assert import_file(path).points[0].started.timestamp() == 1_750_000_000
    day = datetime.datetime(2026, 5, 1, tzinfo=datetime.UTC)
    assert import_file(path, date=day).points[0].finished == day


def test_lengths_that_the_file_does_not_say(write: Any) -> None:
    entry = load("inferencex_agg_1k1k_c4.json")
    del entry["isl"]
    with pytest.raises(ResultFileError, match="does not say the lengths; give them as `input` and `output`"):
        import_file(write(entry))
    assert import_file(write(entry), input=1000).points[0].spec.workload.input == 1000
    with pytest.raises(ResultFileError, match="agentic-coding, whose requests differ"):
        import_file(write(entry | {"scenario_type": "agentic-coding"}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", "is empty"),
        ("metadata:\n  version: 2\n", "is not JSON .*only JSON"),
        ("[]", "is no result file of vllm, guidellm, aiperf, inferencex"),
        ("{}", "is no result file of vllm"),
        ("[1]", "entry 1 should be an object, and is 1"),
        ('{"a": 1}\n{"b": 2}', "is no result file of vllm"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_files_of_no_tool(write: Any, content: str, message: str) -> None:
    with pytest.raises(ResultFileError, match=message):
        import_file(write(content))


def test_paths_that_cannot_be_read(tmp_path: Path, write: Any) -> None:
    with pytest.raises(ResultFileError, match=r"cannot read .*missing\.json: No such file"):
        import_file(tmp_path / "missing.json")
    with pytest.raises(ResultFileError, match=r"cannot read .*: Is a directory"):
        import_file(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultFileError, match="is not text"):
        import_file(tmp_path / "binary")


def test_files_that_belong_elsewhere(write: Any) -> None:
    with pytest.raises(ResultFileError, match=r"import profile_export_aiperf\.json"):
        import_file(DATA / "aiperf_gamma" / "profile_export.jsonl")
    store = Export(runs=[make_run()], points=[]).model_dump_json()
    with pytest.raises(ResultFileError, match="skyline bench store import"):
        import_file(write(store))
    data = load("guidellm_concurrent.json")
    data["metadata"]["version"] = 3
    with pytest.raises(ResultFileError, match="is in its format 3; only"):
        import_file(write(data))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vllm_rate.json", {"completed": None}, "completed is missing"),
        ("vllm_rate.json", {"completed": "all"}, "completed should be a number, and is text"),
        ("vllm_rate.json", {"output_throughput": float("inf")}, "output_throughput is missing"),
        ("vllm_rate.json", {"date": "yesterday"}, "'yesterday' is no time"),
        ("vllm_rate.json", {"model_id": 7}, "model_id should be text, and is 7"),
        ("vllm_rate.json", {"request_rate": -1.0}, "out of range"),
        ("vllm_rate.json", {"num_prompts": 10**9}, "out of range"),
        ("vllm_detailed.json", {"ttfts": [0.1]}, "differ in length"),
        ("vllm_detailed.json", {"ttfts": "many"}, "ttfts should be a list, and is text"),
        ("vllm_detailed.json", {"start_times": [None] * 12}, r"start_times\[0\] should be a number, and is null"),
        ("vllm_detailed.json", {"itls": [None] * 12}, r"itls\[0\] should be a list"),
        ("inferencex_agg_1k1k_c4.json", {"tp": None}, "tp is missing, the number of GPUs"),
        ("inferencex_agg_1k1k_c4.json", {"conc": 0}, "out of range"),
        ("guidellm_concurrent.json", {"benchmarks": []}, "holds no result"),
        ("guidellm_concurrent.json", {"benchmarks": [{}]}, r"benchmarks\[0\]: config is missing"),
        ("aiperf_published_c16.json", {"request_latency": 5}, "request_latency should be an object, and is 5"),
        ("aiperf_published_c16.json", {"time_to_first_token": {"unit": "furlong"}}, "furlong is no unit of time"),
        ("aiperf_published_c16.json", {"start_time": None}, "start_time is missing"),
    ],
)
def test_fields_that_are_wrong(write: Any, name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ResultFileError, match=message):
        import_file(write(load(name) | changes))


JUNK = [None, "", "x", "9" * 400, -1, 0, 1e308, float("nan"), True, [], {}, [None], {"unit": "ms"}]


def _leaves(data: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield way
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from _leaves(value, (*way, key))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_whatever_is_damaged_nothing_but_our_error_comes_out(path: Path, write: Any) -> None:
    draw = random.Random(path.name)
    original = path.read_text()
    ways = [way for way in _leaves(json.loads(original)) if way]
    refused = 0
    for _ in range(40):
        data = json.loads(original)
        *before, last = draw.choice(ways)
        reduce(getitem, before, data)[last] = draw.choice(JUNK)
        try:
            export = import_file(write(data))
        except ResultFileError as error:
            refused += 1
            assert str(error)
        else:
            assert Export.model_validate_json(export.model_dump_json()) == export
    assert refused < 40


def test_overrides_that_are_wrong() -> None:
    path = DATA / "vllm_rate.json"
    with pytest.raises(ResultFileError, match=r"'genai-perf' is no tool .*: there are vllm, guidellm"):
        import_file(path, "genai-perf")
    with pytest.raises(ResultFileError, match=r"gpus: .*\(there are label, engine,"):
        import_file(path, gpus=8)
    with pytest.raises(ResultFileError, match="devices: "):
        import_file(path, devices=0)
    with pytest.raises(ResultFileError, match="is missing"):
        import_file(path, "aiperf")
