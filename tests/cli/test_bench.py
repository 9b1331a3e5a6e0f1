"""The benchmark's commands, against the null server and results that were never measured."""

from __future__ import annotations

import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from skyline.bench.comparison import paired_suite
from skyline.bench.estimate import Estimate
from skyline.bench.results import Run
from skyline.bench.standing import eligible
from skyline.bench.store import open_store
from skyline.bench.suite import load_suite
from skyline.cli import app
from tests.bench.null import null_server
from tests.bench.points import WHEN, gate, point

SUITE = """
name: small
description: two levels
models: [{name: demo, source: demo}]
engines: [{engine: url, name: %(name)s, url: '%(url)s'}]
scenarios: [{name: w, input: 64, output: 8, load: {kind: closed, concurrency: [1, 2]}}]
measure: {warmup_s: 0.2, min_s: 0.6, max_s: 20, requests: 12, requests_per_client: 1}
slo: {ttft_s: 1}
"""


@pytest.fixture(scope="module")
def null_url() -> Iterator[str]:
    with null_server() as url:
        yield url


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "bench.sqlite3"


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_from_a_plan_to_a_recommendation(null_url: str, store: Path, tmp_path: Path) -> None:
    suite = tmp_path / "small.yaml"
    suite.write_text(SUITE % {"url": null_url, "name": "nothing"})
    planned = json.loads(bench("plan", suite, "--json").stdout)
    assert (planned["points"], planned["starts"]) == (2, 1)

    done = bench("run", suite, "--store", store, "--label", "first", "--folder", tmp_path)
    assert done.exit_code == 0, done.output
    assert "interactivity, tok/s/user" in done.stdout and "● nothing" in done.stdout
    assert "nothing · demo · w · concurrency 2" in done.stdout

    with open_store(store) as results:
        points = results.points()
    # On a busy machine a point may be taken off because the client was the limit, or have no intervals to judge by.
    judged = ("ttft_p50", "tpot_p50")
    good = {
        point.spec.label
        for point in points
        if eligible(point, []) is None and not any(point.metrics[key].refused for key in judged)
    }
    best = bench("recommend", "--slo", "ttft_p50=10s,tpot_p50=10s", "--store", store, "--json")
    assert best.exit_code == (0 if good else 1), best.output
    assert {c["configuration"] for c in json.loads(best.stdout)["recommended"]} == good
    said = bench("recommend", "--slo", "tpot_p50=10s", "--store", store).stdout
    assert not good or (next(iter(good)) in said and "skyline bench rerun" in said)
    nothing = bench("recommend", "--slo", "tpot_p50=1us", "--store", store)
    assert nothing.exit_code == 1

    again = bench("rerun", points[0].id[:10], "--store", store, "--folder", tmp_path)
    assert again.exit_code == 0, again.output
    listed = bench("store", "list", "--store", store).stdout
    assert "first" in listed and "rerun" in listed and "2/2" in listed and "1/1" in listed
    assert "✓" in bench("store", "show", "first", "--store", store).stdout

    site = bench("export", tmp_path / "site", "--store", store)
    assert site.exit_code == 0 and Path(site.stdout.strip()).is_file()

    carried = tmp_path / "results.json"
    assert bench("store", "export", carried, "--store", store).exit_code == 0
    other = tmp_path / "other.sqlite3"
    assert "2 runs, 3 points, 0 accuracy results added" in bench("store", "import", carried, "--store", other).output
    assert "0 runs, 0 points" in bench("store", "import", carried, "--store", other).output
    assert bench("store", "delete", "first", "--store", other).exit_code == 0
    assert "first" not in bench("store", "list", "--store", other).stdout


