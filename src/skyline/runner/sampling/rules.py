"""Rules that change one request's logits before a token is chosen: masks first, then penalties and biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skyline.engine.sampling_params import SamplingParams
from skyline.ops.batch import to_device

_NEVER = float("-inf")


@dataclass(slots=True)
class BadSequences:
    """Token sequences of two or more tokens, none of which may be completed.

    prefixes [W, L] holds each sequence but its last token, aligned right; lengths [W] how many tokens of it count;
    lasts [W] the token that would complete it. All int64.
    """

    prefixes: Tensor
    lengths: Tensor
    lasts: Tensor

    @staticmethod
    def of(words: Sequence[Sequence[int]], device: torch.device) -> BadSequences:
        width = max(len(word) for word in words) - 1
        padded = [[-1] * (width - len(word) + 1) + list(word[:-1]) for word in words]
        lengths, lasts = [len(word) - 1 for word in words], [word[-1] for word in words]
        return BadSequences(*(to_device(np.array(part, np.int64), device) for part in (padded, lengths, lasts)))

    def apply(self, logits: Tensor, generated: Tensor) -> None:
        width = min(self.prefixes.shape[1], generated.shape[0])
        if width == 0:
            return
        prefixes = self.prefixes[:, -width:]
        agrees = (prefixes == generated[-width:]) | (prefixes == -1)
        completes = agrees.all(dim=1) & (self.lengths <= width)
        # Adding rather than storing: two sequences may end in the same token, and one of them may not match.
        logits.index_add_(0, self.lasts, torch.where(completes, _NEVER, 0.0).to(logits.dtype))


@dataclass(slots=True)
class Rules:
    """One request's rules as tensors on the device. A None or a neutral number means: off.

    Bad words are matched against generated tokens only (as in vLLM): a prompt may end in half of one. min_tokens masks
    stop_token_ids, and the end-of-sequence tokens unless ignore_eos makes them ordinary tokens.
    """

    allowed: Tensor | None
    banned: Tensor | None
    bad_sequences: BadSequences | None
    min_tokens: int
    stop_ids: Tensor | None
    repetition: float
    frequency: float
    presence: float
    bias_ids: Tensor | None
    bias: Tensor | None

    @staticmethod
    def of(params: SamplingParams, eos: Sequence[int], vocab_size: int, device: torch.device) -> Rules | None:
        """None if the request has no rules. Token ids outside the vocabulary, which can not be chosen, are left out."""

        def ids(values: Sequence[int]) -> Tensor | None:
            valid = sorted({value for value in values if 0 <= value < vocab_size})
            return to_device(np.array(valid, np.int64), device) if valid else None

        words = [word for word in params.bad_words_token_ids if word and all(0 <= token < vocab_size for token in word)]
        longer = [word for word in words if len(word) > 1]
        stops = [*params.stop_token_ids, *([] if params.ignore_eos else eos)] if params.min_tokens > 0 else []
        bias = {token: value for token, value in params.logit_bias.items() if 0 <= token < vocab_size and value != 0}
        allowed = None
        if params.allowed_token_ids is not None:
            valid = ids(params.allowed_token_ids)
            allowed = torch.empty(0, dtype=torch.int64, device=device) if valid is None else valid
        rules = Rules(
            allowed=allowed,
            banned=ids([word[0] for word in words if len(word) == 1]),
            bad_sequences=BadSequences.of(longer, device) if longer else None,
            min_tokens=params.min_tokens,
            stop_ids=ids(stops),
            repetition=params.repetition_penalty,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
            bias_ids=to_device(np.array(list(bias), np.int64), device) if bias else None,
            bias=to_device(np.array(list(bias.values()), np.float32), device) if bias else None,
        )
        return rules if rules._masks() or rules._adjusts() else None

    def _masks(self) -> bool:
        parts = (self.allowed, self.banned, self.bad_sequences, self.stop_ids)
        return any(part is not None for part in parts)

    @property
    def penalizes(self) -> bool:
        return self.repetition != 1.0 or self.frequency != 0.0 or self.presence != 0.0

    def _adjusts(self) -> bool:
        return self.penalizes or self.bias_ids is not None

    def mask(self, logits: Tensor, generated: Tensor) -> None:
        """Set tokens that must not come next to minus infinity. logits [V] float32; generated [G], this request's."""
        if self.allowed is not None:
            kept = logits[self.allowed]
            logits.fill_(_NEVER)
            logits[self.allowed] = kept
        if self.banned is not None:
            logits.index_fill_(0, self.banned, _NEVER)
        if self.bad_sequences is not None:
            self.bad_sequences.apply(logits, generated)
        if self.stop_ids is not None and generated.shape[0] < self.min_tokens:
            logits.index_fill_(0, self.stop_ids, _NEVER)

    def adjust(self, logits: Tensor, tokens: Tensor, num_prompt: int) -> None:
        """Penalties and biases. logits [V] float32; tokens [T] integer, prompt and generated."""
        self.penalize(logits, tokens, num_prompt)
        self.add_bias(logits)

    def penalize(self, logits: Tensor, tokens: Tensor, num_prompt: int) -> None:
        """As skyline.kernels.triton.logits.penalize, in torch.

        Repetition (Keskar et al. 2019, CTRL) counts prompt and output, frequency and presence (OpenAI) output only.
        """
        if self.repetition != 1.0:
            seen = tokens.to(torch.int64)
            values = logits[seen]
            logits[seen] = torch.where(values > 0, values / self.repetition, values * self.repetition)
        if self.frequency != 0.0 or self.presence != 0.0:
            generated = tokens[num_prompt:].to(torch.int64)
            counts = torch.zeros_like(logits).index_add_(0, generated, torch.ones_like(generated, dtype=logits.dtype))
            # A token that occurs twice is written twice with the same value.
            logits[generated] = logits[generated] - self.frequency * counts[generated] - self.presence

    def add_bias(self, logits: Tensor) -> None:
        """logits [V] float32."""
        if self.bias_ids is not None:
            assert self.bias is not None
            logits.index_add_(0, self.bias_ids, self.bias)
