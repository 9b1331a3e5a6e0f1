"""Starting and stopping, with a real child process that misbehaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from skyline.bench.engines import Endpoint, EngineError, get, serve
from skyline.bench.suite import EngineSpec, ModelSpec
from tests.bench.engines.conftest import SERVER, Start, is_running


def _family(path: Path) -> list[int]:
    until = time.monotonic() + 20
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.02)
    return [int(pid) for pid in path.read_text().split()]


def _gone(processes: list[int], seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while any(map(is_running, processes)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(is_running, processes))


def _death(endpoint: Endpoint, seconds: float = 20.0) -> str:
    until = time.monotonic() + seconds
    while (why := endpoint.alive()) is None and time.monotonic() < until:
        time.sleep(0.02)
    return why or "it lives"


def test_an_endpoint_that_answers(start: Start) -> None:
    with start() as endpoint:
        assert endpoint.url.startswith("http://127.0.0.1:")
        assert endpoint.model == "fake-model"
        assert endpoint.version == "1.2.3" and endpoint.packages == {"fake": "1.2.3"}
        port = endpoint.url.rpartition(":")[2]
        assert endpoint.command == f"FAKE='a b' {sys.executable} -I {SERVER} --port {port}"
        assert endpoint.startup_s is not None and 0.02 < endpoint.startup_s < 30
        assert endpoint.ignore_eos == {"ignore_eos": True}
        assert endpoint.cache_counters() == (10, 4)  # readiness asked for one completion
        assert endpoint.alive() is None
        processes = endpoint.process.processes()  # type: ignore[union-attr]
        assert processes
    assert not any(map(is_running, processes))


def test_the_models_name_may_be_chosen(start: Start) -> None:
    with start(served_model="other") as endpoint:
        assert endpoint.model == "other"


def test_a_wrong_name_is_answered_with_those_that_there_are(start: Start) -> None:
    with pytest.raises(EngineError, match=r"serves no model 'fake-modle', it lists fake-model, other; did you mean"):
        start(served_model="fake-modle").__enter__()


def test_death_at_the_start_is_told_at_once_with_the_end_of_the_log(start: Start) -> None:
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"(?s)ended with status 3.*no such GPU"):
        start("--say", "loading\nno such GPU\n", "--exit", "3", timeout=300).__enter__()
    assert time.monotonic() - began < 20


def test_a_program_that_is_not_there(start: Start) -> None:
    with pytest.raises(EngineError, match="cannot start /nowhere/server: No such file"):
        start(engine="nowhere").__enter__()


def test_death_by_a_signal_in_mid_run(start: Start) -> None:
    with start("--say", "serving\n") as endpoint:
        assert endpoint.process is not None
        os.kill(endpoint.process.processes()[0], signal.SIGKILL)
        why = _death(endpoint)
        assert "SIGKILL" in why and "serving" in why
        assert endpoint.cache_counters() is None
        assert endpoint.facts() is not None


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["--hang", "start"], "waiting for its health check .Connection refused."),
        (["--loading", "600"], "waiting for its health check .HTTP 503: loading."),
        (["--hang", "completion"], "waiting for the first token"),
    ],
)
def test_hanging_at_the_start_ends_with_the_timeout(start: Start, args: list[str], what: str) -> None:
    began = time.monotonic()
    with pytest.raises(EngineError, match=rf"not ready within 1.5 s, {what}"):
        start(*args, timeout=1.5, grace_s=1).__enter__()
    assert 1.4 < time.monotonic() - began < 15


def test_a_server_that_loads_is_waited_for(start: Start) -> None:
    with start("--loading", "1") as endpoint:
        assert endpoint.startup_s is not None and endpoint.startup_s > 1


def test_a_server_without_completions_is_asked_through_chat(start: Start) -> None:
    with start("--chat-only") as endpoint:
        assert endpoint.alive() is None


def test_something_that_speaks_no_http(start: Start) -> None:
    with pytest.raises(EngineError, match="does not speak HTTP"):
        start("--garbage", timeout=1.5).__enter__()


def test_ignoring_sigterm_ends_with_sigkill(start: Start) -> None:
    with start("--deaf", grace_s=0.5) as endpoint:
        assert endpoint.process is not None
        processes = endpoint.process.processes()
        began = time.monotonic()
    assert 0.4 < time.monotonic() - began < 10
    assert processes and not any(map(is_running, processes))


def test_grandchildren_and_daemons_do_not_stay(start: Start, tmp_path: Path) -> None:
    with start("--family", str(tmp_path / "family")):
        family = _family(tmp_path / "family")
        assert all(map(is_running, family))
    assert _gone(family, 0)


def test_what_a_dead_engine_left_behind_does_not_stay(start: Start, tmp_path: Path) -> None:
    with start("--family", str(tmp_path / "family")) as endpoint:
        family = _family(tmp_path / "family")
        os.kill(family[0], signal.SIGKILL)
        assert "SIGKILL" in _death(endpoint)
        assert _gone(family, 0)


def test_an_error_inside_the_block_stops_the_engine_too(start: Start) -> None:
    with pytest.raises(ZeroDivisionError), start() as endpoint:
        assert endpoint.process is not None
        processes = endpoint.process.processes()
        raise ZeroDivisionError
    assert not any(map(is_running, processes))


KILLED = """
import sys, time
from pathlib import Path
from skyline.bench.suite import EngineSpec, ModelSpec
from skyline.bench.engines import ENGINES, serve
from tests.bench.engines.conftest import Fake
ENGINES["fake"] = Fake
folder = Path(sys.argv[1])
spec = EngineSpec(engine="fake", args=["--family", str(folder / "family"), *sys.argv[2:]])
with serve(spec, ModelSpec(name="m", source="m"), folder=folder, log=folder / "log", grace_s=1) as endpoint:
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_benchmark_leaves_no_engine(tmp_path: Path, sent: signal.Signals) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), "--deaf"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None and benchmark.stdout.readline() == "ready\n"
        family = _family(tmp_path / "family")
        supervisor = psutil.Process(benchmark.pid).children()[0].pid
        assert all(map(is_running, family))
        benchmark.send_signal(sent)
    assert _gone([*family, supervisor], 15)


