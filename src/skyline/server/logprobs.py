"""Log-probabilities in the shapes of the three places of the API that show them."""

from __future__ import annotations

from collections.abc import Sequence

from skyline.checkpoint import Tokenizer
from skyline.engine.messages import TokenLogprobs
from skyline.frontend.token_text import token_text
from skyline.server.responses import (
    ChatLogprob,
    ChatLogprobs,
    LegacyLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)

LOWEST = -9999.0  # JSON has no minus infinity


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """`logprobs` of a chat choice."""
    content = []
    for entry in entries:
        top = [_top(tokenizer, token, value) for token, value in zip(entry.ids[1:], entry.logprobs[1:], strict=True)]
        chosen = _top(tokenizer, entry.ids[0], entry.logprobs[0])
        content.append(ChatLogprob(chosen.token, chosen.logprob, chosen.bytes, top))
    return ChatLogprobs(content)


def _top(tokenizer: Tokenizer, token: int, value: float) -> TopLogprob:
    raw = tokenizer.token_bytes(token)
    return TopLogprob(raw.decode("utf-8", "replace"), max(value, LOWEST), list(raw))


def prompt_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> PromptLogprobs:
    """vLLM's `prompt_logprobs`: a dictionary by token id for each position; None for the first one."""
    result: PromptLogprobs = [None]
    for entry in entries:
        position: dict[str, PromptLogprob] = {}
        ranks = [entry.rank, *range(1, len(entry.ids))]
        for token, value, rank in zip(entry.ids, entry.logprobs, ranks, strict=True):
            position.setdefault(str(token), PromptLogprob(max(value, LOWEST), rank, tokenizer.token_text(token)))
        result.append(position)
    return result


class LegacyWriter:
    """`logprobs` of a plain completion, piece by piece. Offsets count characters of the choice's text."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._text = token_text(tokenizer.backend, prompt, skip_special_tokens)

    def write(self, ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> LegacyLogprobs:
        """The part for these tokens. An entry is None where nothing precedes the token."""
        begin = len(self._text.offsets)
        for token in ids:
            self._text.push(token)
        part = LegacyLogprobs([self._tokenizer.token_text(token) for token in ids], [], [], self._text.offsets[begin:])
        for entry in entries:
            if entry is None:
                part.token_logprobs.append(None)
                part.top_logprobs.append(None)
                continue
            part.token_logprobs.append(max(entry.logprobs[0], LOWEST))
            top: dict[str, float] = {}
            # The chosen token comes last, so that the dictionary is in the order of likelihood.
            chosen, *likely = zip(entry.ids, entry.logprobs, strict=True)
            for token, value in (*likely, chosen):
                top.setdefault(self._tokenizer.token_text(token), max(value, LOWEST))
            part.top_logprobs.append(top)
        return part


def join(parts: Sequence[LegacyLogprobs]) -> LegacyLogprobs:
    whole = LegacyLogprobs([], [], [], [])
    for part in parts:
        whole.tokens += part.tokens
        whole.token_logprobs += part.token_logprobs
        whole.top_logprobs += part.top_logprobs
        whole.text_offset += part.text_offset
    return whole
