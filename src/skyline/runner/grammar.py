"""Structured output: which tokens a grammar allows next, by llguidance (https://github.com/guidance-ai/llguidance).

What bounds the work: `skyline.engine.grammar_check` refuses shapes known to explode, llguidance's limits bound the rest
of the parsing per step, and a compilation that still takes longer than COMPILE_SECONDS fails its request. llguidance
cannot be interrupted, so such a compilation goes on in a thread of its own until it ends; while MAX_OVERDUE of them
run, grammars that are not cached are refused.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from skyline.engine.grammar_check import GrammarError, brief, parser_limits, to_llguidance
from skyline.engine.sampling_params import GrammarSpec

COMPILE_SECONDS = 5.0
TOKENIZER_SECONDS = 120.0
MAX_OVERDUE = 2
CACHED_GRAMMARS = 32

_T = TypeVar("_T")


def bitmask_width(vocab_size: int) -> int:
    """int32 words that hold one bit a token."""
    return (vocab_size + 31) // 32


def apply_bitmask(logits: Tensor, bitmask: Tensor) -> Tensor:
    """Logits [R, V] with minus infinity where the token's bit is 0; bitmask int32 [R, ceil(V/32)], same device.

    Token t is bit t % 32 of word t // 32: on little-endian machines, where torch runs, bit t % 8 of byte t // 8.
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)  # made there: a copy from the host would wait
    bits = torch.ones_like(shifts).bitwise_left_shift_(shifts)
    forbidden = (bitmask.view(torch.uint8).unsqueeze(-1) & bits) == 0
    return logits.masked_fill(forbidden.flatten(1)[:, : logits.shape[1]], float("-inf"))


class Matcher:
    """Follows one request's tokens through its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._width = bitmask_width(vocab_size)
        self._eos = frozenset(eos_token_ids)
        self._eos_mask = torch.zeros(self._width * 32, dtype=torch.bool)
        self._eos_mask[list(eos_token_ids)] = True
        self._ended = False

    @property
    def finished(self) -> bool:
        """Whether nothing but an end-of-sequence token may follow."""
        return self._ended or bool(self._matcher.is_stopped())

    @property
    def accepting(self) -> bool:
        """Whether the text so far is complete, so that an end-of-sequence token is allowed."""
        return self._ended or bool(self._matcher.is_accepting())

    def fill_mask(self, bitmask_row: Tensor) -> None:
        """Write the allowed next tokens into int32 [ceil(V/32)], contiguous, on the CPU. Raises GrammarError."""
        if (
            bitmask_row.shape != (self._width,)
            or bitmask_row.dtype != torch.int32
            or not bitmask_row.is_cpu
            or not bitmask_row.is_contiguous()
        ):
            raise ValueError(f"the bitmask must be contiguous int32 [{self._width}] on the CPU")
        self._check()
        if self.finished:
            self._fill_eos(bitmask_row)
            return
        # It writes ceil(V/32) words, and no bits beyond the vocabulary.
        self._matcher.unsafe_compute_mask_ptr(bitmask_row.data_ptr(), self._width * 4)
        self._check()

    def accept(self, token: int) -> None:
        """Take in a token that was chosen; any token after the end but EOS, or one the grammar forbids: GrammarError.

        An end-of-sequence token always ends the text: where the mask did not allow it, the sampler had no other token.
        """
        self._check()
        if token in self._eos:
            self._ended = True
        elif self._ended or not self._matcher.consume_token(token):
            self._check()
            raise GrammarError(f"token {token} does not fit the grammar")

    def _fill_eos(self, bitmask_row: Tensor) -> None:
        weights = 1 << torch.arange(32, dtype=torch.int64)
        words = (self._eos_mask.view(-1, 32) * weights).sum(-1)
        bitmask_row.copy_(torch.where(words >= 1 << 31, words - (1 << 32), words))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {brief(self._matcher.get_error())}")


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and remembers the last few. Thread-safe."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """tokenizer_json is the text of tokenizer.json; vocab_size the width of the logits. Nothing is built yet."""
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos = [token for token in eos_token_ids if 0 <= token < vocab_size]
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[GrammarSpec, Any] = OrderedDict()
        self._overdue: list[threading.Thread] = []

    def prepare(self) -> None:
        """Build what the first grammar would wait for (under a second at 150,000 tokens). Raises GrammarError."""
        with self._lock:
            self._ll_tokenizer()

    def compile(self, spec: GrammarSpec) -> Matcher:
        """A matcher at the start of the grammar. Raises GrammarError if it is invalid, too large or too slow."""
        with self._lock:
            found = self._compiled.get(spec)
            if found is None:
                tokenizer, grammar = self._ll_tokenizer(), to_llguidance(spec)
                found = self._bounded(
                    lambda: LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits()), COMPILE_SECONDS
                )
                if found.is_error():
                    raise GrammarError(f"the grammar cannot be compiled: {brief(found.get_error())}")
                self._compiled[spec] = found
                if len(self._compiled) > CACHED_GRAMMARS:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(spec)
            return Matcher(found.deep_copy(), self._vocab_size, self._eos)

    def _ll_tokenizer(self) -> LLTokenizer:
        if self._tokenizer is None:
            if not self._eos:
                raise GrammarError("structured output is not available: the model has no end-of-sequence token")
            self._tokenizer = self._bounded(
                lambda: LLTokenizer(self._tokenizer_json, n_vocab=self._vocab_size, eos_token=self._eos),
                TOKENIZER_SECONDS,
            )
        return self._tokenizer

    def _bounded(self, work: Callable[[], _T], seconds: float) -> _T:
        self._overdue = [thread for thread in self._overdue if thread.is_alive()]
        if len(self._overdue) >= MAX_OVERDUE:
            raise GrammarError("other grammars are taking too long to compile; try again later")
        results: list[_T] = []
        failures: list[str] = []

        def run() -> None:
            # A panic in Rust arrives as a BaseException.
            try:
                results.append(work())
            except BaseException as error:
                failures.append(str(error) or type(error).__name__)

        thread = threading.Thread(target=run, name="grammar", daemon=True)
        thread.start()
        thread.join(seconds)
        if results:
            return results[0]
        if failures:
            raise GrammarError(f"structured output is not available: {brief(failures[0])}")
        self._overdue.append(thread)
        raise GrammarError(f"the grammar takes longer than {seconds:g} s to compile; simplify it")
