"""The client and a real engine process (without a model), over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from skyline.engine.config import EngineConfig
from skyline.engine.messages import EngineOutput, EngineRequest, TokenLogprobs
from skyline.engine.sampling_params import SamplingParams
from skyline.ipc.client import EngineClient, EngineDeadError, RequestStream

ENGINE = str(Path(__file__).with_name("engine_without_model.py"))
DEADLINE_S = 120  # far off: importing takes seconds on a machine that does other things
pytestmark = pytest.mark.asyncio


def make_client(behaviour: str, **settings: object) -> EngineClient:
    client = EngineClient(EngineConfig(model=behaviour, **settings))  # type: ignore[arg-type]
    client.command = (sys.executable, ENGINE)
    return client


@contextlib.asynccontextmanager
async def engine(behaviour: str = "null", **settings: object) -> AsyncIterator[EngineClient]:
    """A client whose engine is ready; closed at the end, with nothing left behind."""
    client = make_client(behaviour, **settings)
    async with asyncio.timeout(DEADLINE_S):
        try:
            await client.start()
            await client.wait_ready()
            yield client
        finally:
            await client.close()
    assert not client._folder.exists(), "the sockets' folder is left behind"
    assert client.pid is not None and not is_alive(client.pid), "the process is left behind"
    assert client.num_unfinished == 0


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def request(name: str, max_tokens: int = 5, prompt: tuple[int, ...] = (1, 2, 3)) -> EngineRequest:
    return EngineRequest(name, list(prompt), SamplingParams(max_tokens=max_tokens))


async def read(stream: RequestStream) -> list[EngineOutput]:
    outputs = [await stream.next()]
    while outputs[-1].finish_reason is None:
        outputs.append(await stream.next())
    return outputs


async def until(condition: object, seconds: float = 60.0) -> None:
    """Wait for `condition()`; the deadline is far off, since a busy machine is slow."""
    async with asyncio.timeout(seconds):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_streams_end_with_all_their_tokens() -> None:
    """The plain case: many requests at once, each gets exactly its own tokens and one end."""
    async with engine() as client:
        assert client.ready is not None and client.ready.max_model_len == 4096
        assert client.health() is None
        streams = [client.submit(request(f"r{n}", max_tokens=n + 1)) for n in range(20)]
        for n, outputs in enumerate(await asyncio.gather(*map(read, streams))):
            assert sum(len(output.token_ids) for output in outputs) == n + 1
            assert outputs[-1].finish_reason == "length"
            assert {output.request_id for output in outputs} == {f"r{n}"}


async def test_a_slow_reader_gets_everything_as_one_output() -> None:
    """Without merging, a client that reads slowly would pile up one object a token."""
    async with engine() as client:
        stream = client.submit(request("r", max_tokens=300))
        await until(lambda: stream.finished)
        output = await stream.next()
        assert output.token_ids == [1] * 300
        assert output.finish_reason == "length"


async def test_merging_keeps_every_field() -> None:
    """Fields that come once, with the first output or the last, must survive the merge."""
    stream = RequestStream("r")
    entries = [TokenLogprobs([token], [-0.5], 1) for token in range(4)]
    stream.push(EngineOutput("r", [7], [entries[0]], prompt_logprobs=[entries[3]], cached_tokens=16))
    stream.push(EngineOutput("r", [8], [entries[1]]))
    stream.push(EngineOutput("r", [9], [entries[2]], finish_reason="stop", stop_token=9))
    assert stream.finished
    assert await stream.next() == EngineOutput(
        "r", [7, 8, 9], entries[:3], [entries[3]], finish_reason="stop", stop_token=9, cached_tokens=16
    )
    assert EngineOutput("other").token_ids == [], "merging has changed a shared default"


async def test_a_request_the_engine_refuses_gets_an_answer() -> None:
    """The engine is the last line behind the validator; silence would hang the client."""
    async with engine() as client:
        [output] = await read(client.submit(request("long", prompt=(1,) * 5000)))
        assert output.finish_reason == "error" and "5000 tokens" in str(output.error)
        assert (await read(client.submit(request("next"))))[-1].finish_reason == "length"


async def test_abort_frees_the_engine_and_ends_the_stream() -> None:
    """A disconnected client's request stops running, and a task that still reads its stream does not hang."""
    async with engine("slow") as client:
        stream = client.submit(request("r", max_tokens=4000))
        other = client.submit(request("other", max_tokens=100))
        await stream.next()
        reader = asyncio.create_task(read(stream))
        await asyncio.sleep(0)
        client.abort(["r", "unknown"])
        client.abort(["r"])
        assert client.num_unfinished == 1
        assert (await reader)[-1].finish_reason == "abort"
        await until(lambda: client.stats.aborted == 1 and client.stats.running <= 1)
        assert (await read(other))[-1].finish_reason == "length", "a neighbour of the aborted request suffers"
        await until(lambda: client.stats.blocks_held == 0)


