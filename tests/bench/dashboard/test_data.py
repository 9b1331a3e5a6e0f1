"""The page's data from runs: what is combined, what counts, and what must not get out."""

from __future__ import annotations

import datetime
import json
import operator
from pathlib import Path
from typing import Any

import pytest

from skyline.bench import metrics
from skyline.bench.dashboard.data import page_data
from skyline.bench.hardware import prices
from skyline.bench.results import PointResult, RequestTable, Run
from skyline.bench.stats import replicates
from skyline.bench.suite import Accuracy, parse_suite
from tests.bench.dashboard import synthetic

RESULTS = synthetic.results()


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return page_data(*RESULTS, {"EPYC 9454, 2 cores": 0.08, "another machine": 3})


def shown(data: dict[str, Any], run: str = synthetic.LAST, **wanted: object) -> list[dict[str, Any]]:
    """Points of one run by fields of their series and `level`."""
    level = wanted.pop("level", None)
    return [
        point
        for point in data["points"]
        if point["run"] == run
        and (level is None or point["level"]["order"] == level)
        and all(data["series"][point["series"]][name] == value for name, value in wanted.items())
    ]


def test_every_point_is_shown_once(data: dict[str, Any]) -> None:
    runs, points, _ = RESULTS
    assert [run["id"] for run in data["runs"]] == [run.id for run in runs]
    assert len(data["series"]) == 3 * 2 * 3
    assert sorted(id for point in data["points"] for id in point["ids"]) == sorted(point.id for point in points)
    assert len(data["points"]) == len(points) - 2  # three replicates are one point


def test_it_is_plain_json_without_requests(data: dict[str, Any]) -> None:
    text = json.dumps(data, allow_nan=False)
    assert json.loads(text) == data
    assert "intended" not in {key for point in data["points"] for key in point}
    runs, points, accuracy = RESULTS
    heavy = [point.model_copy(update={"requests": RequestTable(start=[0.0] * 10_000)}) for point in points]
    assert json.dumps(page_data(runs, heavy, accuracy, {"EPYC 9454, 2 cores": 0.08})) == text


def test_metrics_keep_value_interval_and_count_exactly(data: dict[str, Any]) -> None:
    points = {point.id: point for point in RESULTS[1]}
    for row in data["points"]:
        if row["replicates"] > 1:
            continue
        for key, estimate in points[row["id"]].metrics.items():
            expected = [estimate.value, estimate.low, estimate.high, estimate.n]
            assert row["metrics"][key] == (expected if estimate.refused is None else [*expected, estimate.refused])
    assert set(data["metrics"]) == set(metrics.keys())
    assert data["metrics"]["ttft_p50"] == {
        "title": "Time to first token, median",
        "unit": "s",
        "better": "lower",
        "formula": "first − start",
    }


def test_replicates_of_a_run_are_combined(data: dict[str, Any]) -> None:
    (row,) = [point for point in data["points"] if len(point["ids"]) > 1]
    members = [point for point in RESULTS[1] if point.id in row["ids"]]
    expected = replicates.combine([point.metrics["output_throughput"] for point in members])
    assert row["replicates"] == 3
    assert row["metrics"]["output_throughput"] == [expected.value, expected.low, expected.high, expected.n]
    assert "p99 needs 662" in row["metrics"]["ttft_p99"][4]


def test_a_failed_replicate_does_not_hide_the_others() -> None:
    runs, points, _ = synthetic.results(dates=1)
    group = [point for point in points if point.spec.key in {p.spec.key for p in points[:1]} or "-r" in point.id]
    lost = group[0].model_copy(update={"status": "failed", "reason": "the server went away", "metrics": {}})
    (row,) = page_data(runs, [lost, *group[1:]], [], {})["points"]
    assert (row["status"], row["replicates"], row["off"]) == ("ok", 2, None)
    assert row["notes"] == ["1 of 3 replicates does not count: the server went away"]


def test_points_off_the_frontier_say_why(data: dict[str, Any]) -> None:
    cases = {
        ("vllm", "demo"): "failed: the engine ended with code 137: out of memory",
        ("llama.cpp", "demo"): "invalid: prefix cache hits: 31 % of the prompt tokens came from it",
        ("skyline", "demo"): "limited by the load generator: the workers' CPUs are full",
        ("llama.cpp", "big"): "accuracy gate: 61.0% on demo, 90.0% is asked for",
        ("vllm", "big"): None,
    }
    for (engine, model), reason in cases.items():
        (point,) = shown(data, engine=engine, model=model, workload="1k/1k", level=16)
        assert point["off"] == reason
    assert {p["accuracy"]["verdict"] for p in shown(data, engine="llama.cpp", model="big")} == {"failed"}
    assert {p["accuracy"]["verdict"] for p in shown(data, engine="vllm")} == {"passed"}
    assert {p["accuracy"]["verdict"] for p in page_data(*RESULTS[:2], [], {})["points"]} == {"none"}


