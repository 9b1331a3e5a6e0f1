"""Bytes on a connection: heads that are too large, too slow or no HTTP, slow bodies, and several requests at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from skyline.frontend.async_llm import AsyncLLM
from skyline.server import ServerOptions, create_app, http
from tests.server.conftest import FakeEngine, listening

pytestmark = pytest.mark.asyncio
BODY = b'{"prompt": "a", "max_tokens": 1000}'


def head(path: str, length: int, more: str = "") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, *([more] if more else []), "", ""]).encode()


@asynccontextmanager
async def connected(llm: AsyncLLM, **options: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with listening(create_app(llm, ServerOptions(api_keys=[], **options))) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            yield reader, writer
        finally:
            writer.close()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server closes the connection."""
    async with asyncio.timeout(10):
        received = b""
        try:
            while part := await reader.read(65536):
                received += part
        except ConnectionError:  # the server closed while the client was still sending
            pass
        return received


def assert_refused(answer: bytes, status: int, mentions: str) -> None:
    start, _, body = answer.partition(b"\r\n\r\n")
    assert start.startswith(f"HTTP/1.1 {status} ".encode()) and b"connection: close" in start.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert mentions in error["message"]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.3)
    yield


@pytest.mark.parametrize("name", ["X: ", "GET /"], ids=["header", "url"])
async def test_a_head_without_end(llm: AsyncLLM, name: str) -> None:
    async with connected(llm) as (_, writer):
        writer.write(b"" if name.startswith("GET") else b"GET /health HTTP/1.1\r\n")
        writer.write(name.encode())
        async with asyncio.timeout(10):
            while not writer.transport.is_closing():
                writer.write(b"a" * 50_000)
                await asyncio.sleep(0.001)


async def test_a_large_head_is_answered(llm: AsyncLLM) -> None:
    async with connected(llm) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nX: a")
        await asyncio.sleep(0.1)
        writer.write(b"a" * http.MAX_HEAD_BYTES)
        assert_refused(await rest(reader), 431, "larger than")


async def test_a_slow_head(llm: AsyncLLM, impatient: None) -> None:
    async with connected(llm) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nX: ")
        assert_refused(await rest(reader), 408, "did not arrive within")


async def test_a_slow_head_after_an_answer(llm: AsyncLLM, impatient: None) -> None:
    async with connected(llm) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"}")).endswith(b'"ok"}')
        writer.write(b"GET /health HTTP/1.1\r\nX: ")
        assert_refused(await rest(reader), 408, "did not arrive within")


async def test_a_connection_that_says_nothing(llm: AsyncLLM, impatient: None) -> None:
    async with connected(llm) as (reader, _):
        assert await rest(reader) == b""


async def test_a_slow_head_does_not_cut_off_the_answer_before_it(
    llm: AsyncLLM, engine: FakeEngine, impatient: None
) -> None:
    engine.reply, engine.delay = "x" * 100, 0.01
    async with connected(llm) as (reader, writer):
        writer.write(head("/v1/completions", len(BODY)) + BODY + b"GET /health HTTP/1.1\r\nX: ")
        answer = await rest(reader)
    first, _, second = answer.partition(b"HTTP/1.1 408")
    assert b"x" * 100 in first and b"did not arrive within" in second


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS greeting
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_no_http(llm: AsyncLLM, request_bytes: bytes) -> None:
    async with connected(llm) as (reader, writer):
        writer.write(request_bytes)
        assert_refused(await rest(reader), 400, "invalid HTTP request")


async def test_a_slow_body(llm: AsyncLLM) -> None:
    async with connected(llm, body_timeout=0.3) as (reader, writer):
        writer.write(head("/v1/completions", len(BODY)) + BODY[:5])
        assert_refused(await rest(reader), 408, "the body did not arrive within 0.3 s")


async def test_a_chunked_body_without_end(llm: AsyncLLM) -> None:
    async with connected(llm, max_body_bytes=1000) as (reader, writer):
        writer.write(b"POST /tokenize HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"7d0\r\n" + b"a" * 2000 + b"\r\n")
        assert_refused(await rest(reader), 413, "larger than 1000 bytes")


async def test_pipelined_requests_are_answered_in_order(llm: AsyncLLM, engine: FakeEngine) -> None:
    engine.reply = lambda request: "ab" if request.prompt[0] == request.prompt[-1] else "cd"
    async with connected(llm) as (reader, writer):
        for text in ("xx", "xy"):
            body = json.dumps({"prompt": text}).encode()
            last = "Connection: close" if text == "xy" else ""
            writer.write(head("/v1/completions", len(body), last) + body)
        answer = await rest(reader)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert 0 < answer.index(b'"text":"ab"') < answer.index(b'"text":"cd"')
