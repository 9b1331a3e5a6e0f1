"""Loads against real servers in processes of their own: the null server, and ones that misbehave."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from skyline.bench.analysis import analyse
from skyline.bench.checks import objections, token_check
from skyline.bench.load.generator import LoadPlan, generate
from skyline.bench.load.null import null_server
from skyline.bench.load.observed import Observed
from skyline.bench.load.processes import LoadError
from skyline.bench.load.prompts import TokenCounter
from skyline.bench.loads import Level
from skyline.bench.results import Verdict
from skyline.bench.suite import Measure, Sessions, SuiteError, Workload

pytestmark = pytest.mark.asyncio

QUICK = Measure(warmup_s=0.3, min_s=0.7, max_s=20, requests=20, requests_per_client=1, request_timeout_s=10)


@pytest.fixture(scope="module")
def counter() -> TokenCounter:
    return TokenCounter("demo")


def plan(url: str, level: Level, measure: Measure = QUICK, output: int = 16, **fields: object) -> LoadPlan:
    workload = {"name": "w", "input": 64, "output": output, "ratio": 0.5, "chat": True, "sessions": None, **fields}
    return LoadPlan(url, "null", Workload.model_validate(workload), level, measure, seed=3, salt=4)


def closed(concurrency: int) -> Level:
    return Level(kind="closed", concurrency=concurrency)


async def test_a_closed_loop_keeps_its_clients_busy(counter: TokenCounter) -> None:
    measure = QUICK.model_copy(update={"workers": 2})
    async with null_server("--step", "0.004") as url:
        seen = await generate(plan(url, closed(5), measure), counter)
    assert seen.workers == 2 and seen.stopped is None
    assert seen.repeated_prompts == 0
    ended = ~np.isnan(seen.end)
    assert all(error is None for error in seen.error)
    assert (seen.usage[ended] == seen.target[ended]).all()
    assert (seen.events[ended] == seen.target[ended]).all()
    assert set(seen.target) <= set(range(8, 17)) and set(seen.planned_input) <= set(range(32, 65))
    assert (np.diff(seen.start) >= 0).all()
    # Never more than five at once, and five nearly always.
    middle = np.linspace(seen.warm_s, seen.stop_s - 0.01, 200)
    ends = np.where(ended, seen.end, np.inf)
    under_way = [int(((seen.start <= t) & (ends > t)).sum()) for t in middle]
    assert max(under_way) <= 5 and np.mean(under_way) > 4.5
    # Tokens are four milliseconds apart.
    first = seen.offsets[np.flatnonzero(ended)[0]]
    assert 0.003 < np.median(np.diff(seen.event_times[first : first + 8])) < 0.02
    assert len(seen.texts) > 3 and set(seen.texts.values()) <= {" a" * n for n in range(8, 17)}


async def test_lengths_do_not_depend_on_the_number_of_workers(counter: TokenCounter) -> None:
    found: list[dict[int, tuple[int, int]]] = []
    async with null_server() as url:
        for workers in (1, 3):
            measure = QUICK.model_copy(update={"workers": workers})
            seen = await generate(plan(url, closed(3), measure), counter)
            lengths = zip(seen.planned_input.tolist(), seen.target.tolist(), strict=True)
            found.append(dict(zip(seen.index.tolist(), lengths, strict=True)))
    common = found[0].keys() & found[1].keys()
    assert len(common) > 20 and len({found[0][i] for i in common}) > 10
    assert {i: found[0][i] for i in common} == {i: found[1][i] for i in common}


async def test_an_open_loop_keeps_its_schedule(counter: TokenCounter) -> None:
    level = Level(kind="constant", rate=100.0)
    async with null_server("--step", "0.05") as url:  # 16 tokens take 0.8 s: eighty requests are under way
        seen = await generate(plan(url, level), counter)
    assert np.allclose(np.diff(np.sort(seen.intended)), 0.01, atol=1e-6)
    late = seen.start - seen.intended
    assert np.median(late) < 0.02 and late.min() >= -1e-3


async def test_a_ramp_reaches_its_end_rate(counter: TokenCounter) -> None:
    level = Level(kind="ramp", rate=20.0, end_rate=200.0)
    measure = Measure(warmup_s=0.3, min_s=0.5, max_s=2.7, requests=10)
    async with null_server() as url:
        seen = await generate(plan(url, level, measure, output=2), counter)
    assert seen.stopped is None and seen.stop_s == pytest.approx(3.0, abs=0.3)
    last = seen.intended[(seen.intended > 2.5) & (seen.intended <= 3.0)]
    assert len(last) == pytest.approx(0.5 * 185, rel=0.35)


async def test_a_trace_is_replayed_to_its_end(counter: TokenCounter, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    row = {"input_length": 40, "output_length": 3}
    file.write_text("\n".join(json.dumps({"timestamp": 20 * k, **row}) for k in range(120)))
    level = Level(kind="trace", trace=str(file), rate=1.0)
    measure = Measure(warmup_s=0.3, min_s=0.5, max_s=20, requests=10)
    async with null_server("--step", "0.05") as url:
        seen = await generate(plan(url, level, measure), counter)
        assert len(seen.index) == 120 and not np.isnan(seen.end).any() and seen.stopped is None
        assert seen.intended[-1] == pytest.approx(0.02 * 119)

        load = plan(url, level, measure.model_copy(update={"max_s": 1.0}))
        cut = await generate(load, counter)
        assert len(cut.index) < 80
        found = analyse(cut, cut.usage, level, 1, None)
        objected = objections(load, cut, found, Verdict(status="valid", reason=""), token_check(cut, found, {}))
        assert len(objected) == 1 and objected[0].startswith("`max_s` (1 s) cut the trace: ")
        assert objected[0].endswith(" of its 120 requests ended")

        with pytest.raises(LoadError, match=r"all 120 requests of the trace ended within the warm-up.*`warmup_s`"):
            await generate(plan(url, level, measure.model_copy(update={"warmup_s": 8.0})), counter)


@pytest.mark.parametrize("stall_at", [0.2, 1.5, 4.0, 5.5])
async def test_a_stall_is_seen_from_intended_starts(counter: TokenCounter, stall_at: float) -> None:
    """Coordinated omission: the server stops for two seconds once, and every request that was due then counts in what
    is reported."""
    rate, stall = 100.0, 2.0
    level = Level(kind="constant", rate=rate)
    measure = Measure(warmup_s=0.5, min_s=8, max_s=20, requests=700, request_timeout_s=10)
    async with null_server("--step", "0.002", "--stall", str(stall_at), str(stall)) as url:
        load = plan(url, level, measure, output=2, ratio=1.0)
        seen = await generate(load, counter)
        stalled = await stalled_from_to(url)
    begin, end = stalled[0] - seen.began, stalled[1] - seen.began
    assert end - begin == pytest.approx(stall, abs=0.05)
    due = np.arange(0, seen.stop_s, 1 / rate)
    waits = np.where((due >= begin) & (due < end), end - due, 0.002)
    truth = np.quantile(waits[(due + waits > seen.warm_s) & (due + waits <= seen.stop_s)], 0.99)
    assert truth > 1.5
    found = analyse(seen, seen.usage, level, 1, None)
    assert found.window.begin_s == pytest.approx(seen.warm_s) and found.window.truncated_s == 0
    assert found.metrics["ttft_intended_p99"].value == pytest.approx(truth, rel=0.05)
    if begin > seen.warm_s:  # else what was under way in the window need not fit the residence times
        assert objections(load, seen, found, Verdict(status="valid", reason=""), token_check(seen, found, {})) == []


async def test_sessions_repeat_their_turns(counter: TokenCounter) -> None:
    bodies: list[dict[str, object]] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while body := await read_request(reader):
            bodies.append(body)
            await answer(writer, ["x ", "y"])

    sessions = Sessions(turns=3, shared_prefix=20)
    seen = await against(handler, lambda url: plan(url, closed(1), sessions=sessions.model_dump()), counter)
    assert all(error is None for error in seen.error)
    conversations = [body["messages"] for body in bodies]
    for number, messages in enumerate(conversations[:12]):
        turn = number % 3
        assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * turn, "user"]  # type: ignore[union-attr, index]
        assert all(m["content"] == "x y" for m in messages if m["role"] == "assistant")  # type: ignore[union-attr, index]
        if turn:
            assert messages[:-2] == conversations[number - 1]  # type: ignore[index]
    assert len({messages[0]["content"] for messages in conversations}) == 1  # type: ignore[index]
    # First turns have as many tokens as the template makes of them; of later ones that is not known beforehand.
    first, later = seen.index % 3 == 0, seen.index % 3 > 0
    assert np.isnan(seen.planned_input[later]).all()
    for index, planned in zip(seen.index[first].tolist(), seen.planned_input[first].tolist(), strict=True):
        messages = conversations[index]
        assert planned == counter.opening(messages[:1]) + counter.prompts([messages[1]["content"]], chat=True)[0]  # type: ignore[index, list-item]
    assert counter.text(conversations[0][0]["content"]) >= 20  # type: ignore[index]


async def test_kept_texts_are_spread_over_the_load(counter: TokenCounter) -> None:
    async with null_server() as url:
        seen = await generate(plan(url, closed(4)), counter)
    kept = np.sort(seen.index[list(seen.texts)])
    assert len(seen.index) > 500 and 30 <= len(kept) <= 66
    strides = np.diff(kept)
    assert strides.min() == np.median(strides) > 4  # every k-th, but for those under way at the end
    assert kept[-1] > 0.9 * seen.index.max()
    assert all(counter.text(text) == seen.usage[i] == seen.events[i] for i, text in seen.texts.items())


async def test_without_usage_texts_are_kept(counter: TokenCounter) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await read_request(reader):
            await answer(writer, ["we", " came"], usage=False)

    seen = await against(handler, lambda url: plan(url, closed(2)), counter, all_texts=True)
    ended = np.flatnonzero(~np.isnan(seen.end))
    assert np.isnan(seen.usage).all()
    assert {seen.texts[int(i)] for i in ended} == {"we came"}


async def test_one_of_many_fails(counter: TokenCounter) -> None:
    count = itertools.count()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await read_request(reader):
            if next(count) % 10 == 3:
                writer.write(b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\noops")
            else:
                await answer(writer, ["a"])
                await asyncio.sleep(0.005)

    seen = await against(handler, lambda url: plan(url, closed(4)), counter)
    failed = [error for error in seen.error if error is not None]
    assert failed and set(failed) == {"HTTP 500: oops"}
    assert len(failed) == pytest.approx(len(seen.error) / 10, rel=0.5)


@pytest.mark.parametrize("load", ["closed", "open"])
async def test_a_server_that_keeps_no_connection_though_it_says_so(counter: TokenCounter, load: str) -> None:
    """As llama.cpp's after a stream. A request that it never read is sent again, and soon none is lost that way."""
    connections = itertools.count()
    lost = itertools.count()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        next(connections)
        assert await read_request(reader)
        await answer(writer, ["a"])
        # Requests come at once in a closed loop: this one was sent before the close was seen.
        await asyncio.sleep(0.002)
        if reader._buffer:  # type: ignore[attr-defined]
            next(lost)

    level = closed(4) if load == "closed" else Level(kind="constant", rate=200.0)
    seen = await against(handler, lambda url: plan(url, level), counter)
    assert set(seen.error) == {None}
    assert next(connections) > len(seen.error) / 2, "the server did close them"
    assert next(lost) < len(seen.error) / 5


