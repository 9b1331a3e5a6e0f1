"""A server that does nothing but answer: what the load generator reaches against it is the generator's own limit.

It steps like an engine: each step sends one event with one token to every request under way, and the next step
follows at once, or after `step_s`. Run it as `python -m skyline.bench.load.null_server --port 0`; it prints its
address.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import sys

_MAX_TOKENS = re.compile(rb'"max_(?:completion_)?tokens"\s*:\s*(\d+)')
_STREAM = re.compile(rb'"stream"\s*:\s*true')
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk(data: str) -> bytes:
    body = f"data: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(body), body)


def _event(object_name: str, **fields: object) -> bytes:
    common = {"id": "null-1", "object": object_name, "created": 0, "model": "null"}
    return _chunk(json.dumps({**common, **fields}))


_CHAT = _event("chat.completion.chunk", choices=[{"index": 0, "delta": {"content": " a"}, "finish_reason": None}])
_TEXT = _event("text_completion", choices=[{"index": 0, "text": " a", "finish_reason": None}])
_MODELS = json.dumps({"object": "list", "data": [{"id": "null", "object": "model"}]}).encode()


def _last(chat: bool, tokens: int) -> bytes:
    usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
    nothing: dict[str, object] = {"delta": {}} if chat else {"text": ""}
    finish = {"index": 0, **nothing, "finish_reason": "length"}
    name = "chat.completion.chunk" if chat else "text_completion"
    events = _event(name, choices=[finish]) + _event(name, choices=[], usage=usage) + _chunk("[DONE]")
    return events + b"0\r\n\r\n"


def _whole(chat: bool, tokens: int) -> bytes:
    """An answer that is not streamed."""
    text = " a" * tokens
    choice: dict[str, object] = {"index": 0, "finish_reason": "length"}
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
    return _json(json.dumps({"id": "null-1", "model": "null", "choices": [choice], "usage": usage}).encode())


def _json(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


class NullServer:
    """`step_s` is the time between steps, `stall` = (after_s, for_s) stops all steps once that long after the first
    request."""

    def __init__(self, step_s: float = 0.0, stall: tuple[float, float] | None = None) -> None:
        self._step_s = step_s
        self._stall = stall
        self._active: list[_Client] = []
        self._stepping = False
        self._loop = asyncio.get_running_loop()
        self._next = 0.0
        self._requests = self._tokens = 0
        self._first = self._last = 0.0
        self._stalled: tuple[float, float] | None = None

    def stats(self) -> bytes:
        """What was sent so far, the seconds between the first request's arrival and the last token, and from when to
        when steps were stopped, on the monotonic clock."""
        seconds = self._last - self._first
        sent = {"requests": self._requests, "tokens": self._tokens, "seconds": seconds, "stalled": self._stalled}
        return json.dumps(sent).encode()

    def join(self, client: _Client) -> None:
        self._active.append(client)
        self._requests += 1
        self._first = self._first or self._loop.time()
        if not self._stepping:
            self._stepping = True
            self._next = max(self._next, self._loop.time() + self._step_s)  # a stall may have begun while idle
            if self._stall is not None and self._stall[0] >= 0:
                self._loop.call_later(self._stall[0], self._begin_stall, self._stall[1])
                self._stall = None
            self._schedule()

    def _begin_stall(self, seconds: float) -> None:
        now = self._loop.time()
        self._next = max(self._next, now + seconds)
        self._stalled = (now, self._next)

    def _schedule(self) -> None:
        if self._step_s > 0 or self._next > self._loop.time():
            self._loop.call_at(self._next, self._step)
        else:
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        if self._loop.time() < self._next:  # a stall began meanwhile
            self._loop.call_at(self._next, self._step)
            return
        self._tokens += len(self._active)
        self._last = self._loop.time()
        self._active = [client for client in self._active if client.step()]
        self._stepping = bool(self._active)
        if self._stepping:
            self._next = max(self._next + self._step_s, self._loop.time()) if self._step_s else 0.0
            self._schedule()


class _Client(asyncio.Protocol):
    def __init__(self, server: NullServer) -> None:
        self._server = server
        self._buffer = b""
        self._left = self._tokens = 0
        self._chat = True
        self._event = _CHAT
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        self._left = -1

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        found = _LENGTH.search(self._buffer, 0, end + 2)
        total = end + 4 + (int(found.group(1)) if found else 0)
        if len(self._buffer) < total:
            return
        request, self._buffer = self._buffer[:total], self._buffer[total:]
        if request.startswith(b"GET "):
            self._transport.write(_json(self._server.stats() if request.startswith(b"GET /stats ") else _MODELS))
            return
        asked = _MAX_TOKENS.search(request, end)
        self._tokens = self._left = int(asked.group(1)) if asked else 16
        self._chat = b"/chat/" in request[:200]
        self._event = _CHAT if self._chat else _TEXT
        if _STREAM.search(request, end) is None:
            self._transport.write(_whole(self._chat, self._tokens))
            return
        self._transport.write(_HEAD)
        self._server.join(self)

    def step(self) -> bool:
        """Sends one token; False when it was the last, or the client has gone."""
        if self._left <= 0:
            return False
        self._left -= 1
        if self._left:
            self._transport.write(self._event)
            return True
        self._transport.write(self._event + _last(self._chat, self._tokens))
        return False


async def serve(host: str, port: int, step_s: float, stall: tuple[float, float] | None) -> None:
    """Prints the address and serves until it is cancelled or standard input ends, so that it never outlives who
    started it."""
    null = NullServer(step_s, stall)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Client(null), host, port, backlog=4096)
    print(f"http://{host}:{server.sockets[0].getsockname()[1]}", flush=True)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--step", type=float, default=0.0, help="seconds between tokens")
    parser.add_argument("--stall", type=float, nargs=2, metavar=("AFTER", "FOR"), help="stop once, in seconds")
    options = parser.parse_args()
    stall = (options.stall[0], options.stall[1]) if options.stall else None
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(options.host, options.port, options.step, stall))


if __name__ == "__main__":
    main()
