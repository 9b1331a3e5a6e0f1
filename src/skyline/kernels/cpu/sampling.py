"""Choosing tokens from logits: functions of the runner's sampler, not ops of a model."""

from __future__ import annotations

import torch
from torch import Tensor

from skyline.kernels.cpu.native import library


def choose_tokens(logits: Tensor, numbers: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens int64 [R] and the largest scaled logit of each row, float32 [R].

    logits [R, V] float32 or bfloat16, left as they are. numbers [5, R] float64: temperature, top_k, top_p, min_p and
    the uniform random number of each row; None takes the largest logit of each row. top_k of V or more is off, 1 is
    greedy. Where the largest logit is not finite the token is arbitrary.
    """
    rows = logits.shape[0]
    tokens = torch.empty(rows, dtype=torch.int64)
    tops = torch.empty(rows, dtype=torch.float32)
    choose_into(tokens, tops, logits, numbers)
    return tokens, tops


def choose_into(tokens: Tensor, tops: Tensor, logits: Tensor, numbers: Tensor | None) -> None:
    """`choose_tokens` into memory that is given."""
    library().choose_tokens(tokens, tops, logits, numbers)


def widen(out: Tensor, x: Tensor) -> None:
    """out [R, V] float32 = x [R, V] bfloat16."""
    library().widen(out, x)