def test_a_plan_says_what_stands_against_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = tmp_path / "three.yaml"
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    engines = (
        "[{engine: url, name: far, url: 'http://127.0.0.1:9', api_key_env: NO_SUCH_KEY}, {engine: skyline}, "
        "{engine: skyline, name: wide, tensor_parallel: 2}, {engine: llama.cpp, version: installed}]"
    )
    text = SUITE % {"url": "http://127.0.0.1:9", "name": "x"}
    suite.write_text(text.replace("[{engine: url, name: x, url: 'http://127.0.0.1:9'}]", engines))
    planned = json.loads(bench("plan", suite, "--json").stdout)
    far, wide, llama = planned["obstacles"]
    assert "far: the variable NO_SUCH_KEY" in far and "not set" in far
    assert wide == "wide: skyline has no tensor_parallel here; leave it out or set it to 1"
    assert "there is no llama-server on PATH" in llama
    said = bench("plan", suite)
    assert said.exit_code == 0 and said.output.count("cannot be measured here") == 3

    suite.write_text(suite.read_text().replace("{engine: skyline}", "{engine: vlm}"))
    unknown = bench("plan", suite)
    assert unknown.exit_code == 1
    assert "no engine 'vlm', there are skyline, vllm, sglang, llama.cpp" in " ".join(unknown.output.split())


def test_an_endpoint_instead_of_the_suites_engines(null_url: str, store: Path, tmp_path: Path) -> None:
    suite = tmp_path / "small.yaml"
    suite.write_text(SUITE % {"url": "http://127.0.0.1:9", "name": "elsewhere"})
    done = bench("run", suite, "--url", null_url, "--store", store, "--folder", tmp_path)
    assert done.exit_code == 0, done.output
    assert "endpoint · demo · w · concurrency 2" in done.stdout
    failed = bench("run", suite, "--store", store, "--folder", tmp_path)
    assert failed.exit_code == 1 and "127.0.0.1:9" in failed.output


def filled(store: Path, runs: dict[str, float], spread: float = 0.003) -> None:
    """A run for each name with four replicates around its throughput."""
    with open_store(store) as results:
        for number, (label, throughput) in enumerate(runs.items()):
            when = WHEN + datetime.timedelta(days=number)
            origin = point().provenance
            suite = load_suite("quick")
            run = Run(id=label, suite=suite, suite_hash=suite.hash, label=label, started=when, provenance=origin)
            results.save_run(run.model_copy(update={"status": "finished", "finished": when}))
            for i in range(4):
                value = throughput * (1 + spread * (i - 1.5))
                results.save_point(point("skyline", 4, {"output_per_device": value}, run=label, replicate=i, when=when))


@pytest.mark.parametrize(
    ("throughput", "verdict", "said", "code"),
    [(100.0, "same", "the same as", 0), (112.0, "better", "better than", 0), (90.0, "worse", "worse than", 1)],
)
def test_comparing_stored_runs(store: Path, throughput: float, verdict: str, said: str, code: int) -> None:
    filled(store, {"main": 100.0, "branch": throughput})
    done = bench("compare", "main", "branch", "--metric", "output_per_device", "--store", store)
    assert done.exit_code == code, done.output
    assert f"branch is {said} main" in done.stdout
    found = json.loads(
        bench("compare", "main", "branch", "--metric", "output_per_device", "--store", store, "--json").stdout
    )
    assert found["verdict"] == verdict and found["exit_code"] == code


def test_comparing_what_is_too_noisy_says_what_it_would_take(store: Path) -> None:
    filled(store, {"main": 100.0})
    with open_store(store) as results:
        run = results.run("main")
        results.save_run(run.model_copy(update={"id": "branch", "label": "branch"}))
        for i, value in enumerate((80.0, 125.0, 95.0, 104.0)):
            results.save_point(point("skyline", 4, {"output_per_device": value}, run="branch", replicate=i))
    done = bench("compare", "main", "branch", "--metric", "output_per_device", "--store", store)
    assert done.exit_code == 3 and "pairs" in done.stdout


