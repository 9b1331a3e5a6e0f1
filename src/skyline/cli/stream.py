"""Print an answer while it is generated."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from skyline.cli import console

if TYPE_CHECKING:
    from skyline.engine.config import EngineConfig
    from skyline.engine.sampling_params import SamplingParams
    from skyline.frontend.async_llm import AsyncLLM


async def load(config: EngineConfig, revision: str | None) -> AsyncLLM:
    """Start an engine and wait for it, with a sign of life for people. Raises what AsyncLLM.start and wait_ready do."""
    from rich.console import Console

    from skyline.frontend.async_llm import AsyncLLM

    with Console(stderr=True).status("Loading the model") if sys.stderr.isatty() else contextlib.nullcontext():
        llm = await AsyncLLM.start(config, revision=revision)
        try:
            await llm.wait_ready()
        except BaseException:
            await llm.close()
            raise
    return llm


@contextlib.asynccontextmanager
async def loaded(config: EngineConfig, revision: str | None) -> AsyncIterator[AsyncLLM]:
    llm = await load(config, revision)
    try:
        yield llm
    finally:
        await llm.close()


async def print_answer(llm: AsyncLLM, prompt: list[int], params: SamplingParams) -> str:
    """Returns the whole text. Cancelling stops the generation."""
    began = time.perf_counter()
    first: float | None = None
    tokens = 0
    pieces: list[str] = []
    async for update in llm.submit(prompt, params):
        first = first or time.perf_counter()
        tokens += len(update.token_ids)
        pieces.append(update.text)
        sys.stdout.write(update.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    ended = time.perf_counter()
    if first is not None and tokens > 1:
        console.note(
            f"[{len(prompt)} prompt tokens, first token after {first - began:.2f} s, "
            f"{tokens} tokens at {(tokens - 1) / max(ended - first, 1e-9):.1f} tokens/s]"
        )
    return "".join(pieces)