def test_a_benchmark_killed_during_the_start_leaves_no_engine(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), "--hang", "start"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as benchmark:
        family = _family(tmp_path / "family")
        benchmark.kill()
    assert _gone(family, 15)


def test_a_killed_supervisor_takes_the_engine_along(start: Start) -> None:
    with start() as endpoint:
        assert endpoint.process is not None
        processes = endpoint.process.processes()
        os.kill(psutil.Process(processes[0]).ppid(), signal.SIGKILL)
        assert "supervisor was ended by SIGKILL" in _death(endpoint)
        assert _gone(processes)


def test_a_port_in_use_is_named(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(EngineError, match=r"port \d+ is in use"):
        start(port=taken.getsockname()[1], timeout=60).__enter__()


def test_a_port_lost_to_another_is_replaced(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two ports that are found free are taken before the engine gets there."""
    from skyline.bench.engines import serving

    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        lost = [one.getsockname()[1], two.getsockname()[1]]
        find = serving._free_port
        monkeypatch.setattr(serving, "_free_port", lambda: lost.pop() if lost else find())
        with start() as endpoint:
            assert endpoint.alive() is None
    assert not lost


def test_somebody_elses_answers_are_not_taken_for_the_engines(start: Start) -> None:
    with start() as other:
        port = int(other.url.rpartition(":")[2])
        with pytest.raises(EngineError, match="is in use"):
            start("--hang", "start", port=port, timeout=60, grace_s=1).__enter__()


def test_two_engines_at_once_have_ports_of_their_own(start: Start) -> None:
    with start() as one, start() as two:
        assert one.url != two.url


def test_hostile_logs_do_no_harm(start: Start) -> None:
    hostile = (
        r"\x1b]0;title\x07\x1b[31mred\x1b[0m\x1b[2J\nprogress 1%\rprogress 99%\rdone\n\xff\xfe\x00\x07tail" + "A" * 9000
    )
    with pytest.raises(EngineError) as error:
        start("--say", hostile, "--exit", "1").__enter__()
    message = str(error.value)
    assert "red" in message and "done" in message and "tail" in message
    assert "progress" not in message and "title" not in message
    assert all(char == "\n" or char.isprintable() for char in message)
    assert len(message) < 2000


def test_memory_is_that_of_the_whole_tree(start: Start) -> None:
    with start("--allocate", "120") as endpoint:
        facts = endpoint.facts()
        assert facts is not None and facts.peak_memory_bytes is not None
        assert 120 * 2**20 < facts.peak_memory_bytes < 200 * 2**20
        assert facts.memory_method is not None and facts.memory_method.startswith("PSS")
        assert facts.startup_s == endpoint.startup_s


def test_the_log_is_kept_and_the_folder_made(start: Start, tmp_path: Path) -> None:
    with start("--say", "hello\n"):
        assert (tmp_path / "logs" / "fake.log").read_text() == "hello\n"


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    spec = EngineSpec(engine="fake")
    model = ModelSpec(name="m", source="m")
    with pytest.raises(EngineError, match="cannot be started"):
        serve(spec, model, folder=tmp_path, log=tmp_path / "file" / "log").__enter__()


def test_keys_of_other_servers_are_not_passed_on(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with start() as endpoint:
        assert endpoint.process is not None
        environment = Path(f"/proc/{endpoint.process.processes()[0]}/environ").read_bytes()
    assert b"VLLM_API_KEY" not in environment and b"FAKE=a b" in environment


def test_it_may_be_started_from_a_thread_that_ends(start: Start) -> None:
    """PR_SET_PDEATHSIG is bound to the thread that started a process; this must not stop the engine."""
    entered: list[object] = []
    server = start()
    thread = threading.Thread(target=lambda: entered.append(server.__enter__()))
    thread.start()
    thread.join()
    time.sleep(0.6)
    assert entered[0].alive() is None  # type: ignore[attr-defined]
    server.__exit__(None, None, None)


def test_unknown_engines_are_answered_with_the_nearest() -> None:
    with pytest.raises(EngineError, match=r"no engine 'vlm', there are skyline, .*did you mean vllm"):
        get("vlm")
    with pytest.raises(EngineError, match=r"did you mean llama.cpp"):
        get("llama_cpp")
