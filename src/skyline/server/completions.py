"""POST /v1/completions: https://platform.openai.com/docs/api-reference/completions/create"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from skyline.engine.sampling_params import SamplingParams
from skyline.frontend.async_llm import AsyncLLM, Generation, Update
from skyline.server.chat import prepare, submit
from skyline.server.logprobs import LegacyWriter, join, prompt_logprobs
from skyline.server.protocol import CompletionRequest
from skyline.server.responses import (
    CachedDetails,
    Completion,
    CompletionChoice,
    LegacyLogprobs,
    Usage,
    encoder,
    event,
)
from skyline.server.sampling import sampling_params
from skyline.server.service import Service
from skyline.server.stream import EventStream, updates

DEFAULT_MAX_TOKENS = 16  # OpenAI's
_PAUSE_EVERY = 16  # prompts tokenized before other requests get a turn


class _ChoiceState:
    """One choice: what it has produced, as pieces for the client."""

    def __init__(self, run: _Run, prompt: int) -> None:
        self.tokens = 0
        self._run = run
        self._prompt = prompt
        self._ids = run.generations[prompt].prompt_token_ids
        self._fresh = True
        self._writer: LegacyWriter | None = None
        if run.body.logprobs is not None:
            start = [] if run.body.echo else self._ids
            self._writer = LegacyWriter(run.llm.tokenizer, start, run.params.skip_special_tokens)

    def piece(self, update: Update) -> CompletionChoice:
        """What a client hears of this update."""
        run = self._run
        if run.prompt_only:
            # One token had to be sampled to get the prompt's own log-probabilities.
            update.text, update.token_ids, update.logprobs = "", [], None
            update.finish_reason = None if update.finish_reason is None else "length"
        self.tokens += len(update.token_ids)
        choice = CompletionChoice(update.index, update.text)
        parts: list[LegacyLogprobs] = []
        if self._fresh:
            self._fresh = False
            if run.body.echo:
                choice.text = run.echo_text(self._prompt) + update.text
                if self._writer is not None:
                    parts.append(self._writer.write(self._ids, [None, *(update.prompt_logprobs or [])]))
            if run.body.prompt_logprobs is not None:
                choice.prompt_logprobs = prompt_logprobs(run.llm.tokenizer, update.prompt_logprobs or [])
        if self._writer is not None:
            parts.append(self._writer.write(update.token_ids, update.logprobs or []))
            choice.logprobs = join(parts)
        if update.finish_reason is not None:
            choice.finish_reason = update.finish_reason
            choice.stop_reason = _stop_reason(update, run.params)
        return choice


@dataclass
class _Run:
    """One request, ready to run."""

    service: Service
    llm: AsyncLLM
    body: CompletionRequest
    model: str
    params: SamplingParams
    arrived: float
    id: str
    generations: list[Generation] = field(default_factory=list)
    cached: dict[int, int] = field(default_factory=dict)  # by prompt

    @property
    def prompt_only(self) -> bool:
        return self.body.max_tokens == 0

    def echo_text(self, prompt: int) -> str:
        text = self.body.prompt[prompt]
        if isinstance(text, str):
            return text
        return self.llm.tokenizer.decode(text, skip_special_tokens=self.params.skip_special_tokens)

    def states(self) -> list[_ChoiceState]:
        return [_ChoiceState(self, prompt) for prompt in range(len(self.generations)) for _ in range(self.params.n)]

    async def updates(self) -> AsyncGenerator[Update, None]:
        async for update in updates(self.service, self.generations, self.params.n, self.arrived):
            if update.cached_tokens:
                prompt = update.index // self.params.n
                self.cached[prompt] = max(self.cached.get(prompt, 0), update.cached_tokens)
            yield update

    def usage(self, states: Sequence[_ChoiceState]) -> Usage:
        prompt = sum(len(generation.prompt_token_ids) for generation in self.generations)
        output = sum(state.tokens for state in states)
        return Usage(prompt, output, prompt + output, CachedDetails(sum(self.cached.values())))

    def cancel(self) -> None:
        for generation in self.generations:
            generation.cancel()


async def completion(service: Service, request: Request, body: CompletionRequest) -> Response:
    """Raises ApiError and what `as_api_error` knows; then nothing goes on running."""
    arrived = time.perf_counter()
    llm = service.llm()
    model = service.check_model(body.model)
    prompts = await _tokenize(llm, body)
    params = _params(llm, body)
    service.charge([len(prompt) for prompt in prompts], params)
    params = await prepare(llm, body, params)
    run = _Run(service, llm, body, model, params, arrived, f"cmpl-{uuid.uuid4().hex}")
    try:
        for number, prompt in enumerate(prompts):
            mine = params
            if body.max_tokens is None:  # OpenAI's default, or what is left
                room = max(1, min(DEFAULT_MAX_TOKENS, llm.max_model_len - len(prompt)))
                mine = msgspec.structs.replace(params, max_tokens=room)
            run.generations.append(submit(llm, request, body, prompt, mine, f"{run.id}-{number}"))
            if number % _PAUSE_EVERY == _PAUSE_EVERY - 1:
                await asyncio.sleep(0)
    except BaseException:
        run.cancel()
        raise
    if body.stream:
        return EventStream(service, _stream(run), run.generations)
    try:
        answer = await service.watched(request.receive, _whole(run))
    finally:
        run.cancel()
    return Response(encoder.encode(answer), media_type="application/json")


async def _tokenize(llm: AsyncLLM, body: CompletionRequest) -> list[list[int]]:
    """Every prompt is checked before any of them is started."""
    prompts: list[list[int]] = []
    for number, prompt in enumerate(body.prompt):
        if isinstance(prompt, str):
            prompt = await llm.tokenize(prompt, add_special_tokens=body.add_special_tokens is not False)
        llm.check_prompt(prompt)
        prompts.append(prompt)
        if number % _PAUSE_EVERY == _PAUSE_EVERY - 1:
            await asyncio.sleep(0)
    return prompts


def _params(llm: AsyncLLM, body: CompletionRequest) -> SamplingParams:
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else max(body.max_tokens, 1)
    prompt_entries = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        prompt_entries = max(body.logprobs, prompt_entries or 0)
    return sampling_params(
        body,
        llm.generation_defaults,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=prompt_entries,
        grammar=body.grammar(),
    )


def _stop_reason(update: Update, params: SamplingParams) -> str | int | UnsetType:
    reason = update.stop_reason
    if isinstance(reason, str) or (reason is not None and reason in params.stop_token_ids):
        return reason
    return UNSET


async def _whole(run: _Run) -> Completion:
    states = run.states()
    pieces: list[list[CompletionChoice]] = [[] for _ in states]
    async for update in run.updates():
        pieces[update.index].append(states[update.index].piece(update))
    choices = [_joined(index, parts) for index, parts in enumerate(pieces)]
    return Completion(run.id, int(time.time()), run.model, choices, usage=run.usage(states))


def _joined(index: int, parts: list[CompletionChoice]) -> CompletionChoice:
    choice = CompletionChoice(index, "".join(part.text for part in parts))
    logprobs: list[LegacyLogprobs] = [part.logprobs for part in parts if part.logprobs is not None]
    if logprobs:
        choice.logprobs = join(logprobs)
    choice.prompt_logprobs = parts[0].prompt_logprobs
    choice.finish_reason, choice.stop_reason = parts[-1].finish_reason, parts[-1].stop_reason
    return choice


async def _stream(run: _Run) -> AsyncGenerator[bytes, None]:
    states = run.states()
    options = run.body.stream_options
    continuous = options is not None and bool(options.continuous_usage_stats)
    chunk = Completion(run.id, int(time.time()), run.model, [])
    async for update in run.updates():
        choice = states[update.index].piece(update)
        if not choice.text and choice.finish_reason is None and not (choice.logprobs and choice.logprobs.tokens):
            continue  # the text is still being held back
        chunk.choices = [choice]
        if continuous:
            chunk.usage = run.usage(states)
        yield event(chunk)
    if options is not None and options.include_usage:
        chunk.choices, chunk.usage = [], run.usage(states)
        yield event(chunk)
