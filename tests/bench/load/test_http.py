"""The load generator's client, against bytes cut anywhere and servers that misbehave."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyline.bench.load.http import Address, Connection, Reply, ask


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def event(text: str | None = None, *, chat: bool = True, usage: dict[str, object] | None = None) -> bytes:
    choices: list[dict[str, object]] = []
    if text is not None:
        choices = [{"index": 0, "delta": {"content": text}} if chat else {"index": 0, "text": text}]
    return b"data: " + json.dumps({"choices": choices, "usage": usage}).encode() + b"\n\n"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
EVENTS = [ROLE, event("eins"), event(" zwei"), b": ping\n\n", event("é"), event(usage=USAGE), b"data: [DONE]\n\n"]
STREAM = HEAD + chunked(*EVENTS)


class Transport:
    """Takes what is written."""

    def __init__(self) -> None:
        self.closed = False

    def write(self, data: bytes) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close


def received(pieces: list[bytes], closes: bool = False) -> tuple[Reply, Connection]:
    """What a request makes of an answer that arrives in these pieces."""
    connection = Connection(Address.of("http://127.0.0.1:1", "/v1/chat/completions", {}), lambda reply: True)
    connection.connection_made(Transport())  # type: ignore[arg-type]
    reply = Reply(0, 0.0, 0, 3)
    answered: list[Reply] = []
    connection.send(reply, b"{}", lambda used, reply: answered.append(reply))
    for piece in pieces:
        if not answered:
            connection.data_received(piece)
    if closes and not answered:
        connection.connection_lost(None)
    assert answered == [reply]
    return reply, connection


def check_whole(reply: Reply) -> None:
    assert reply.error is None
    assert reply.texts == ["eins", " zwei", "é"]
    assert len(reply.times) == 3
    assert (reply.output, reply.input, reply.cached) == (3, 9, 4)


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_cutting_of_the_stream_is_the_whole(cuts: list[int]) -> None:
    edges = [0, *sorted(set(cuts)), len(STREAM)]
    reply, connection = received([STREAM[a:b] for a, b in itertools.pairwise(edges)])
    check_whole(reply)
    assert connection.usable


@given(st.lists(st.integers(1, 400), max_size=20))
@settings(max_examples=100, deadline=None)
def test_events_need_not_be_chunks(sizes: list[int]) -> None:
    body = b"".join(EVENTS)
    pieces, at = [], 0
    for size in [*sizes, len(body)]:
        pieces.append(body[at : at + size])
        at += size
    check_whole(received([HEAD + chunked(*filter(None, pieces))])[0])


def test_byte_by_byte() -> None:
    check_whole(received([STREAM[i : i + 1] for i in range(len(STREAM))])[0])


def test_lines_may_end_as_in_http() -> None:
    body = b"".join(EVENTS).replace(b"\n", b"\r\n")
    check_whole(received([HEAD + chunked(body[:50], body[50:])])[0])


def test_text_completions_and_reasoning() -> None:
    reasoning = b'data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}\n\n'
    reply, _ = received([HEAD + chunked(event("a", chat=False), reasoning, b"data: [DONE]\n\n")])
    assert (reply.error, reply.texts, reply.output) == (None, ["a", "hm"], None)


FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\n'
FINISH_WITH_USAGE = b'data: {"choices":[{"text":"","finish_reason":"stop"}],"usage":{"completion_tokens":3}}\n\n'


@pytest.mark.parametrize(
    ("after_the_text", "place"),
    [
        ([ROLE, FINISH, event(usage=USAGE)], 2),
        ([event(usage=USAGE)], 1),
        ([event("", usage=USAGE), event("", usage=USAGE), FINISH_WITH_USAGE], 3),
        ([ROLE, b"data: [DONE]\n\n"], None),
    ],
    ids=["finish reason", "usage alone", "usage with every event", "neither"],
)
def test_when_the_server_was_done(
    after_the_text: list[bytes], place: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock ticks once when the request is sent and at each piece that arrives."""
    clock = itertools.count(100.0)
    monkeypatch.setattr("skyline.bench.load.http.perf_counter", lambda: next(clock))
    reply, _ = received([HEAD, *(b"%x\r\n%b\r\n" % (len(e), e) for e in [event("a"), *after_the_text]), b"0\r\n\r\n"])
    assert reply.times == [102.0] and reply.error is None
    assert reply.finished == (0.0 if place is None else 102.0 + place)


