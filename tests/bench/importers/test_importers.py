"""Genuine result files of other tools, whose own numbers the imported ones must equal. See data/README.md."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skyline.bench.importers import import_file
from skyline.bench.loads import Level
from skyline.bench.metrics import keys
from skyline.bench.results import Export, PointResult
from skyline.bench.store import open_store

DATA = Path(__file__).parent / "data"
FILES = sorted(path for path in DATA.rglob("*.json"))


def imported(name: str, **overrides: Any) -> tuple[dict[str, Any], PointResult]:
    """The file's own words, and the one point that it becomes."""
    path = DATA / name
    (point,) = import_file(path, **overrides).points
    return json.loads(path.read_text()), point


def agrees(point: PointResult, expected: dict[str, float]) -> None:
    for key, value in expected.items():
        assert point.value(key) == pytest.approx(value, rel=1e-12), key


def of_vllm(data: dict[str, Any]) -> dict[str, float]:
    """What a file of vLLM's format says, in our names and units."""
    expected = {
        "request_throughput": data["request_throughput"],
        "output_throughput": data["output_throughput"],
        "total_throughput": data["total_token_throughput"],
        "input_throughput": data["total_token_throughput"] - data["output_throughput"],
        "interactivity": 1000 / data["median_tpot_ms"],
    }
    for ours, theirs in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2e", "e2el")):
        for statistic in ("mean", "p90", "p95", "p99"):
            if f"{statistic}_{theirs}_ms" in data:
                expected[f"{ours}_{statistic}"] = data[f"{statistic}_{theirs}_ms"] / 1000
        if f"median_{theirs}_ms" in data:
            expected[f"{ours}_p50"] = data[f"median_{theirs}_ms"] / 1000
    return expected


def test_inferencex_aggregated_as_published() -> None:
    data, point = imported("inferencex_agg_1k1k_c4.json")
    expected = {
        "output_per_device": data["output_tput_per_gpu"],
        "input_per_device": data["input_tput_per_gpu"],
        "total_per_device": data["tput_per_gpu"],
        "output_throughput": data["output_tput_per_gpu"] * 8,
        "interactivity": data["median_intvty"],
        "itl_p99": data["p99_itl"],
        "e2e_mean": data["mean_e2el"],
        "ttft_p90": data["p90_ttft"],
        "tpot_p99": data["p99_tpot"],
    }
    agrees(point, expected)
    engine = point.spec.engine
    assert (engine.engine, engine.precision, engine.speculation) == ("vllm", "int4", "mtp")
    assert (engine.devices, engine.tensor_parallel, engine.expert_parallel) == (8, 8, 1)
    assert point.spec.level == Level(kind="closed", concurrency=4)
    assert point.spec.model.name == "moonshotai/Kimi-K2.5"
    assert (point.spec.workload.name, point.spec.workload.input, point.spec.workload.output) == ("1k/1k", 1024, 1024)
    assert point.provenance.hardware.name == "mi355x"
    assert point.provenance.hardware.accelerators == ["mi355x"] * 8
    assert point.provenance.engine_version == "vllm/vllm-openai-rocm:v0.21.0"
    assert point.provenance.imported_from == "inferencex: inferencex_agg_1k1k_c4.json"
    # The file says neither how many requests there were nor a 95th percentile.
    assert point.metrics["ttft_p50"].n == 0
    assert "ttft_p95" not in point.metrics


def test_another_that_was_published() -> None:
    data, point = imported("inferencex_agg_8k1k_c64.json")
    agrees(point, {"output_per_device": data["output_tput_per_gpu"], "interactivity": data["median_intvty"]})
    assert point.spec.workload.name == "8k/1k"


@pytest.mark.parametrize("name", ["inferencex_raw_16gpus_c16.json", "inferencex_raw_glm_c16.json"])
def test_inferencex_raw_as_published(name: str) -> None:
    data, point = imported(name, devices=16)
    agrees(point, of_vllm(data))
    agrees(point, {"output_per_device": data["output_throughput"] / 16, "error_rate": 0})
    assert {e.n for key, e in point.metrics.items() if key.startswith(("ttft", "tpot", "e2e"))} == {160}
    assert all(estimate.low is None and estimate.high is None for estimate in point.metrics.values())
    assert point.spec.level == Level(kind="closed", concurrency=16)
    assert point.spec.workload.input == 1024
    assert point.spec.engine.devices == 16
    assert point.finished - point.started == datetime.timedelta(seconds=round(data["duration"], 6))


def test_a_model_is_named_without_the_folders_it_lay_in() -> None:
    assert imported("inferencex_raw_16gpus_c16.json")[1].spec.model.name == "openai/gpt-oss-120b"
    assert imported("inferencex_raw_glm_c16.json")[1].spec.model.name == "zai-org/GLM-4.7"