def test_comparing_two_engines_of_one_stored_run(store: Path) -> None:
    filled(store, {"main": 100.0})
    with open_store(store) as results:
        for i in range(4):
            results.save_point(point("vllm", 4, {"output_per_device": 80.0 + 0.1 * i}, run="main", replicate=i))
    compare = ["--metric", "output_per_device", "--store", store]
    done = bench("compare", "main:skyline", "main:vllm", *compare)
    assert done.exit_code == 1 and "main:vllm is worse than main:skyline" in done.stdout, done.output
    refused = bench("compare", "main", "main", *compare)
    assert refused.exit_code == 1 and "main:skyline, main:vllm" in refused.output
    assert (
        "no engine 'sglang'; it has skyline, vllm" in bench("compare", "main:skyline", "main:sglang", *compare).output
    )
    assert "there is no run 'other'" in bench("compare", "main:skyline", "other:vllm", *compare).output


def test_a_point_that_was_imported_again_is_said_to_be_replaced(store: Path) -> None:
    file = Path(__file__).parents[1] / "bench" / "importers" / "data" / "vllm_rate.json"
    first, second = (bench("import", file, "--store", store).stdout for _ in range(2))
    assert first == f"{file}: 1 point\n" and second == f"{file}: 1 point, in place of what it gave before\n"
    scenario = ["--model", "demo", "--scenario", "76/32"]
    said = bench("recommend", "--slo", "tpot_p50=1s", *scenario, "--store", store)
    assert said.exit_code == 1 and "kept by its values, how surely is unknown (tpot_p50 is" in said.stdout


def test_history_marks_what_changed(store: Path) -> None:
    filled(
        store,
        {f"run{i}": 100.0 + (i % 3) * 0.2 for i in range(8)} | {f"late{i}": 80.0 + (i % 3) * 0.2 for i in range(6)},
    )
    done = bench("history", "--store", store)
    assert done.exit_code == 0 and "-20" in done.stdout.replace("−", "-")
    assert bench("history", "--store", store, "--fail-on-regression").exit_code == 1


def test_what_does_not_count_is_said_everywhere(store: Path) -> None:
    filled(store, {"main": 100.0, "branch": 100.0})
    with open_store(store) as results:
        results.save_accuracy(gate("skyline", run="branch"))
    assert bench("recommend", "--slo", "output_per_device=1", "--store", store).exit_code == 1, "branch is the newest"
    compared = bench("compare", "main", "branch", "--metric", "output_per_device", "--store", store)
    assert compared.exit_code == 1 and compared.output.count("10.0% of 500 right") == 1, "of four replicates once"
    assert "4 replicates of A alone" in compared.output
    followed = bench("history", "--store", store)
    assert followed.exit_code == 0 and "4 of 8 points do not count" in followed.stderr
    assert "10.0% of 500 right" in followed.stderr