def test_a_failed_point_stays_in_the_series_of_its_engine() -> None:
    runs, points, _ = synthetic.results(dates=1)
    unknown = points[0].provenance.model_copy(update={"engine_version": None})
    failed = points[0].model_copy(update={"status": "failed", "metrics": {}, "provenance": unknown})
    data = page_data(runs, [failed, *points[1:]], [], {})
    assert {row["engine_version"] for row in data["series"] if row["engine"] == "skyline"} == {"0.1.0"}


def test_the_last_result_of_a_resumed_point_counts() -> None:
    runs, points, _ = synthetic.results(dates=1)
    point = points[5]
    failed = point.model_copy(
        update={"id": "first-try", "status": "failed", "finished": point.finished - datetime.timedelta(hours=1)}
    )
    data = page_data(runs, [point, failed], [], {})
    assert [row["ids"] for row in data["points"]] == [[point.id]]


def test_latest_is_the_newest_result_of_each_level(data: dict[str, Any]) -> None:
    assert {point["run"] for point in data["points"] if point["latest"]} == {synthetic.LAST}
    runs, points, accuracy = RESULTS
    # The last run measured one engine only; and a new version takes the place of the old.
    kept = [point for point in points if point.run != synthetic.LAST or point.spec.engine.name == "vllm"]
    upgraded = [
        point.model_copy(update={"provenance": point.provenance.model_copy(update={"engine_version": "0.12.0"})})
        if point.run == synthetic.LAST
        else point
        for point in kept
    ]
    again = page_data(runs, upgraded, accuracy, {})
    latest = {
        (again["series"][point["series"]]["engine"], again["series"][point["series"]]["engine_version"], point["run"])
        for point in again["points"]
        if point["latest"]
    }
    assert latest == {("vllm", "0.12.0", "run5"), ("skyline", "0.1.0", "run4"), ("llama.cpp", "b6900", "run4")}


def test_a_run_of_one_point_leaves_the_ladder_in_sight() -> None:
    runs, points, accuracy = RESULTS
    first = next(point for point in points if point.run == synthetic.LAST)
    data = page_data(runs, [point for point in points if point.run != synthetic.LAST or point is first], accuracy, {})
    latest = [point for point in data["points"] if point["latest"]]
    assert sorted(point["run"] for point in latest) == ["run4"] * (len(latest) - 1) + ["run5"]
    (entry,) = [
        entry
        for entry in data["frontiers"]
        if (entry["model"], entry["workload"], entry["x"], entry["y"])
        == ("demo", "1k/1k", "interactivity", "output_per_device")
    ]
    assert len(entry["points"]) == 15


def test_ids_of_series_do_not_depend_on_what_else_is_there(data: dict[str, Any]) -> None:
    few = page_data(*synthetic.results(dates=1), {})
    assert {row["id"] for row in few["series"]} == {row["id"] for row in data["series"]}
    assert len({row["id"] for row in data["series"]}) == len(data["series"])


@pytest.mark.parametrize("x", ["interactivity", "ttft_p50"])
def test_the_frontier_is_of_the_points_that_count(data: dict[str, Any], x: str) -> None:
    found = [
        entry
        for entry in data["frontiers"]
        if (entry["model"], entry["workload"], entry["x"], entry["y"]) == ("demo", "1k/1k", x, "output_per_device")
    ]
    (entry,) = found
    members = [point for point in shown(data, model="demo", workload="1k/1k") if point["off"] is None]
    assert set(entry["points"]) == {point["id"] for point in members}
    sign = 1 if x == "interactivity" else -1
    at = {point["id"]: (sign * point["metrics"][x][0], point["metrics"]["output_per_device"][0]) for point in members}
    unknown = {point["id"] for point in members if len(point["metrics"][x]) > 4}
    assert len(unknown) == (1 if x == "interactivity" else 0)
    for id, (on, probability) in entry["points"].items():
        better = [key for key, other in at.items() if other != at[id] and all(map(operator.ge, other, at[id]))]
        assert on == (not better)
        if id in unknown or unknown & set(better):
            assert probability is None
        else:
            assert 0 <= probability <= 1
    xs = [row[0] for row in entry["band"]]
    assert xs == sorted(xs, reverse=x != "interactivity")
    assert all(low <= middle <= high for _, middle, low, high in entry["band"])


