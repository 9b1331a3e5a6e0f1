"""An engine whose server is tests/bench/engines/fake_server.py, started as any other."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from skyline.bench.engines import ENGINES, Endpoint, Engine, Installation, serve
from skyline.bench.engines.base import Job, Launch, counters_by_name
from skyline.bench.suite import EngineSpec, ModelSpec

SERVER = Path(__file__).parent / "fake_server.py"
MODEL = ModelSpec(name="fake", source="fake-model")


class Fake(Engine):
    name = "fake"

    def install(self, spec: EngineSpec, folder: Path) -> Installation:
        return Installation((sys.executable, "-I", str(SERVER)), "1.2.3", {"fake": "1.2.3"})

    def launch(self, job: Job) -> Launch:
        return Launch([*job.installation.program, "--port", str(job.port), *job.spec.args], {"FAKE": "a b"})

    @staticmethod
    def cache_counters(metrics: str) -> tuple[int, int] | None:
        return counters_by_name(metrics, "vllm:prefix_cache_queries", "vllm:prefix_cache_hits")


class Nowhere(Fake):
    name = "nowhere"

    def install(self, spec: EngineSpec, folder: Path) -> Installation:
        return Installation(("/nowhere/server",), "1")


@pytest.fixture(autouse=True)
def fake_engines() -> Iterator[None]:
    ours = {engine.name: engine for engine in (Fake, Nowhere)}
    ENGINES.update(ours)
    yield
    for name in ours:
        del ENGINES[name]


Start = Callable[..., AbstractContextManager[Endpoint]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """serve() with the fake engine: start("--deaf", timeout=5, ...)."""

    def started(
        *args: str, engine: str = "fake", timeout: float = 30.0, served_model: str | None = None, **given: Any
    ) -> Any:
        spec = EngineSpec(engine=engine, args=list(args), start_timeout_s=timeout, served_model=served_model)
        return serve(spec, MODEL, folder=tmp_path / "engines", log=tmp_path / "logs" / "fake.log", **given)

    return started


@pytest.fixture
def locked() -> Iterator[str]:
    """The address of a server that asks for the key "sesame"."""
    with _running("--key", "sesame") as url:
        yield url


@pytest.fixture
def loading() -> Iterator[str]:
    """The address of a server that answers HTTP 503 for its first seconds."""
    with _running("--loading", "3") as url:
        yield url


@contextmanager
def _running(*args: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with subprocess.Popen([sys.executable, "-I", str(SERVER), "--port", str(port), *args]) as process:
        try:
            until = time.monotonic() + 30
            while time.monotonic() < until:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.02)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def is_running(process: int) -> bool:
    """A zombie has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
