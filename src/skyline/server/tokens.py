"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import Annotated

from pydantic import Field, model_validator
from starlette.responses import Response

from skyline.server.chat import render
from skyline.server.errors import invalid
from skyline.server.fields import Body, JsonObject, ShortText, Text, TokenId
from skyline.server.messages import ChatMessage, Tool
from skyline.server.protocol import MAX_MESSAGES, MAX_TOOLS
from skyline.server.responses import Detokenized, Tokenized, encoder
from skyline.server.service import Service

_MANY_TOKENS = 20_000  # from here on a thread does the work


class TokenizeRequest(Body):
    """A prompt, or messages that go through the chat template."""

    model: ShortText | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = Field(None, description="true for a prompt, false for messages")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.prompt is not None:
            for name in ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} goes with messages, not with prompt")
        return self


class DetokenizeRequest(Body):
    model: ShortText | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=1_000_000)]


async def tokenize(service: Service, body: TokenizeRequest) -> Response:
    """Raises ApiError and what `as_api_error` knows."""
    llm = service.llm()
    service.check_model(body.model)
    special = body.add_special_tokens
    if body.messages is None:
        tokens = await llm.tokenize(body.prompt or "", add_special_tokens=special is not False)
    else:
        text = await render(
            llm,
            body.messages,
            body.tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            kwargs=body.chat_template_kwargs or {},
        )
        tokens = await llm.tokenize(text, add_special_tokens=bool(special))
    answer = Tokenized(len(tokens), llm.max_model_len, tokens)
    if body.return_token_strs:
        answer.token_strs = [llm.tokenizer.token_text(token) for token in tokens]
    return Response(encoder.encode(answer), media_type="application/json")


async def detokenize(service: Service, body: DetokenizeRequest) -> Response:
    """Raises ApiError for ids outside the vocabulary."""
    llm = service.llm()
    service.check_model(body.model)
    if body.tokens and max(body.tokens) >= llm.vocab_size:
        raise invalid(f"tokens: {max(body.tokens)} is not a token id (0 to {llm.vocab_size - 1})", "tokens")
    if len(body.tokens) > _MANY_TOKENS:
        text = await asyncio.to_thread(llm.tokenizer.decode, body.tokens, False)
    else:
        text = llm.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return Response(encoder.encode(Detokenized(text)), media_type="application/json")