async def test_an_unsendable_request_leaves_nothing_behind() -> None:
    """Text that cannot be encoded fails its own call; its id must not count as under way for ever."""
    async with engine() as client:
        bad = EngineRequest("r", [1], SamplingParams(stop=["\ud800"]))
        with pytest.raises(UnicodeEncodeError):
            client.submit(bad)
        assert client.num_unfinished == 0
        assert (await read(client.submit(request("r"))))[-1].finish_reason == "length"


async def test_an_id_in_use_is_refused() -> None:
    """Two streams under one id would share each other's tokens."""
    async with engine("slow") as client:
        client.submit(request("r", max_tokens=1000))
        with pytest.raises(ValueError, match="in use"):
            client.submit(request("r"))


async def test_reset_prefix_cache_reaches_the_engine() -> None:
    """The admin route must really empty the cache."""
    prompt = tuple(range(50))
    async with engine() as client:
        cached = []
        for name in "abc":
            if name == "c":
                client.reset_prefix_cache()
            outputs = await read(client.submit(request(name, prompt=prompt)))
            cached.append(outputs[0].cached_tokens)
        assert cached == [0, 48, 0]


async def test_a_killed_engine_is_reported_to_everyone() -> None:
    """After a crash no stream may wait for ever, health tells, and later requests are answered with the reason."""
    async with engine("slow") as client:
        streams = [client.submit(request(f"r{n}", max_tokens=4000)) for n in range(5)]
        await streams[0].next()
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        for outputs in await asyncio.gather(*map(read, streams)):
            assert outputs[-1].finish_reason == "error" and "signal 9" in str(outputs[-1].error)
        assert "signal 9" in str(client.health())
        [late] = await read(client.submit(request("late")))
        assert late.finish_reason == "error" and "signal 9" in str(late.error)
        client.abort(["r0"])
        client.reset_prefix_cache()


async def test_requests_in_the_moment_of_a_crash_get_an_error() -> None:
    """Between the death of the process and its discovery, submitting must neither raise nor hang."""
    async with engine() as client:
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        deadline = time.monotonic() + 0.05
        streams = []
        while time.monotonic() < deadline:
            time.sleep(0.005)  # noqa: ASYNC251  the loop must not get to notice
            streams.append(client.submit(request(f"r{len(streams)}")))
            client.abort([streams[0].request_id])
            client.reset_prefix_cache()
        for outputs in await asyncio.gather(*map(read, streams[1:])):
            assert outputs[-1].finish_reason == "error"


async def test_close_right_after_a_crash() -> None:
    """Shutting down must also work when the process has died and nobody has noticed yet."""
    async with engine() as client:
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        time.sleep(0.05)  # noqa: ASYNC251


async def test_requests_sent_before_the_engine_is_up_are_answered() -> None:
    """The front end is up long before the model is loaded; what comes early waits and is not lost."""
    client = make_client("null")
    async with asyncio.timeout(DEADLINE_S):
        await client.start()
        stream = client.submit(request("early"))
        assert client.health() == "the engine is loading the model"
        assert (await read(stream))[-1].finish_reason == "length"
        await client.close()


