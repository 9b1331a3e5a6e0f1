"""HTTP/1.1 with server-sent events, written to spend little on each token.

A general client hands every event through several layers of coroutines; at tens of thousands of tokens a second on the
cores that the server also needs, that is what would be measured. Here the transport calls `data_received` and a few
microseconds later the event's time and text are noted. Formats: RFC 9112 (HTTP/1.1), the HTML standard's
"Server-sent events" (event stream interpretation), and OpenAI's streamed completions.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import msgspec


class Reply:
    """What became of one request. Times are perf_counter's seconds; `times` has one entry for each event with text."""

    __slots__ = (
        *("index", "intended", "planned", "target"),
        *("start", "end", "finished", "times", "texts"),
        *("input", "output", "cached", "error"),
    )

    def __init__(self, index: int, intended: float, input_tokens: int, target: int) -> None:
        self.index = index
        self.intended = intended
        self.planned: int | None = input_tokens  # meant to be sent, None where that is not known exactly
        self.input = input_tokens  # the same until usage reports it
        self.target = target  # output tokens asked for
        self.start = 0.0
        self.end = 0.0
        # When the server said that all tokens were generated, of which the last may have no text; 0 if it did not.
        self.finished = 0.0
        self.times: list[float] = []
        self.texts: list[str] = []
        self.output: int | None = None  # as usage reports it
        self.cached: int | None = None  # prompt tokens from a prefix cache, as usage reports it
        self.error: str | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    message: _Delta | None = None
    text: str | None = None
    finish_reason: Any = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


_decode = msgspec.json.Decoder(_Event).decode

_HEAD, _CHUNKS, _LENGTH, _UNTIL_CLOSE, _IDLE = range(5)
_MAX_HEAD = 64 * 1024
_MAX_ERROR_BODY = 64 * 1024
_MAX_PIECE = 64 * 1024 * 1024