def test_vllm_with_its_requests() -> None:
    data, point = imported("vllm_detailed.json")
    agrees(point, of_vllm(data))
    assert "itl_p95" in point.metrics and point.metrics["itl_p50"].n == sum(map(len, data["itls"]))
    assert point.spec.level == Level(kind="closed", concurrency=4)
    assert point.spec.measure.requests == 12
    table = point.requests
    assert table is not None and len(table) == 12
    assert table.start[0] == 0.0 and table.start == sorted(table.start, key=lambda t: t or 0)
    assert table.error == [None] * 12
    assert sorted(table.output) == sorted(data["output_lens"])
    # What the requests say agrees with what vLLM computed from them.
    first = np.array(table.first, float) - np.array(table.start, float)
    assert np.quantile(first, 0.9) == pytest.approx(data["p90_ttft_ms"] / 1000, abs=2e-6)
    tpot = (np.array(table.last, float) - np.array(table.first, float)) / (np.array(table.output) - 1)
    assert np.median(tpot) == pytest.approx(data["median_tpot_ms"] / 1000, abs=1e-6)


def test_what_vllm_does_not_give_follows_from_its_requests(tmp_path: Path) -> None:
    data = json.loads((DATA / "vllm_detailed.json").read_text())
    bare = {key: value for key, value in data.items() if "_e2el_" not in key and "p9" not in key}
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    (point,) = import_file(tmp_path / "bare.json").points
    assert point.value("e2e_mean") == pytest.approx(data["mean_e2el_ms"] / 1000, abs=2e-6)
    # Twelve requests that resemble each other so much are too few for a median of our own.
    assert point.metrics["e2e_p50"].refused and "correlated" in point.metrics["e2e_p50"].refused
    # Twelve requests say nothing of the 99th percentile; vLLM's own file would give one.
    refused = point.metrics["e2e_p99"]
    assert refused.value is None and refused.refused and refused.n == 12
    assert imported("vllm_detailed.json")[1].value("e2e_p99") is not None


def test_vllm_at_a_rate() -> None:
    data, point = imported("vllm_rate.json")
    agrees(point, of_vllm(data))
    level = point.spec.level
    assert (level.kind, level.rate) == ("gamma", 8.0)
    assert level.cv == pytest.approx(2**0.5)
    assert point.spec.workload.chat
    assert point.requests is None
    # 906 tokens in 12 requests: the prompts of 64 with the chat template's.
    assert point.spec.workload.input == 76
    assert imported("vllm_rate.json", input=64)[1].spec.workload.name == "64/32"


def test_vllm_with_failed_requests(tmp_path: Path) -> None:
    data = json.loads((DATA / "vllm_detailed.json").read_text())
    data["errors"][3] = 'Traceback (most recent call last):\n  File "x"\naiohttp.ClientError: gone\n'
    data |= {"completed": 11, "failed": 1}
    data["ttfts"][3], data["itls"][3], data["latencies"][3] = 0.0, [], 0.0
    (tmp_path / "failed.json").write_text(json.dumps(data))
    (point,) = import_file(tmp_path / "failed.json").points
    assert point.value("error_rate") == pytest.approx(1 / 12)
    assert point.requests is not None
    failed = [i for i, error in enumerate(point.requests.error) if error]
    assert [point.requests.error[i] for i in failed] == ["aiohttp.ClientError: gone"]
    assert point.requests.first[failed[0]] is None
    data |= {"completed": 0, "failed": 12, "mean_ttft_ms": float("nan")}
    (tmp_path / "none.json").write_text(json.dumps(data))
    (point,) = import_file(tmp_path / "none.json").points
    assert (point.status, point.reason, point.metrics) == ("failed", "none of its 12 requests ended well", {})


@pytest.mark.parametrize("name", ["guidellm_concurrent.json", "guidellm_format1.json"])
def test_guidellm(name: str) -> None:
    data, point = imported(name)
    benchmark = data["benchmarks"][0]
    metrics = benchmark["metrics"]
    expected = {"request_throughput": 12 / benchmark["duration"], "error_rate": 0.0}
    for ours, theirs in (("ttft", "time_to_first_token_ms"), ("tpot", "inter_token_latency_ms")):
        summary = metrics[theirs]["successful"]
        expected[f"{ours}_mean"] = summary["mean"] / 1000
        for statistic in ("p50", "p90", "p95", "p99"):
            expected[f"{ours}_{statistic}"] = summary["percentiles"][statistic] / 1000
    expected["interactivity"] = 1000 / metrics["inter_token_latency_ms"]["successful"]["median"]
    if data["metadata"]["version"] == 2:
        expected["request_throughput"] = metrics["requests_per_second"]["successful"]["mean"]
        expected["output_throughput"] = metrics["output_tokens_per_second"]["total"]["mean"]
        expected["input_throughput"] = metrics["prompt_tokens_per_second"]["total"]["mean"]
        expected["total_throughput"] = metrics["tokens_per_second"]["total"]["mean"]
    else:
        expected["output_throughput"] = 12 * 32 / benchmark["duration"]
    agrees(point, expected)
    assert point.spec.level == Level(kind="closed", concurrency=4)
    assert point.spec.workload.output == 32
    assert point.spec.workload.chat
    assert "itl_p50" not in point.metrics
    # E2E ends with the last token, and so before GuideLLM's latency, which ends with the response.
    requests = benchmark["requests"]["successful"]
    latency = [r["info"]["timings"]["last_token_iteration"] - r["info"]["timings"]["request_start"] for r in requests]
    assert point.value("e2e_mean") == pytest.approx(np.mean(latency), abs=2e-6)
    assert point.value("e2e_mean") < metrics["request_latency"]["successful"]["mean"]
    assert point.requests is not None and len(point.requests) == 12


