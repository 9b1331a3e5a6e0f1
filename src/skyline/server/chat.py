"""POST /v1/chat/completions: https://platform.openai.com/docs/api-reference/chat/create"""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from skyline.engine.messages import TokenLogprobs
from skyline.engine.sampling_params import SamplingParams
from skyline.frontend.async_llm import AsyncLLM, Generation, Update
from skyline.frontend.errors import InvalidRequestError
from skyline.frontend.parsers import (
    Parser,
    ReasoningFormat,
    ToolFormat,
    forced_header,
    make_parser,
    random_call_id,
)
from skyline.server.chat_choice import ChoiceState, MessageBuilder
from skyline.server.errors import invalid
from skyline.server.logprobs import chat_logprobs, prompt_logprobs
from skyline.server.messages import ChatMessage, NamedTool, Tool
from skyline.server.middleware import TENANT
from skyline.server.protocol import ChatRequest, GenerationRequest
from skyline.server.responses import (
    CachedDetails,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    Delta,
    ReasoningDetails,
    Usage,
    encoder,
    event,
)
from skyline.server.sampling import sampling_params
from skyline.server.service import Service
from skyline.server.stream import EventStream, updates
from skyline.server.tools import CallListParser, NamedCallParser, forced_grammar

# A template may take its two seconds of processor time; conversations this long are rendered in a thread.
_LONG_CONVERSATION_CHARS = 10_000


@dataclass
class _Chat:
    """One request, ready to run."""

    service: Service
    llm: AsyncLLM
    body: ChatRequest
    model: str
    prompt: str
    generation: Generation
    params: SamplingParams
    forced: NamedTool | str | None
    arrived: float
    id: str

    def states(self) -> list[ChoiceState]:
        reasoning = self._reasoning()
        end = None if reasoning is None else self.llm.tokenizer.token_id(reasoning.end)
        parallel = self.body.parallel_tool_calls is not False
        return [ChoiceState(self._parser(reasoning), end, parallel) for _ in range(self.params.n)]

    def _reasoning(self) -> ReasoningFormat | None:
        # A grammar holds from the first token on, so there is no room for reasoning.
        if self.service.reasoning is None or self.params.grammar is not None or self.body.continue_final_message:
            return None
        return self.service.reasoning.after_prompt(self.prompt)

    def _parser(self, reasoning: ReasoningFormat | None) -> Parser | None:
        new_call_id = functools.partial(random_call_id, self.service.tools)
        if isinstance(self.forced, NamedTool):
            return NamedCallParser(self.forced.function.name, new_call_id)
        if self.forced is not None:
            return CallListParser(new_call_id)
        tools = active_tools(self.service, self.body)
        if reasoning is None and tools is None:
            return None
        schemas = {tool.function.name: tool.function.parameters or {} for tool in self.body.tools or []}
        return make_parser(reasoning, tools, schemas.keys(), schemas=schemas, prompt=self.prompt)

    def updates(self) -> AsyncGenerator[Update, None]:
        return updates(self.service, [self.generation], self.params.n, self.arrived)

    def usage(self, states: Sequence[ChoiceState], cached: int) -> Usage:
        prompt, output = len(self.generation.prompt_token_ids), sum(state.tokens for state in states)
        usage = Usage(prompt, output, prompt + output, CachedDetails(cached))
        if self.service.reasoning is not None:
            usage.completion_tokens_details = ReasoningDetails(sum(state.reasoning_tokens for state in states))
        return usage


async def chat_completion(service: Service, request: Request, body: ChatRequest) -> Response:
    """Raises ApiError and what `as_api_error` knows; then nothing has been started."""
    arrived = time.perf_counter()
    llm = service.llm()
    model = service.check_model(body.model)
    prompt = await render(
        llm,
        body.messages,
        None if body.tool_choice == "none" else body.tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        kwargs=_template_kwargs(llm, body),
    )
    forced = body.tool_choice if isinstance(body.tool_choice, NamedTool) or body.tool_choice == "required" else None
    if forced is not None or body.grammar() is not None:
        prompt += forced_header(prompt, forced.function.name if isinstance(forced, NamedTool) else None)
    prompt_ids = await llm.tokenize(prompt, add_special_tokens=bool(body.add_special_tokens))
    llm.check_prompt(prompt_ids)
    params = _params(service, llm, body, forced)
    service.charge([len(prompt_ids)], params)
    params = await prepare(llm, body, params)
    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    generation = submit(llm, request, body, prompt_ids, params, request_id)
    chat = _Chat(service, llm, body, model, prompt, generation, params, forced, arrived, request_id)
    if body.stream:
        return EventStream(service, _stream(chat), [generation])
    try:
        answer = await service.watched(request.receive, _whole(chat))
    finally:
        generation.cancel()
    return Response(encoder.encode(answer), media_type="application/json")


async def render(
    llm: AsyncLLM,
    messages: Sequence[ChatMessage],
    tools: Sequence[Tool] | None,
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    kwargs: Mapping[str, Any],
) -> str:
    """The prompt for a conversation. Raises ApiError or ChatTemplateError."""
    template = llm.chat_template
    if template is None:
        raise invalid(
            "this model has no chat template: use /v1/completions, or start the server with --chat-template", "messages"
        )
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    reserved = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "self"}
    if taken := reserved.intersection(kwargs):
        raise invalid(f"chat_template_kwargs must not set {min(taken)!r}", "chat_template_kwargs")
    chat = [message.for_template() for message in messages]
    specs = [tool.for_template() for tool in tools] if tools else None

    def work() -> str:
        return template.render(
            chat,
            tools=specs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=bool(continue_final_message),
            **kwargs,
        )

    size = sum(len(message["content"] or "") + 100 * len(message) for message in chat)
    if size > _LONG_CONVERSATION_CHARS or specs is not None or kwargs:
        return await asyncio.to_thread(work)
    return work()