@pytest.mark.parametrize("length", [0, 3_000_000])
async def test_a_failed_start_is_reported_with_its_reason(length: int) -> None:
    """The reason reaches the client however long it is: the process must not exit before its last words are out."""
    client = make_client(f"refuse:{length}")
    async with asyncio.timeout(DEADLINE_S):
        await client.start()
        with pytest.raises(EngineDeadError, match="ValueError: no room for this model"):
            await client.wait_ready()
        assert "no room" in str(client.health())
        [output] = await read(client.submit(request("r")))
        assert output.finish_reason == "error" and "no room" in str(output.error)
        await client.close()
    assert not client._folder.exists()


async def test_a_process_that_cannot_even_start_is_reported() -> None:
    """A broken installation ends the process before it can say anything."""
    client = make_client("null")
    client.command = (sys.executable, "-c", "raise SystemExit(3)")
    async with asyncio.timeout(DEADLINE_S):
        await client.start()
        with pytest.raises(EngineDeadError, match="exit code 3"):
            await client.wait_ready()
        await client.close()


@pytest.mark.parametrize("length", [0, 1_000_000])
async def test_an_engine_that_fails_every_step_ends_with_the_reason(length: int) -> None:
    """A lost device: every waiting client hears of it, and health turns bad instead of failing requests for ever."""
    async with engine(f"broken:{length}", async_scheduling=False) as client:
        streams = [client.submit(request(f"r{n}", prompt=(n,) * 64)) for n in range(6)]
        for outputs in await asyncio.gather(*map(read, streams)):
            assert outputs[-1].finish_reason == "error" and "the device is lost" in str(outputs[-1].error)
        assert "3 steps in a row failed" in str(client.health())


async def test_a_stuck_step_shows_in_health() -> None:
    """The process lives and reports, but a step does not end: a router must see that."""
    async with engine("slow", stall_timeout=1e-9) as client:
        client.submit(request("r", max_tokens=4000))
        await until(lambda: "a step has been running" in str(client.health()))


async def test_stats_arrive_while_idle() -> None:
    """They are the sign of life; an idle engine must not look dead."""
    async with engine() as client:
        first = client._last_heard
        await until(lambda: client._last_heard > first and client.stats.blocks_total == 256)


async def test_close_ends_open_streams() -> None:
    """A reader that still waits at shutdown gets an error, not silence; closing twice is harmless."""
    async with engine("slow") as client:
        reader = asyncio.create_task(read(client.submit(request("r", max_tokens=4000))))
        await asyncio.sleep(0.05)
        await client.close()
        last = (await reader)[-1]
        assert last.finish_reason == "error" and "shut down" in str(last.error)


async def test_close_while_loading() -> None:
    """Ctrl-C during the start must not leave a process that loads on."""
    client = make_client("null")
    client.command = (sys.executable, "-c", "import time; time.sleep(100)")
    await client.start()
    async with asyncio.timeout(9):
        await client.close()
    assert client.pid is not None and not is_alive(client.pid)
    assert not client._folder.exists()


async def test_the_engine_dies_with_its_parent(tmp_path: Path) -> None:
    """A killed server must not leave a process behind that holds the GPU's memory."""
    parent = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", _PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=_environment(tmp_path)
    )
    assert parent.stdout is not None
    pid = int(await asyncio.to_thread(parent.stdout.readline))
    assert is_alive(pid)
    parent.kill()
    await asyncio.to_thread(parent.wait)
    parent.stdout.close()
    await until(lambda: not is_alive(pid))


_PARENT = """
import asyncio
from tests.ipc.test_client import make_client

async def main():
    client = make_client("null")
    await client.start()
    await client.wait_ready()
    print(client.pid, flush=True)
    await asyncio.sleep(100)

asyncio.run(main())
"""


def _environment(tmp_path: Path) -> dict[str, str]:
    """TMPDIR, so that the sockets which a killed parent cannot remove go away with the test."""
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path)}
