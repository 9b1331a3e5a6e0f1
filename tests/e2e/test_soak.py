"""Many requests at once, up to half of them aborted at some moment: the others are right, and nothing is left over."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import aiohttp
import pytest

from skyline.checkpoint import Tokenizer
from skyline.frontend.detokenizer import IncrementalDetokenizer
from tests.e2e.server import Server, serve
from tests.oracle.engine import NaiveModel

PROMPTS = 24


@pytest.mark.parametrize("requests", [200, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_soak(tiny_checkpoint: Path, requests: int) -> None:
    draw = random.Random(1)
    prompts = [[draw.randrange(3, 512) for _ in range(draw.randrange(1, 120))] for _ in range(PROMPTS)]
    lengths = [draw.randrange(1, 60) for _ in prompts]
    naive = NaiveModel(tiny_checkpoint)
    tokenizer = Tokenizer(tiny_checkpoint)
    expected = []
    for prompt, length in zip(prompts, lengths, strict=True):
        text = IncrementalDetokenizer(tokenizer, prompt)
        expected.append(text.push(naive.generate(prompt, length)) + text.finish())
    # Few blocks, so that preemption takes part as well.
    with serve(str(tiny_checkpoint), "--num-kv-blocks", "300", "--max-num-seqs", "48") as server:
        asyncio.run(_load(server, prompts, lengths, expected, 100, seed=2))
        server.wait_idle()
        before = server.rss_bytes()
        completed, aborted = asyncio.run(_load(server, prompts, lengths, expected, requests, seed=3))
        server.wait_idle()
        grown = server.rss_bytes() - before
        print(f"{completed} completed, {aborted} aborted, memory grew by {grown / 2**20:.1f} MiB")
        assert completed + aborted == requests
        assert aborted > requests * 0.2
        assert server.metric('skyline_kv_blocks{state="held"}') == 0
        assert grown < 64 << 20


async def _load(
    server: Server, prompts: list[list[int]], lengths: list[int], expected: list[str], requests: int, seed: int
) -> tuple[int, int]:
    draw = random.Random(seed)
    gate = asyncio.Semaphore(64)
    counts = {True: 0, False: 0}

    async def one(session: aiohttp.ClientSession, index: int, abort_after: float | None, abort_at: int | None) -> None:
        body = {
            "model": session_model,
            "prompt": prompts[index],
            "max_tokens": lengths[index],
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        async with gate:
            try:
                text = await asyncio.wait_for(_stream(session, server.url, body, abort_at), abort_after)
            except TimeoutError:
                text = None
        if text is None:
            counts[False] += 1
            return
        assert text == expected[index]
        counts[True] += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async with session.get(server.url + "/v1/models") as response:
            session_model = (await response.json())["data"][0]["id"]
        jobs = []
        for _ in range(requests):
            # Some after a while, which may find them waiting, or answered; as many after some of their tokens.
            kind, index = draw.random(), draw.randrange(PROMPTS)
            abort_after = draw.expovariate(1 / 0.02) if kind < 0.25 else None
            abort_at = draw.randrange(1, max(2, lengths[index] // 2)) if 0.25 <= kind < 0.5 else None
            jobs.append(one(session, index, abort_after, abort_at))
        await asyncio.gather(*jobs)
    return counts[True], counts[False]


async def _stream(session: aiohttp.ClientSession, url: str, body: dict, most: int | None) -> str | None:
    """The text; None if the connection was closed after so many events."""
    text, events = "", 0
    async with session.post(url + "/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                events += 1
                if events == most:
                    return None
                for choice in event["choices"]:
                    text += choice["text"]
    return text
