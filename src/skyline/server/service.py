"""What all routes share: the model behind them, whether it can take requests, and the requests under way."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import Receive

from skyline.engine.sampling_params import SamplingParams
from skyline.frontend.async_llm import AsyncLLM
from skyline.frontend.errors import OverloadedError
from skyline.frontend.parsers import REASONING_FORMATS, TOOL_FORMATS, ReasoningFormat, ToolFormat, detect_formats
from skyline.server.errors import ApiError, ClientGone, invalid, quote, unavailable
from skyline.server.metrics import Metrics
from skyline.server.options import ServerOptions

T = TypeVar("T")

_MAX_BULK = 20_000_000  # of parameters that go with every sequence of one request; some 100 MB


class Service:
    """One for each app. Until a model is attached and ready, `llm()` raises 503."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.metrics = Metrics()
        self.created = int(time.time())
        self.reasoning: ReasoningFormat | None = None
        self.tools: ToolFormat | None = None
        self.draining = False  # no new requests
        self._stopping = False  # and those under way are being ended
        self._llm: AsyncLLM | None = None
        self._active: set[asyncio.Task[Any]] = set()

    def attach(self, llm: AsyncLLM) -> None:
        """The model is known; it may still be loading."""
        self._llm = llm
        self.metrics.watch(llm.engine)
        self.reasoning, self.tools = self._formats(llm)

    def _formats(self, llm: AsyncLLM) -> tuple[ReasoningFormat | None, ToolFormat | None]:
        templates = llm.tokenizer.chat_templates
        source = None if llm.chat_template is None else llm.chat_template.source
        reasoning, tools = detect_formats(source, llm.tokenizer.token_id)
        if tools is None and "tool_use" in templates:
            tools = detect_formats(templates["tool_use"])[1]
        if self.options.reasoning_parser != "auto":
            reasoning = REASONING_FORMATS.get(self.options.reasoning_parser)
        if self.options.tool_parser != "auto":
            tools = TOOL_FORMATS.get(self.options.tool_parser)
        return reasoning, tools

    # --- state -------------------------------------------------------------------------------------------------------

    def problem(self) -> tuple[str, str] | None:
        """(code, what is wrong) while requests cannot be served, else None."""
        llm = self._llm
        if self.draining:
            return "draining", "the server is shutting down"
        if llm is None or (llm.engine.ready is None and llm.engine.error is None):
            return "loading", "the model is still loading; try again in a few seconds"
        wrong = llm.engine.health()
        if wrong is None:
            return None
        return "engine_dead" if llm.engine.error is not None else "engine_stalled", wrong

    def llm(self) -> AsyncLLM:
        """The model, ready. Raises 503 otherwise."""
        problem = self.problem()
        if problem is not None and problem[0] != "engine_stalled":
            raise unavailable(problem[1], problem[0])
        assert self._llm is not None
        return self._llm

    def model_names(self) -> list[str]:
        """The names that requests may use; the first is the one that is reported."""
        if self.options.served_model_names:
            return self.options.served_model_names
        return [self.llm().model_name if self._llm is None else self._llm.model_name]

    def check_model(self, name: str | None) -> str:
        """The name to report. Raises 404 for a model that is not served here."""
        names = self.model_names()
        if name is None or name in names:
            return name or names[0]
        served = ", ".join(map(repr, names))
        message = f"the model {quote(name)} is not served here; use {served}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def charge(self, prompt_lengths: Sequence[int], params: SamplingParams) -> None:
        """Refuse a request whose sequences together ask for too much, before any of them is started.

        A single sequence is bounded by the context alone.
        """
        llm = self.llm()
        sequences = params.n * len(prompt_lengths)
        if sequences == 1:
            return
        if sequences > llm.max_queued:
            raise invalid(f"{sequences} sequences are asked for at once (prompts × n); at most {llm.max_queued}", "n")
        if sequences * _bulk(params) > _MAX_BULK:
            raise invalid(
                f"{sequences} sequences (prompts × n) with these parameters are too much at once: each takes a copy of "
                "the grammar, bad_words, allowed_token_ids and logit_bias; send fewer prompts or shorten them"
            )
        tokens = 0
        for length in prompt_lengths:
            room = max(llm.max_model_len - length, 0)
            tokens += params.n * (length + (room if params.max_tokens is None else min(params.max_tokens, room)))
        if tokens > self.options.max_request_tokens:
            raise invalid(
                f"this request could take {tokens} tokens (prompts and max_tokens × n); at most "
                f"{self.options.max_request_tokens} are allowed: lower n or max_tokens, or send fewer prompts",
                "max_tokens" if params.max_tokens is None or params.max_tokens > 1 else "n",
            )
        under_way = llm.engine.num_unfinished
        if under_way + sequences > llm.max_queued:
            raise OverloadedError(
                f"{under_way} sequences are under way and at most {llm.max_queued} are taken; try again later"
            )

    # --- requests under way ------------------------------------------------------------------------------------------

    async def watched(self, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which ends early when the client leaves (ClientGone) or the server stops (ApiError).

        The request's body must have been read.
        """
        task = asyncio.create_task(work)
        watcher = asyncio.create_task(_disconnected(receive))
        watcher.add_done_callback(lambda _: task.cancel())
        self._active.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            if self._stopping:
                raise unavailable("the server is shutting down; this request was not finished", "draining") from None
            raise ClientGone from None
        finally:
            self._active.discard(task)
            watcher.cancel()
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    def stop(self) -> None:
        """End all requests under way; each client gets an error."""
        self.draining = self._stopping = True
        for task in self._active:
            task.cancel()


def _bulk(params: SamplingParams) -> int:
    """Characters and entries of what a client can make long."""
    grammar = "" if params.grammar is None else params.grammar.text
    words = sum(map(len, params.bad_words)) + sum(map(len, params.stop))
    lists = len(params.allowed_token_ids or ()) + len(params.logit_bias) + len(params.stop_token_ids)
    return len(grammar) + words + lists


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
