"""Suites from start to end, against servers that run for real."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from skyline.bench import measure, runner
from skyline.bench.load.generator import Live
from skyline.bench.load.http import Reply
from skyline.bench.results import Hardware
from skyline.bench.store import Store, open_store
from skyline.bench.suite import Suite, parse_suite, single
from tests.bench.null import null_server
from tests.bench.reporter import Reporter

MEASURE = "{warmup_s: 0.2, min_s: 0.6, max_s: 30, requests: 12, requests_per_client: 1}"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "bench.sqlite3") as opened:
        yield opened


@pytest.fixture(scope="module")
def null_url() -> Iterator[str]:
    with null_server() as url:
        yield url


def suite(engines: str, concurrency: str = "[1, 2]", more: str = "") -> Suite:
    return parse_suite(
        f"""
        name: s
        models: [{{name: demo, source: demo}}]
        engines: [{engines}]
        scenarios: [{{name: w, input: 64, output: 8, load: {{kind: closed, concurrency: {concurrency}}}}}]
        measure: {MEASURE}
        {more}
        """
    )


def test_a_suite_is_measured_and_kept(store: Store, null_url: str, tmp_path: Path) -> None:
    spec = suite(f"{{engine: url, url: '{null_url}'}}, {{engine: url, name: nobody, url: 'http://127.0.0.1:9'}}")
    reporter = Reporter()
    run = runner.execute(runner.new_run(spec, store, "label"), store, reporter, tmp_path)
    assert run.status == "finished" and run.finished is not None
    assert reporter.begun == ["1/4 concurrency 1", "2/4 concurrency 2"]
    points = {(p.spec.engine.name, p.spec.level.concurrency): p for p in store.points(run.id, with_samples=True)}
    assert len(points) == 4
    for level in (1, 2):
        good, bad = points["url", level], points["nobody", level]
        assert good.status == "ok", good.reason
        # Eight tokens, one each two milliseconds
        throughput = good.value("output_per_device")
        assert throughput is not None and 40 * level < throughput < 520 * level
        assert good.cache is not None and good.cache.status == "valid"
        assert good.client is not None and good.client.null_output_throughput is not None
        assert good.requests is not None and len(good.requests) > 12 and good.timeline is not None
        assert good.provenance.hardware == Hardware(name="unknown") and "cost_per_mtok" not in good.metrics
        assert good.energy is not None and good.energy.joules is None and good.energy.verdict.status == "unknown"
        assert good.provenance.command == f"skyline bench rerun {good.id[:12]}"
        assert bad.status == "failed" and "127.0.0.1:9" in (bad.reason or "")
    assert runner.unfinished(spec, store) is None


def test_an_endpoint_runs_on_what_the_suite_says(store: Store, null_url: str, tmp_path: Path) -> None:
    spec = suite(f"{{engine: url, url: '{null_url}', hardware: 2x NVIDIA H100}}", "[2]")
    run = runner.execute(runner.new_run(spec, store), store, Reporter(), tmp_path)
    (point,) = store.points(run.id)
    assert point.provenance.hardware == Hardware(name="2x NVIDIA H100") and point.value("cost_per_mtok")
    assert run.provenance.hardware.cores > 0


async def _hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Lists its model and completes prompts; chats begin, and never go on."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b"content-length: " in head:
                await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
            body = b'{"data": [{"id": "m"}]}' if head.startswith(b"get") else b'{"choices": [{"text": "a"}]}'
            if b"/chat/" in head:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
            else:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    writer.close()


@pytest.fixture
def hanging_url() -> Iterator[str]:
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(_hang, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_an_endpoint_that_hangs_is_given_as_long_as_a_request(
    store: Store, hanging_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []
    original = measure.ask

    async def ask(url: str, path: str, headers: dict[str, str], fields: dict[str, Any], timeout_s: float) -> Reply:
        waits.append(timeout_s)
        return await original(url, path, headers, fields, timeout_s)

    monkeypatch.setattr(measure, "ask", ask)
    spec = suite(f"{{engine: url, url: '{hanging_url}'}}", "[1, 2]")
    spec = spec.model_copy(update={"measure": spec.measure.model_copy(update={"request_timeout_s": 0.3})})
    run = runner.execute(runner.new_run(spec, store), store, Reporter(), tmp_path)
    points = store.points(run.id)
    assert len(points) == 2 and all("not finished after 0.3 s" in (point.reason or "") for point in points)
    assert waits == [0.3] * 4  # for each point once before it, and once for whether the endpoint still answers


def test_a_point_is_measured_again(store: Store, null_url: str, tmp_path: Path) -> None:
    spec = suite(f"{{engine: url, url: '{null_url}'}}", "[3]")
    first = runner.execute(runner.new_run(spec, store), store, Reporter(), tmp_path)
    (point,) = store.points(first.id)
    again = runner.execute(runner.new_run(single(point.spec), store), store, Reporter(), tmp_path)
    (repeated,) = store.points(again.id)
    assert repeated.spec == point.spec and repeated.id != point.id


def test_a_killed_run_goes_on_where_it_was(store: Store, null_url: str, tmp_path: Path) -> None:
    spec = suite(f"{{engine: url, url: '{null_url}'}}", "[1, 2, 3, 4]")
    run = runner.new_run(spec, store)
    file = tmp_path / "bench.sqlite3"
    code = f"""
from pathlib import Path
from skyline.bench import runner
from skyline.bench.store import open_store
from tests.bench.null import null_server
from tests.bench.reporter import Reporter
store = open_store({str(file)!r})
runner.execute(store.run({run.id!r}), store, Reporter(), Path({str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        while len(store.finished_keys(run.id)) < 2:
            assert process.poll() is None, "the run ended by itself"
            asyncio.run(asyncio.sleep(0.05))
    finally:
        process.kill()
        process.wait()
    kept = {point.id for point in store.points(run.id)}
    assert 2 <= len(kept) < 4
    found = runner.unfinished(spec, store)
    assert found is not None and found.id == run.id
    reporter = Reporter()
    assert runner.execute(found, store, reporter, tmp_path).status == "finished"
    assert len(reporter.points) == 4 - len(kept)
    assert kept < {point.id for point in store.points(run.id)}


class Killing(Reporter):
    """Kills the server in the middle of the first point."""

    def __init__(self) -> None:
        super().__init__()
        self.killed: list[int] = []

    def live(self, live: Live) -> None:
        if not self.killed and live.ended > 3:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "engine_process" in " ".join(process.cmdline()):
                        os.kill(process.pid, signal.SIGKILL)
                        self.killed.append(process.pid)


def test_a_crash_costs_its_own_point_only(store: Store, tmp_path: Path) -> None:
    spec = suite("{engine: skyline}", "[2, 1]", "accuracy: {task: demo, limit: 5, at_least: 1.0}")
    reporter = Killing()
    run = runner.execute(runner.new_run(spec, store), store, reporter, tmp_path)
    assert reporter.killed
    crashed, after = store.points(run.id)
    assert crashed.status in ("failed", "invalid") and crashed.reason, "the first point says why"
    assert after.status in ("ok", "invalid") and after.value("output_throughput")
    assert after.provenance.engine_command and "serve" in after.provenance.engine_command
    assert after.server is not None and after.server.startup_s and after.server.peak_memory_bytes
    (gate,) = store.accuracy(run.id)
    assert gate.total == 5 and gate.exact_match is not None
    assert gate.passed == (gate.exact_match == 1.0)