def _template_kwargs(llm: AsyncLLM, body: ChatRequest) -> dict[str, Any]:
    kwargs = dict(body.chat_template_kwargs or {})
    effort = body.reasoning_effort
    source = "" if llm.chat_template is None else llm.chat_template.source
    if effort is None:
        return kwargs
    if "reasoning_effort" in source:
        kwargs.setdefault("reasoning_effort", effort)
    elif "enable_thinking" in source:
        kwargs.setdefault("enable_thinking", effort != "none")
    elif effort != "none":
        raise invalid("this model's chat template knows no reasoning_effort; leave it out", "reasoning_effort")
    return kwargs


def active_tools(service: Service, body: ChatRequest) -> ToolFormat | None:
    """How calls are written, if the model may make any."""
    return service.tools if body.tools and body.tool_choice != "none" else None


def _params(service: Service, llm: AsyncLLM, body: ChatRequest, forced: NamedTool | str | None) -> SamplingParams:
    grammar = body.grammar()
    if forced is not None:
        grammar = forced_grammar(body.tools or [], forced, body.parallel_tool_calls is not False)
    elif grammar is not None and body.tools and body.tool_choice != "none":
        raise invalid(
            f"{body.grammar_field()} leaves the model no way to call a tool: set tool_choice to none or required, "
            f"or leave out tools or {body.grammar_field()}",
            "tool_choice",
        )
    params = sampling_params(
        body,
        llm.generation_defaults,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        grammar=grammar,
    )
    # Where a marker is a special token, the parser must see it, and takes it away.
    formats = [format for format in (service.reasoning, active_tools(service, body)) if format is not None]
    ids = {llm.tokenizer.token_id(marker) for format in formats for marker in format.markers}
    if not llm.tokenizer.special_token_ids.isdisjoint(ids):
        params.skip_special_tokens = False
    if service.tools is not None and not params.ignore_eos:
        stops = map(llm.tokenizer.token_id, service.tools.stop_tokens)
        params.stop_token_ids = [*params.stop_token_ids, *(token for token in stops if token is not None)]
    return params


async def prepare(llm: AsyncLLM, body: GenerationRequest, params: SamplingParams) -> SamplingParams:
    """Check what takes long without holding up other requests. Raises InvalidRequestError."""
    try:
        return await llm.prepare(params)
    except InvalidRequestError as error:
        if error.param == "response_format":
            error.param = body.grammar_field() if body.grammar() is not None else "tools"
        raise


def submit(
    llm: AsyncLLM,
    request: Request,
    body: GenerationRequest,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    request_id: str,
) -> Generation:
    """Start one prompt's generation, under the tenant's own salt."""
    tenant = request.scope.get(TENANT, "")
    salt = f"{tenant}:{body.cache_salt or ''}" if tenant or body.cache_salt else ""
    return llm.submit(prompt_ids, params, request_id=request_id, priority=body.priority or 0, cache_salt=salt)


async def _whole(chat: _Chat) -> ChatCompletion:
    states = chat.states()
    builders = [MessageBuilder() for _ in states]
    cached = 0
    prompt_entries: list[TokenLogprobs] | None = None
    async for update in chat.updates():
        state = states[update.index]
        builders[update.index].add(state.delta(update), update)
        cached = max(cached, update.cached_tokens or 0)
        prompt_entries = prompt_entries or update.prompt_logprobs
        if update.finish_reason is not None:
            state.note_stop(update, chat.body.stop_token_ids or [])
    choices = [
        builder.choice(index, state, chat.llm.tokenizer, bool(chat.body.logprobs))
        for index, (builder, state) in enumerate(zip(builders, states, strict=True))
    ]
    answer = ChatCompletion(chat.id, int(time.time()), chat.model, choices, chat.usage(states, cached))
    if chat.params.prompt_logprobs is not None:
        answer.prompt_logprobs = prompt_logprobs(chat.llm.tokenizer, prompt_entries or [])
    return answer


async def _stream(chat: _Chat) -> AsyncGenerator[bytes, None]:
    states = chat.states()
    options = chat.body.stream_options
    continuous = options is not None and bool(options.continuous_usage_stats)
    with_logprobs = bool(chat.body.logprobs)
    choice = ChatChunkChoice(0, Delta())  # used again for every chunk, as is the chunk around it
    chunk = ChatChunk(chat.id, int(time.time()), chat.model, [choice])
    nothing = Delta()
    cached = 0
    async for update in chat.updates():
        state = states[update.index]
        delta = state.delta(update)
        cached = max(cached, update.cached_tokens or 0)
        finished = update.finish_reason is not None
        if delta == nothing and not finished and not (with_logprobs and update.logprobs):
            continue  # the text is still being held back
        choice.index, choice.delta = update.index, delta
        choice.logprobs = chat_logprobs(chat.llm.tokenizer, update.logprobs or []) if with_logprobs else None
        if finished:
            state.note_stop(update, chat.body.stop_token_ids or [])
        choice.finish_reason, choice.stop_reason = state.finish_reason, state.stop_reason
        if continuous:
            chunk.usage = chat.usage(states, cached)
        yield event(chunk)
    if options is not None and options.include_usage:
        chunk.choices, chunk.usage = [], chat.usage(states, cached)
        yield event(chunk)