def test_guidellm_at_a_rate_with_requests_of_many_lengths() -> None:
    data, point = imported("guidellm_poisson.json")
    benchmark = data["benchmarks"][0]
    requests = benchmark["requests"]
    assert (point.spec.level.kind, point.spec.level.rate) == ("poisson", 10.0)
    assert point.requests is not None
    cut = [error for error in point.requests.error if error]
    assert set(cut) == {"under way at the end"} and len(cut) == len(requests["incomplete"])
    # GuideLLM weighs requests by their tokens; TPOT here does not.
    per_request = [request["inter_token_latency_ms"] / 1000 for request in requests["successful"]]
    assert len({request["output_tokens"] for request in requests["successful"]}) > 1
    assert point.value("tpot_mean") == pytest.approx(np.mean(per_request), abs=2e-6)
    weighed = benchmark["metrics"]["inter_token_latency_ms"]["successful"]["mean"] / 1000
    assert point.value("tpot_mean") != pytest.approx(weighed, rel=1e-3)
    # From when a request should have started, which its schedule says.
    late = [
        r["info"]["timings"]["request_start"] - r["info"]["timings"]["targeted_start"] for r in requests["successful"]
    ]
    ttft, intended = point.value("ttft_mean"), point.value("ttft_intended_mean")
    assert ttft is not None and intended is not None
    assert intended - ttft == pytest.approx(np.mean(late), abs=2e-6)


@pytest.mark.parametrize("name", ["aiperf_published_c16.json", "aiperf_concurrency/profile_export_aiperf.json"])
def test_aiperf(name: str) -> None:
    data, point = imported(name)
    expected = {
        "request_throughput": data["request_throughput"]["avg"],
        "output_throughput": data["output_token_throughput"]["avg"],
        "total_throughput": data["total_token_throughput"]["avg"],
        "input_throughput": data["total_token_throughput"]["avg"] - data["output_token_throughput"]["avg"],
        "interactivity": 1000 / data["inter_token_latency"]["p50"],
        "error_rate": 0.0,
    }
    theirs = {"ttft": "time_to_first_token", "tpot": "inter_token_latency", "itl": "inter_chunk_latency"}
    for ours, name in (theirs | {"e2e": "request_latency"}).items():
        expected[f"{ours}_mean"] = data[name]["avg"] / 1000
        expected |= {f"{ours}_{p}": data[name][p] / 1000 for p in ("p50", "p90", "p95", "p99")}
        assert point.metrics[f"{ours}_p50"].n == data[name]["count"]
    agrees(point, expected)
    assert point.spec.level.kind == "closed"
    assert point.status == "ok"


def test_aiperf_takes_the_requests_from_beside_its_summary() -> None:
    data, point = imported("aiperf_gamma/profile_export_aiperf.json")
    level = point.spec.level
    assert (level.kind, level.rate, level.cv) == ("gamma", 10.0, 0.5)
    table = point.requests
    # Two more were for warming up.
    assert table is not None and len(table) == 12
    tpot = (np.array(table.last, float) - np.array(table.first, float)) / (np.array(table.output) - 1)
    assert tpot.mean() == pytest.approx(data["inter_token_latency"]["avg"] / 1000, abs=1e-6)
    e2e = np.array(table.last, float) - np.array(table.start, float)
    assert np.quantile(e2e, 0.9) == pytest.approx(data["request_latency"]["p90"] / 1000, abs=2e-6)
    assert imported("aiperf_published_c16.json")[1].requests is None


def test_what_is_imported_is_in_our_words_and_fits_the_store(tmp_path: Path) -> None:
    known = set(keys())
    assert len(FILES) >= 11
    with open_store(tmp_path / "bench.sqlite3") as store:
        for path in FILES:
            export = import_file(path)
            (run,) = export.runs
            assert store.import_(export) == (1, len(export.points), 0)
            assert store.import_(import_file(path)) == (0, 0, 0)
            for point in export.points:
                assert set(point.metrics) <= known
                assert point.key == point.spec.key
                assert point.run == run.id
                assert store.point(point.id) == point
            assert run.status == "finished" and run.label == path.name
            assert Export.model_validate_json(export.model_dump_json()) == export
        assert len(store.runs()) == len(FILES)
