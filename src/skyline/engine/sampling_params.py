"""What a client may ask of sampling, checked in one place.

The field names are those of the OpenAI API and of vLLM's extensions to it. One struct travels the whole way:
HTTP or Python API, engine process, runner. Nothing here depends on a model except through the arguments of `validate`.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_TOKEN_LIST = 4096
MAX_BAD_WORDS = 256
MAX_N = 128
MAX_GRAMMAR_CHARS = 100_000
SEED_RANGE = 2**63

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]


class GrammarSpec(msgspec.Struct, frozen=True):
    """A constraint on the generated text.

    `text` is a JSON schema for "json_schema", a regular expression for "regex", a JSON list of strings for "choice",
    a Lark grammar for "lark", and empty for "json_object".
    """

    kind: GrammarKind
    text: str = ""


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How to choose the next token of one request.

    temperature 0 is greedy. top_k 0 (or -1), top_p 1 and min_p 0 switch those filters off. max_tokens None means: until
    the context is full. A seed makes the request reproducible whatever else is in the batch.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    # Token sequences that `bad_words` stand for; the front end fills it in, since only it has the tokenizer.
    bad_words_token_ids: list[list[int]] = []
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: GrammarSpec | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    def validate(self, vocab_size: int) -> None:
        """Raise ValueError, naming the field and the allowed range, if anything is out of bounds."""
        _integer("n", self.n, 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, exclusive_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)  # smaller ones overflow
        if self.seed is not None:
            _integer("seed", self.seed, -SEED_RANGE, SEED_RANGE - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        _length("stop", self.stop, MAX_STOP_STRINGS)
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
                raise ValueError(f"stop: each string must have 1 to {MAX_STOP_STRING_CHARS} characters")
        _token_ids("stop_token_ids", self.stop_token_ids, vocab_size)
        _length("logit_bias", self.logit_bias, MAX_TOKEN_LIST)
        _token_ids("logit_bias", self.logit_bias, vocab_size)
        for token, bias in self.logit_bias.items():
            _number(f"logit_bias[{token}]", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids must not be empty; leave it out to allow every token")
            _token_ids("allowed_token_ids", self.allowed_token_ids, vocab_size, limit=vocab_size)
        _length("bad_words", self.bad_words, MAX_BAD_WORDS)
        for word in self.bad_words:
            if not 1 <= len(word) <= MAX_STOP_STRING_CHARS:
                raise ValueError(f"bad_words: each entry must have 1 to {MAX_STOP_STRING_CHARS} characters")
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.grammar is not None and len(self.grammar.text) > MAX_GRAMMAR_CHARS:
            raise ValueError(
                f"the {self.grammar.kind} grammar has {len(self.grammar.text)} characters; at most {MAX_GRAMMAR_CHARS}"
            )


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, not {value!r}")


def _number(name: str, value: object, low: float, high: float, exclusive_low: bool = False) -> None:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or not low <= value <= high or (exclusive_low and value == low):  # type: ignore[operator]
        raise ValueError(f"{name} must be {'above' if exclusive_low else 'from'} {low} up to {high}, not {value!r}")


def _length(name: str, values: list[str] | dict[int, float], limit: int) -> None:
    if len(values) > limit:
        raise ValueError(f"{name} has {len(values)} entries; at most {limit} are allowed")


def _token_ids(name: str, ids: list[int] | dict[int, float], vocab_size: int, limit: int = MAX_TOKEN_LIST) -> None:
    if len(ids) > limit:
        raise ValueError(f"{name} has {len(ids)} entries; at most {limit} are allowed")
    for token in ids:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ValueError(f"{name}: {token!r} is not a token id of this model (0 to {vocab_size - 1})")