def test_a_recommendation_says_how_sure_it_is(store: Path) -> None:
    short = Estimate(value=150.0, n=9, refused="an interval needs about 40 samples")
    filled(store, {"main": 100.0})
    objective = ["recommend", "--slo", "output_per_device=1", "--store", store]
    assert "the only one that keeps the objective" in bench(*objective).stdout
    with open_store(store) as results:
        results.save_point(point("skyline", 8, {"output_per_device": (120.0, 118.0, 122.0)}, run="main"))
    said = bench(*objective).stdout
    assert "120 (118–122) output tok/s/device (95 %)" in said
    assert "the most of 2 that keep the objective, with probability 100%" in said
    assert "concurrency 4: 100" in said and "the most with probability 0%" in said
    with open_store(store) as results:
        results.save_point(point("skyline", 16, {"output_per_device": short, "interactivity": 2.0}, run="main"))
    said = bench("recommend", "--slo", "interactivity=1", "--store", store).stdout
    assert "150 (no interval) output tok/s/device\n" in said and "the only one" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "quik"], "shipped suites"),
        (["run", "quick", "--engine", "vlm"], "no 'vlm' among its engines"),
        (["run", "quick", "--served-model", "x"], "name it too"),
        (["run", "quick", "--model", "demo", "--api-key-env", "KEY"], "name it too"),
        (["run", "quick", "--resume"], "was cut short"),
        (["rerun", "0123"], "there is no point"),
        (["compare", "a", "b"], "there is no run"),
        (["compare", "skyline", "vlm", "--suite", "quick"], "no engine 'vlm'"),
        (["compare", "a", "b", "--metric", "speed"], "no metric 'speed'"),
        (["recommend", "--slo", "fast"], "no metric"),
        (["recommend", "--slo", "ttft=1s"], "no valid result"),
        (["history"], "no result"),
        (["watch", "quick", "--every", "soon"], "soon"),
        (["watch", "quick", "--every", "7m", "--print-cron"], "cron"),
        (["watch", "quick", "--every", "6h", "--print-cron", "--count", "3"], "--count is for watching here"),
        (["watch", "quick", "--every", "6h", "--print-cron", "--print-workflow"], "choose one"),
        (["watch", "quick", "--every", "6h", "--print-workflow"], "--store are of this machine"),
        (["watch", "quik", "--every", "6h", "--print-cron"], "shipped suites"),
        (["compare", "a", "b", "--pairs", "6", "--label", "x"], "--pairs and --label are about measuring"),
        (["compare", "a", "b", "--folder", "x"], "--folder are about measuring"),
        (["compare", "a", "b", "--resume"], "--resume are about measuring"),
        (["store", "show", "x"], "there is no run"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(store: Path, arguments: list[str], said: str) -> None:
    place = [] if arguments[0] == "plan" else ["--store", str(store)]
    done = bench(*arguments, *place)
    assert done.exit_code == 1 and said in done.output and "Traceback" not in done.output


def test_exit_codes_of_a_run_say_whether_points_failed(null_url: str, store: Path, tmp_path: Path) -> None:
    suite = tmp_path / "two.yaml"
    text = (SUITE % {"url": null_url, "name": "there"}).replace("[1, 2]", "[1]")
    suite.write_text(text.replace("engines: [", "engines: [{engine: url, name: gone, url: 'http://127.0.0.1:9'}, "))
    run = ["run", suite, "--store", store, "--folder", tmp_path]
    assert bench(*run, "--engine", "there").exit_code == 0
    assert bench(*run).exit_code == 3
    assert bench(*run, "--engine", "gone").exit_code == 1


def test_a_folder_that_cannot_be_written_costs_the_engines_points(store: Path) -> None:
    done = bench("run", "quick", "--engine", "transformers", "--store", store, "--folder", "/dev/null/x")
    assert done.exit_code == 1 and "/dev/null/x" in done.output and "Traceback" not in done.output


def test_a_site_that_cannot_be_written(store: Path) -> None:
    filled(store, {"main": 100.0})
    done = bench("export", "/dev/null/site", "--store", store)
    assert done.exit_code == 1 and "cannot write the site" in done.output and "Traceback" not in done.output


def test_bad_prices_stop_what_needs_them_before_it_begins(
    null_url: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    prices = tmp_path / ".config" / "skyline" / "prices.yaml"
    prices.parent.mkdir(parents=True)
    prices.write_text("NVIDIA H100*: cheap")
    suite = tmp_path / "small.yaml"
    suite.write_text(SUITE % {"url": null_url, "name": "nothing"})
    for command in (["run", suite, "--folder", tmp_path], ["export", tmp_path / "site"]):
        done = bench(*command, "--store", store)
        assert done.exit_code == 1 and "'cheap' is not a price" in done.output and "Traceback" not in done.output
    with open_store(store) as results:
        assert results.runs() == []


def test_bad_files(store: Path, tmp_path: Path) -> None:
    junk = tmp_path / "junk.json"
    junk.write_text('{"hello": 1}')
    for command in (["import"], ["store", "import"]):
        done = bench(*command, junk, "--store", store)
        assert done.exit_code == 1 and "junk.json" in done.output
    broken = tmp_path / "broken.sqlite3"
    broken.write_bytes(b"this is no database" * 100)
    done = bench("store", "list", "--store", broken)
    assert done.exit_code == 1 and "broken.sqlite3" in done.output


def test_schedules_are_printed_with_all_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SKYLINE_BENCH_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    watch = ["watch", "quick", "--engine", "skyline"]
    printed = bench(*watch, "--every", "6h", "--print-cron", "--store", "s.db", "--folder", "my engines").stdout.strip()
    assert shlex.split(printed)[5:] == [
        *("skyline", "bench", "run", "quick", "--engine", "skyline"),
        *("--store", str(tmp_path / "s.db"), "--folder", str(tmp_path / "my engines")),
    ]
    (tmp_path / "mine.yaml").write_text(SUITE % {"url": "http://127.0.0.1:9", "name": "nobody"})
    printed = bench("watch", "mine.yaml", "--every", "6h", "--print-cron", "--store", "postgresql://db/x").stdout
    assert f"skyline bench run {tmp_path / 'mine.yaml'} --store postgresql://db/x" in printed
    assert (
        "run: 'skyline bench run quick --engine skyline'" in bench(*watch, "--every", "1d", "--print-workflow").stdout
    )
    monkeypatch.setenv("SKYLINE_BENCH_STORE", "elsewhere.db")
    assert bench(*watch, "--every", "1d", "--print-workflow").exit_code == 0, "the variable is not an option given"


def test_a_watch_says_what_failed(null_url: str, store: Path, tmp_path: Path) -> None:
    suite = tmp_path / "two.yaml"
    text = (SUITE % {"url": null_url, "name": "there"}).replace("[1, 2]", "[1]")
    suite.write_text(text.replace("engines: [", "engines: [{engine: url, name: gone, url: 'http://127.0.0.1:9'}, "))
    watch = ["watch", suite, "--every", "1h", "--count", "1", "--store", store, "--folder", tmp_path]
    done = bench(*watch)
    assert done.exit_code == 0 and "1 of 2 points failed" in done.stderr
    assert "failed" not in bench(*watch, "--engine", "there").stderr


def test_an_unfinished_comparison_goes_on_only_when_asked(
    null_url: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr("skyline.cli.console.note", notes.append)
    suite = tmp_path / "small.yaml"
    suite.write_text(SUITE % {"url": null_url, "name": "nothing"})
    spec = paired_suite(load_suite(str(suite)), "nothing", "nothing", 4)
    with open_store(store) as results:
        cut_short = Run(suite=spec, suite_hash=spec.hash, label="first", provenance=point().provenance)
        results.save_run(cut_short)
        for each in spec.points():
            done = point("nothing", 1, {"output_per_device": 10.0, "interactivity": 5.0, "ttft_p50": 0.1})
            results.save_point(
                done.model_copy(update={"id": each.key, "run": cut_short.id, "spec": each, "key": each.key})
            )
    compare = ["compare", "nothing", "nothing", "--suite", suite, "--pairs", "4", "--store", store]
    refused = bench(*compare, "--resume", "--label", "second")
    assert refused.exit_code == 1 and "leave out --label" in refused.output
    resumed = bench(*compare, "--resume", "--folder", tmp_path)
    assert notes[-1].endswith("which holds 16 of 16 points.")
    assert "nothing again is the same as nothing" in " ".join(resumed.stdout.split()), resumed.output
    with open_store(store) as results:
        assert [run.status for run in results.runs()] == ["finished"], "and no second run was begun"
    assert "was cut short; leave out --resume" in bench(*compare, "--resume").output


def test_help_stays_instant() -> None:
    heavy = ("scipy", "numpy", "sqlalchemy", "plotly", "pydantic", "yaml")
    code = f"import skyline.cli, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