async def test_all_fail(counter: TokenCounter) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await read_request(reader):
            writer.write(b"HTTP/1.1 404 No\r\nContent-Length: 8\r\n\r\nno model")

    with pytest.raises(LoadError, match=r"all of the first \d+ requests failed, the last with: HTTP 404: no model"):
        await against(handler, lambda url: plan(url, closed(8)), counter)


async def test_nobody_listens(counter: TokenCounter) -> None:
    with pytest.raises(LoadError, match=r"cannot connect to http://127\.0\.0\.1:9"):
        await generate(plan("http://127.0.0.1:9", closed(8)), counter)


async def test_a_server_that_never_finishes(counter: TokenCounter) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD)
        await reader.read()

    measure = Measure(warmup_s=0.1, min_s=0.1, max_s=1, requests=5, request_timeout_s=60)
    with pytest.raises(LoadError, match=r"only 0 requests ended well within 1 s.*max_s"):
        await against(handler, lambda url: plan(url, closed(2), measure), counter)


async def test_the_engine_dies(counter: TokenCounter) -> None:
    checks = itertools.count()
    async with null_server("--step", "0.1") as url:
        with pytest.raises(LoadError, match="ended while it was measured: killed by signal 9"):
            await generate(
                plan(url, closed(1)), counter, alive=lambda: "killed by signal 9" if next(checks) > 3 else None
            )