@dataclass(frozen=True)
class Address:
    """Where requests go. `path` includes whatever stands before /v1 at that endpoint."""

    host: str
    port: int
    path: str
    tls: ssl.SSLContext | None
    head: bytes

    @classmethod
    def of(cls, url: str, path: str, headers: dict[str, str]) -> Address:
        """Raises ValueError if `url` is no http(s) address or a header could end the line."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is not an address like http://127.0.0.1:8000")
        if any(ord(char) < 32 for name, value in headers.items() for char in name + value):
            raise ValueError("headers must not contain control characters")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if tls else 80)
        path = parts.path.rstrip("/") + path
        lines = [f"POST {path} HTTP/1.1", f"Host: {parts.netloc.rpartition('@')[2]}", "Content-Type: application/json"]
        lines += ["Accept: text/event-stream", *(f"{name}: {value}" for name, value in headers.items())]
        return cls(parts.hostname, port, path, tls, ("\r\n".join(lines) + "\r\nContent-Length: ").encode())


class Connection(asyncio.Protocol):
    """One keep-alive connection; one request at a time. `keep_text` says whether texts are kept beside their times."""

    def __init__(self, address: Address, keep_text: Callable[[Reply], bool]) -> None:
        self._address = address
        self._keep_text = keep_text
        self._transport: asyncio.Transport | None = None
        self._state = _IDLE
        self._buffer = b""
        self._event = b""
        self._length = 0
        self._status = 0
        self._stream = False
        self._ended = False
        self._keeps = False
        self._answered = False
        # Closed by the server after an answer, before a byte of the next: it never read that request.
        self.stale = False
        self._body: list[bytes] = []
        self._reply: Reply | None = None
        self._done: Callable[[Connection, Reply], None] | None = None

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing() and self._state == _IDLE

    async def connect(self) -> None:
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self, self._address.host, self._address.port, ssl=self._address.tls)

    def send(self, reply: Reply, body: bytes, done: Callable[[Connection, Reply], None]) -> None:
        """Sends a request; `done` is called once, when the answer is complete or has failed."""
        assert self._transport is not None
        self._reply, self._done = reply, done
        self._state, self._buffer, self._event, self._body, self._ended = _HEAD, b"", b"", [], False
        self._keep = self._keep_text(reply)
        # One that is sent again began when it was sent first.
        reply.start = reply.start or perf_counter()
        self._transport.write(b"%b%d\r\n\r\n%b" % (self._address.head, len(body), body))

    def abort(self, why: str | None) -> None:
        """Ends the request under way, as failed if `why` says so, and the connection."""
        if self._transport is not None:
            self._transport.abort()
        if self._reply is not None:
            self._finish(why)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._reply is None:
            return
        if self._state == _UNTIL_CLOSE and error is None:
            self._complete()
        elif self._state == _HEAD:
            self.stale = self._answered and not self._buffer
            self._finish(f"the connection was closed before an answer ({error or 'end of stream'})")
        else:
            self._finish(f"the connection was closed in the middle of the answer ({error or 'end of stream'})")

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        if self._state == _HEAD:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._buffer = data
                if len(data) > _MAX_HEAD:
                    self.abort("the answer's head is longer than 64 KiB; is it an HTTP server?")
                return
            try:
                self._read_head(data[:end])
            except ValueError as error:
                self.abort(f"not an HTTP answer: {error}")
                return
            data = data[end + 4 :]
        if self._state == _CHUNKS:
            self._chunks(data, now)
        elif self._state == _LENGTH:
            piece, data = data[: self._length], data[self._length :]
            self._length -= len(piece)
            self._take(piece, now)
            if self._length == 0 and self._reply is not None:
                self._complete()
        elif self._state == _UNTIL_CLOSE:
            self._take(data, now)

    # the answer

    def _read_head(self, head: bytes) -> None:
        lines = head.decode("latin-1").split("\r\n")
        version, _, rest = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise ValueError(repr(lines[0][:100]))
        self._status = int(rest[:3])
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        self._stream = self._status == 200 and headers.get("content-type", "").startswith("text/event-stream")
        self._keeps = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        if headers.get("transfer-encoding", "").lower() == "chunked":
            self._state = _CHUNKS
        elif "content-length" in headers:
            self._state, self._length = _LENGTH, int(headers["content-length"])
            if self._length == 0:
                self._complete()
        else:
            self._state, self._keeps = _UNTIL_CLOSE, False

    def _chunks(self, data: bytes, now: float) -> None:
        position, size = 0, len(data)
        while position < size:
            line = data.find(b"\r\n", position)
            if line < 0:
                break
            try:
                length = int(data[position:line].partition(b";")[0], 16)
            except ValueError:
                self.abort(f"broken chunked encoding: {data[position : position + 40]!r}")
                return
            if length > _MAX_PIECE:
                self.abort(f"a chunk of {length} bytes in the answer")
                return
            begin = line + 2
            end = begin + length
            if length == 0:
                # Trailers are not waited for beyond the empty line that ends them.
                if data.find(b"\r\n", begin) < 0:
                    break
                self._complete()
                return
            if end + 2 > size:
                break
            self._take(data[begin:end], now)
            if self._reply is None:
                return
            position = end + 2
        self._buffer = data[position:]

    def _take(self, piece: bytes, now: float) -> None:
        if not self._stream:
            self._body.append(piece)
            if self._status != 200 and sum(map(len, self._body)) > _MAX_ERROR_BODY:
                self.abort(self._refusal())
            return
        data = self._event + piece if self._event else piece
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._event = data.split(b"\n\n")
        if len(self._event) > _MAX_PIECE:
            self.abort("an event without end in the answer")
            return
        for event in events:
            self._read_event(event, now)
            if self._reply is None:
                return

    def _read_event(self, event: bytes, now: float) -> None:
        if event.startswith(b"data: ") and b"\n" not in event:
            payload = event[6:]
        else:
            lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
            payload = b"\n".join(lines)
            if not payload:
                return  # a comment, as servers send to keep a connection alive
        if payload == b"[DONE]":
            self._ended = True
            return
        try:
            read = _decode(payload)
        except msgspec.MsgspecError as error:
            self.abort(f"an event of the stream is not a completion chunk ({error}): {payload[:200]!r}")
            return
        self._note(read, now)

    def _note(self, event: _Event, now: float) -> None:
        reply = self._reply
        assert reply is not None
        if event.error is not None and event.error != b"null":
            self.abort(f"the server reports: {bytes(event.error)[:300].decode('utf-8', 'replace')}")
            return
        for choice in event.choices:
            delta = choice.delta or choice.message
            text = choice.text if delta is None else delta.content or delta.reasoning_content or delta.reasoning
            # The chunk that only says why generation ended, and the first that only names the role, hold no token.
            if text:
                reply.times.append(now)
                if self._keep:
                    reply.texts.append(text)
            if choice.finish_reason is not None:
                reply.finished = now
        usage = event.usage
        if usage is not None and usage.completion_tokens is not None:
            if not event.choices:
                reply.finished = reply.finished or now
            reply.output = usage.completion_tokens
            if usage.prompt_tokens is not None:
                reply.input = usage.prompt_tokens
            if usage.prompt_tokens_details is not None:
                reply.cached = usage.prompt_tokens_details.cached_tokens

    def _refusal(self) -> str:
        text = b"".join(self._body).decode("utf-8", "replace").strip()
        return f"HTTP {self._status}: {text[:300]}"

    def _complete(self) -> None:
        """The whole answer has arrived."""
        now = perf_counter()
        if self._status != 200:
            self._finish(self._refusal())
            return
        if self._stream and self._event.strip():
            self._read_event(self._event.strip(b"\n"), now)
        elif not self._stream:
            try:
                self._note(_decode(b"".join(self._body)), now)
            except msgspec.MsgspecError as error:
                self._finish(f"the answer is not a completion: {error}")
        if self._reply is None:
            return
        if not self._reply.times and self._reply.output is None:
            self._finish("the answer holds no token")
        elif self._stream and not self._ended and not self._reply.finished:
            # One that is delimited by its connection, or passed on by a proxy, looks complete to HTTP when it is not.
            self._finish("the stream ended before the answer did: no finish_reason, no usage and no [DONE]")
        else:
            self._finish(None)

    def _finish(self, error: str | None) -> None:
        reply, done = self._reply, self._done
        assert reply is not None and done is not None
        self._reply = self._done = None
        self._state, self._buffer = _IDLE, b""
        reply.end = perf_counter()
        reply.error = error
        self._answered = True
        if not self._keeps and self._transport is not None:
            self._transport.close()
        done(self, reply)


async def ask(url: str, path: str, headers: dict[str, str], fields: dict[str, Any], timeout_s: float) -> Reply:
    """One request; its failure is in the reply's `error`."""
    reply = Reply(0, perf_counter(), 0, 0)
    try:
        connection = Connection(Address.of(url, path, headers), lambda reply: True)
        await asyncio.wait_for(connection.connect(), timeout_s)
    except (OSError, ValueError, TimeoutError) as error:
        reply.error = f"cannot connect to {url}: {str(error) or 'timed out'}"
        return reply
    answered: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
    connection.send(reply, msgspec.json.encode(fields), lambda used, reply: answered.set_result(reply))
    try:
        await asyncio.wait_for(asyncio.shield(answered), timeout_s)
    except TimeoutError:
        connection.abort(f"not finished after {timeout_s:g} s")
    else:
        connection.abort(None)
    return reply
