"""Choosing tokens in Triton: against the definition in torch, over chunks, candidates, whole rows and ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from skyline.kernels.triton import sampling
from tests.kernels.triton.test_ops import DEVICE
from tests.runner.test_native_sampling import MIX, acceptable, in_torch, make_logits, make_numbers


def chosen(logits: Tensor, numbers: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> tuple[list[int], Tensor]:
    tokens, tops = sampling.choose_tokens(logits.to(DEVICE), torch.from_numpy(numbers).to(DEVICE))
    return tokens.tolist(), tops.cpu()


def numbers_of(
    vocab: int, *rows: tuple[float, int, float, float, float]
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """temperature, top_k (0: off), top_p, min_p, u of each row."""
    return np.array([[t, k if 0 < k < vocab else vocab, p, m, u] for t, k, p, m, u in rows]).T.copy()


@pytest.mark.parametrize(("vocab", "dtype"), [(1, torch.float32), (2049, torch.float16), (9001, torch.bfloat16)])
def test_greedy_is_the_first_of_the_largest(vocab: int, dtype: torch.dtype) -> None:
    logits = make_logits(9, vocab).to(dtype)
    logits[7], logits[8] = -math.inf, -0.0
    logits[8, vocab // 2 :] = 0.0
    wide = torch.full((9, vocab + 3), math.inf, dtype=dtype)
    wide[:, :vocab] = logits
    tokens, tops = sampling.greedy(wide.to(DEVICE)[:, :vocab])
    assert tokens.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]
    assert torch.equal(tops.cpu(), logits.amax(-1).float())


@pytest.mark.parametrize(("bad", "place"), [(math.nan, 0), (-math.nan, 2500), (math.inf, 2047)])
def test_a_row_that_is_not_finite_reports_it_alone(bad: float, place: int) -> None:
    vocab = 2501
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(1))
    numbers = numbers_of(vocab, (1, 1, 1, 0, 0), (1, 0, 1, 0, 0.3), (1, 0, 0.5, 0, 0.3), (1, 9, 1, 0, 0.3))
    clean, _ = chosen(logits, numbers)
    for row in range(4):
        broken = logits.clone()
        broken[row, place] = bad
        for tokens, tops in (chosen(broken, numbers), sampling.greedy(broken.to(DEVICE))):
            assert [math.isfinite(top) for top in tops.tolist()] == [r != row for r in range(4)]
            assert all(0 <= int(token) < vocab for token in tokens)
        tokens, _ = chosen(broken, numbers)
        assert [t for r, t in enumerate(tokens) if r != row] == [t for r, t in enumerate(clean) if r != row]
    _, tops = chosen(torch.full_like(logits, -math.inf), numbers)
    assert tops.tolist() == [-math.inf] * 4


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(1, torch.float32), (2, torch.float32), (65, torch.float32), (4097, torch.bfloat16)]
)
def test_draws_equal_torch(vocab: int, dtype: torch.dtype) -> None:
    count = len(MIX)
    logits, numbers = make_logits(count, vocab).to(dtype), make_numbers(count, vocab)
    tokens, tops = chosen(logits, numbers)
    differ = 0
    for row, token in enumerate(tokens):
        expected, top = in_torch(logits[row], numbers[:, row])
        assert float(tops[row]) == top
        differ += token != expected
        assert acceptable(logits[row].float(), numbers[:, row], token), (row, numbers[:, row])
    assert differ <= 1  # exp differs in its last bit


@pytest.mark.parametrize("held", [True, False], ids=["candidates", "whole row"])
@pytest.mark.parametrize("parameters", [(0, 1.0), (7, 1.0), (0, 0.4), (900, 0.6), (0, 1e-9), (2900, 0.9)])
def test_equal_weights_give_equal_tokens(parameters: tuple[int, float], held: bool) -> None:
    """Every weight is 1, so the two agree to the bit, also at the ends of u and in the order among equals."""
    vocab, (top_k, top_p) = 6000, parameters
    logits = torch.full((4, vocab), -math.inf)
    logits[:, 3 :: 3 if held else 2] = 7.0  # 1999 or 2999 tokens
    us = (0.0, 0.3, 0.77, 1 - 2.0**-53)
    numbers = numbers_of(vocab, *((1.3, top_k, top_p, 0.0, u) for u in us))
    tokens, _ = chosen(logits, numbers)
    assert tokens == [in_torch(logits[row], numbers[:, row])[0] for row in range(4)]


def test_filters_that_leave_the_top_alone() -> None:
    vocab = 3000
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(2))
    logits[3], logits[4] = 2.0, 2.0
    numbers = numbers_of(
        vocab,
        (0.9, 0, 1.0, 1.0, 0.99),  # min_p 1
        (0.9, 0, 1e-12, 0.0, 0.99),
        (0.9, 2, 1e-12, 0.0, 0.99),
        (0.9, 1, 1.0, 0.0, 0.99),
        (0.9, 0, 1.0 / vocab / 2, 0.0, 0.99),
    )
    assert chosen(logits, numbers)[0] == [*logits[:3].argmax(-1).tolist(), 0, 0]


def test_rows_depend_on_neither_batch_nor_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, count = 5000, len(MIX)
    logits, numbers = make_logits(count, vocab, seed=3), make_numbers(count, vocab, shift=4)
    tokens, tops = chosen(logits, numbers)
    monkeypatch.setattr(sampling, "_chunk", lambda rows, vocab, device: 8192)
    again, tops_again = chosen(logits.flip(0), numbers[:, ::-1].copy())
    assert again[::-1] == tokens and torch.equal(tops_again.flip(0), tops)


def test_no_rows() -> None:
    for tokens, tops in (
        sampling.greedy(torch.empty(0, 9)),
        sampling.choose_tokens(torch.empty(0, 9), torch.ones(5, 0)),
    ):
        assert tokens.shape == (0,) and tops.shape == (0,)