def test_power_counts_only_where_the_energy_is_valid(data: dict[str, Any]) -> None:
    (entry,) = [
        entry
        for entry in data["frontiers"]
        if (entry["model"], entry["workload"], entry["y"]) == ("demo", "8k/1k", "tokens_per_mw")
    ]
    engines = {point["id"]: data["series"][point["series"]]["engine"] for point in data["points"]}
    assert {engines[id] for id in entry["points"]} == {"skyline", "vllm"}


def test_the_regression_is_found_where_it_began(data: dict[str, Any]) -> None:
    worse = [change for change in data["changes"] if change["regression"] and change["metric"] == "output_per_device"]
    assert worse
    names = {row["config"]: row["engine"] for row in data["series"]}
    for change in worse:
        assert (names[change["config"]], change["model"], change["workload"]) == ("vllm", "demo", "1k/1k")
        assert change["run"] == "run4"
        assert change["relative"] == pytest.approx(-0.14, abs=0.04)


def test_keys_stay_out(data: dict[str, Any]) -> None:
    assert "hf_secret" not in json.dumps(data)
    (point,) = shown(data, engine="vllm", model="big", workload="1k/1k", level=1)
    assert point["engine_command"] == "HF_TOKEN=*** vllm serve org/big --port 8001"
    assert point["suite"]["engines"][0]["env"] == {"VLLM_CPU_KVCACHE_SPACE": "4", "HF_TOKEN": "***"}
    assert point["command"] == f"skyline bench rerun {point['id']}"


def test_a_point_brings_the_suite_that_repeats_it(data: dict[str, Any]) -> None:
    runs, points, accuracy = RESULTS
    gate = Accuracy(at_least=0.9)
    gated = [run.model_copy(update={"suite": run.suite.model_copy(update={"accuracy": gate})}) for run in runs]
    wide = points[0].spec.engine.model_copy(update={"tensor_parallel": 2, "devices": 1})
    spec = points[0].spec.model_copy(update={"engine": wide})
    points = [points[0].model_copy(update={"spec": spec}), *points[1:]]
    for row in page_data(gated, points, accuracy, {})["points"]:
        spec = next(point.spec for point in points if point.id == row["id"])
        suite = parse_suite(json.dumps(row["suite"]))
        assert suite.accuracy == gate
        (again,) = suite.points()
        env = {name: "***" if name == "HF_TOKEN" else value for name, value in spec.engine.env.items()}
        engine = spec.engine.model_copy(update={"env": env})
        assert again == spec.model_copy(update={"engine": engine, "replicate": 0})


def test_prices_are_of_the_hardware_that_is_there(data: dict[str, Any]) -> None:
    assert data["prices"] == {"EPYC 9454, 2 cores": 0.08}
    assert page_data(*RESULTS, {})["prices"] == {"EPYC 9454, 2 cores": None}


def test_the_shipped_prices_are_found_by_their_patterns(tmp_path: Path) -> None:
    names = {"skyline": "8x NVIDIA H100 80GB HBM3", "vllm": "2x AMD EPYC 9454 core (avx512)", "llama.cpp": "Cray-1"}
    table = prices(user=tmp_path / "none.yaml")
    found = page_data(*synthetic.results(dates=1, hardware=names), table)["prices"]
    assert found == {"8x NVIDIA H100 80GB HBM3": 1.30, "2x AMD EPYC 9454 core (avx512)": 2 * 0.05, "Cray-1": None}


def test_points_of_other_runs_are_left_out() -> None:
    runs, points, accuracy = RESULTS
    few = page_data(runs[:2], points, accuracy, {})
    assert {point["run"] for point in few["points"]} == {"run0", "run1"}


def test_progress_of_a_running_benchmark() -> None:
    runs, points, _ = synthetic.results(dates=1, status="running")
    (run,) = page_data(runs, points[:10], [], {})["runs"]
    planned = len(list(runs[0].suite.points()))
    assert (run["status"], run["done"], run["planned"]) == ("running", 10, planned)
    assert run["last"] == max(point.finished for point in points[:10]).isoformat()


def test_nothing_is_shown_of_nothing() -> None:
    empty = page_data([], [], [], {})
    assert [empty[name] for name in ("runs", "series", "points", "frontiers", "changes")] == [[]] * 5


def test_a_run_without_points_is_listed() -> None:
    runs: list[Run] = synthetic.results(dates=1)[0]
    points: list[PointResult] = []
    (run,) = page_data(runs, points, [], {})["runs"]
    assert (run["done"], run["last"]) == (0, runs[0].started.isoformat())
