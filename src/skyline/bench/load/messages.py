"""What the generator and its workers tell each other: MessagePack after its length in four bytes, over pipes."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec


class Body(msgspec.Struct):
    """A request's JSON in pieces: head + content + middle + max_tokens + tail."""

    head: bytes
    middle: bytes
    tail: bytes


class Setup(msgspec.Struct):
    """All that a worker needs. Request k of worker w has the number w + k·workers, and lengths of that number
    (modulo)."""

    worker: int
    workers: int
    url: str
    path: str
    headers: dict[str, str]
    body: Body
    words: list[str]
    overhead: int
    salt: int
    inputs: list[int]
    outputs: list[int]
    timeout_s: float
    # At least so many replies' texts are kept, of every k-th request, if there are as many; None keeps all.
    keep_texts: int | None
    # Closed loop: so many clients, each waiting so long between an answer and its next request.
    clients: int = 0
    think_time_s: float = 0.0
    # Open loop: intended starts of this worker's requests, in seconds since the load's begin.
    starts: list[float] | None = None
    # Sessions: turns of each, and the messages that all of them begin with.
    turns: int = 1
    opening: list[dict[str, str]] = []
    opening_tokens: int = 0
    request: dict[str, Any] = {}


class Ready(msgspec.Struct, tag="ready"):
    pass


class Progress(msgspec.Struct, tag="progress"):
    """Totals since the begin."""

    ended: int
    failed: int
    tokens: int
    under_way: int
    last_error: str | None = None


class Report(msgspec.Struct, tag="report"):
    """Columns in order of sending; times in perf_counter's seconds, which are the same clock in all processes.

    `end` is 0 where the request was still under way, `finished` where the server did not say that it was done.
    `planned` is how many tokens the input was meant to have, None for what follows a session's first turn. `events`
    counts events with text; `event_times` holds all of them as float64, request by request. `lags` are the event loop's
    latenesses, float64."""

    index: list[int]
    intended: list[float]
    start: list[float]
    end: list[float]
    finished: list[float]
    planned: list[int | None]
    input: list[int]
    target: list[int]
    output: list[int | None]
    cached: list[int | None]
    error: list[str | None]
    events: list[int]
    event_times: bytes
    texts: dict[int, str]
    lags: bytes
    lag_times: bytes
    cpu_times: list[tuple[float, float]]
    repeated_prompts: int


class Failed(msgspec.Struct, tag="failed"):
    """The worker gave up; nothing was measured."""

    reason: str


FromWorker = Ready | Progress | Report | Failed

_encode = msgspec.msgpack.Encoder().encode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
decode_setup = msgspec.msgpack.Decoder(Setup).decode
decode_begin = msgspec.msgpack.Decoder(float).decode


def frame(message: object) -> bytes:
    data = _encode(message)
    return len(data).to_bytes(4, "big") + data


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """Raises asyncio.IncompleteReadError at the end of the stream."""
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