async def test_what_cannot_be_sent_is_refused_before_the_load(counter: TokenCounter) -> None:
    with pytest.raises(SuiteError, match="chat template takes"):
        await generate(plan("http://127.0.0.1:9", closed(1), input=5), counter)


async def stalled_from_to(url: str) -> tuple[float, float]:
    """When the null server stood still, by its own clock, which is ours."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(b"GET /stats HTTP/1.1\r\nHost: x\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    body = await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
    writer.close()
    begin, end = json.loads(body)["stalled"]
    return begin, end


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def read_request(reader: asyncio.StreamReader) -> dict[str, object] | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body: dict[str, object] = json.loads(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return body


async def answer(writer: asyncio.StreamWriter, texts: list[str], usage: bool = True) -> None:
    events: list[dict[str, object]] = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    if usage:
        events.append({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": len(texts)}})
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    writer.write(HEAD + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
    await writer.drain()


async def against(
    handler: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object],
    make: Callable[[str], LoadPlan],
    counter: TokenCounter,
    all_texts: bool = False,
) -> Observed:
    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)  # type: ignore[misc]
        finally:
            writer.close()

    server = await asyncio.start_server(closing, "127.0.0.1", 0)
    try:
        return await generate(
            make(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"), counter, all_texts=all_texts
        )
    finally:
        server.close()
