"""Real engines with the embedded model. Only Skyline's runs by default; the others are installed first, which takes
minutes (llama.cpp and its compiler: ten on two idle cores) and gigabytes, below SKYLINE_BENCH_ENGINES or the default
folder, where they stay."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from skyline.bench.engines import DEFAULT_FOLDER, Endpoint, EngineError, http, serve
from skyline.bench.suite import EngineSpec, ModelSpec
from tests.bench.engines.conftest import is_running

DEMO = ModelSpec(name="demo", source="demo")
QUESTION = "Tom has 3 apples and buys 4 more apples. How many apples does he have?"


def _ask(endpoint: Endpoint, tokens: int) -> tuple[str, int]:
    """The answer and how many tokens usage says that it has."""
    body = {"model": endpoint.model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    answer = http.request(
        f"{endpoint.url}/v1/chat/completions",
        {**body, "max_tokens": tokens, **endpoint.ignore_eos},
        endpoint.headers,
        timeout_s=300,
    )
    assert answer.ok, answer.said
    data = answer.json()
    return data["choices"][0]["message"]["content"], data["usage"]["completion_tokens"]


def _check(endpoint: Endpoint, has_counters: bool) -> None:
    before = _counters(endpoint, 1)
    text, _ = _ask(endpoint, 12)
    assert text.startswith("I am Skyline's embedded")
    _, tokens = _ask(endpoint, 120)
    assert tokens == 120  # the model would have stopped long before
    after = _counters(endpoint, 50)
    assert (before is not None and after is not None) == has_counters
    if before is not None and after is not None:
        assert after[0] - before[0] > 20 and after[1] - before[1] >= 0
    facts = endpoint.facts()
    assert facts is not None and facts.startup_s is not None and facts.peak_memory_bytes is not None
    assert facts.peak_memory_bytes > 10 * 2**20
    assert endpoint.version and endpoint.command and endpoint.alive() is None


def _counters(endpoint: Endpoint, least: int) -> tuple[int, int] | None:
    """Skyline's are up to a second old."""
    until = time.monotonic() + 5
    while (found := endpoint.cache_counters()) is not None and found[0] < least and time.monotonic() < until:
        time.sleep(0.1)
    return found


def test_skyline(tmp_path: Path) -> None:
    log = tmp_path / "skyline.log"
    with serve(EngineSpec(engine="skyline"), DEMO, folder=tmp_path, log=log, threads=1) as endpoint:
        _check(endpoint, has_counters=True)
        assert {"torch", "skyline-llm"} <= set(endpoint.packages)
        assert endpoint.process is not None
        processes = endpoint.process.processes()
        assert len(processes) >= 2  # the server and its engine
    assert not any(map(is_running, processes))


def test_skyline_says_what_it_dislikes(tmp_path: Path) -> None:
    spec = EngineSpec(engine="skyline", args=["--no-such-flag"])
    with pytest.raises(
        EngineError, match=r"(?s)skyline: it did not start: the engine ended with status 2.*no-such-flag"
    ):
        serve(spec, DEMO, folder=tmp_path, log=tmp_path / "log").__enter__()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("spec", "has_counters"),
    [
        (EngineSpec(engine="transformers"), False),
        (EngineSpec(engine="transformers", name="batching", args=["--continuous-batching"]), False),
        (EngineSpec(engine="llama.cpp"), True),
        (EngineSpec(engine="llama.cpp", name="int8", precision="int8"), True),
        (EngineSpec(engine="vllm", args=["--enforce-eager"], start_timeout_s=900), True),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_peers(tmp_path: Path, spec: EngineSpec, has_counters: bool) -> None:
    folder = Path(os.environ.get("SKYLINE_BENCH_ENGINES", DEFAULT_FOLDER))
    with serve(spec, DEMO, folder=folder, log=tmp_path / "engine.log") as endpoint:
        _check(endpoint, has_counters)
        assert endpoint.process is not None
        processes = endpoint.process.processes()
    assert not any(map(is_running, processes))