def test_an_answer_until_the_connection_closes() -> None:
    head = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    reply, connection = received([head + b"".join(EVENTS)], closes=True)
    check_whole(reply)
    assert not connection.usable


def test_a_stream_that_only_its_connection_delimits_must_say_that_it_ended() -> None:
    """A server that died would else have answered, in fewer tokens."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    reply, _ = received([head + b"".join(EVENTS[:3])], closes=True)
    assert reply.error is not None and "ended before the answer did" in reply.error and len(reply.times) == 2
    for end in (FINISH, event(usage=USAGE), b"data: [DONE]\n\n"):
        assert received([head + event("a") + end], closes=True)[0].error is None


def test_a_server_that_does_not_stream() -> None:
    body = json.dumps(
        {"choices": [{"message": {"role": "assistant", "content": "all of it"}}], "usage": USAGE}
    ).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    reply, connection = received([head, body[:10], body[10:]])
    assert (reply.error, reply.texts, len(reply.times), reply.output) == (None, ["all of it"], 1, 3)
    assert connection.usable


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([b"HTTP/1.1 400 Bad Request\r\nContent-Length: 9\r\n\r\nno model!"], "HTTP 400: no model!"),
        ([b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"], "HTTP 503"),
        ([b"SSH-2.0-OpenSSH_9.2\r\n\r\n"], "not an HTTP answer"),
        ([b"x" * 70_000], "longer than 64 KiB"),
        ([HEAD + b"zz\r\n"], "broken chunked encoding"),
        ([HEAD + b"fffffffff\r\n"], "a chunk of"),
        ([HEAD + chunked(b"data: {not json\n\n")], "not a completion chunk"),
        ([HEAD + chunked(b'data: {"choices": 5}\n\n')], "not a completion chunk"),
        ([HEAD + chunked(b'data: {"error": {"message": "out of memory"}}\n\n')], "out of memory"),
        ([HEAD + chunked(b"data: [DONE]\n\n")], "holds no token"),
        ([HEAD + chunked(*EVENTS[:3])], "ended before the answer did"),
        ([b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]"], "not a completion"),
    ],
)
def test_what_is_wrong_is_said(pieces: list[bytes], said: str) -> None:
    reply, _ = received(pieces)
    assert reply.error is not None and said in reply.error


@pytest.mark.parametrize("cut", [0, 20, len(HEAD), len(STREAM) - 8])
def test_a_connection_lost_on_the_way(cut: int) -> None:
    reply, _ = received([STREAM[:cut]] if cut else [], closes=True)
    assert reply.error is not None and "closed" in reply.error


async def answered_by(
    handler: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object], timeout_s: float = 5
) -> Reply:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)  # type: ignore[arg-type]
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return await ask(url, "/v1/completions", {}, {"prompt": "x"}, timeout_s)


@pytest.mark.asyncio
async def test_a_request_over_a_real_socket() -> None:
    seen: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        seen.append(head)
        seen.append(await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])))
        writer.write(STREAM)

    check_whole(await answered_by(handler))
    assert seen[0].startswith(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:")
    assert json.loads(seen[1]) == {"prompt": "x"}


@pytest.mark.asyncio
async def test_a_server_that_never_finishes() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        await reader.read()

    reply = await answered_by(handler, timeout_s=0.3)
    assert reply.error == "not finished after 0.3 s"


@pytest.mark.asyncio
async def test_nobody_listens() -> None:
    reply = await ask("http://127.0.0.1:9", "/v1/completions", {}, {}, 2)
    assert reply.error is not None and "cannot connect" in reply.error


def test_addresses() -> None:
    address = Address.of("https://api.example.org/openai/", "/v1/completions", {"Authorization": "Bearer k"})
    assert (address.host, address.port, address.path) == ("api.example.org", 443, "/openai/v1/completions")
    assert b"\r\nAuthorization: Bearer k\r\n" in address.head
    for url in ("", "127.0.0.1:80", "ftp://x", "http://"):
        with pytest.raises(ValueError, match="not an address"):
            Address.of(url, "/", {})
    with pytest.raises(ValueError, match="control characters"):
        Address.of("http://x", "/", {"Authorization": "a\r\nX: y"})
