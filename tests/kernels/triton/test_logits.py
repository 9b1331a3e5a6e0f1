"""Log-probabilities and penalties in Triton against torch."""

from __future__ import annotations

import math

import pytest
import torch

from skyline.kernels.triton.logits import penalize, token_statistics
from tests.kernels.triton.test_ops import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [5, 9001])
def test_token_statistics(vocab: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(6, vocab, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    logits[1] = -math.inf
    logits[1, 3] = 2.0
    logits[2] = -math.inf
    logits[3] = 90.0
    logits[4, 1] = math.nan
    tokens = torch.arange(6) % 5
    own, sums, ranks = (part.cpu() for part in token_statistics(logits.to(DEVICE), tokens.to(DEVICE)))
    wide, expected = logits.float(), logits.float().gather(1, tokens[:, None])
    assert torch.equal(own, expected[:, 0])
    torch.testing.assert_close(sums, wide.logsumexp(-1), equal_nan=True)
    assert torch.equal(ranks, (wide > expected).sum(-1) + 1)


def test_penalties_count_every_token_once_and_leave_the_counts_at_zero() -> None:
    vocab, slots, length = 37, 4, 600
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, vocab, (slots, length), generator=generator, dtype=torch.int32)
    logits = torch.randn(5, vocab, generator=generator)
    logits[:, 4] = -math.inf
    # row, slot, tokens, of them prompt, repetition, frequency, presence
    requests = [(4, 0, 600, 300, 1.3, 0.01, 0.5), (0, 3, 9, 9, 0.5, 1.0, 1.0), (2, 1, 20, 3, 1.0, -0.7, 0.0)]
    expected = logits.clone()
    for row, slot, count, prompt, repetition, frequency, presence in requests:
        tokens = token_ids[slot, :count].tolist()
        for token in set(tokens):
            x, times = float(logits[row, token]), tokens[prompt:].count(token)
            x = x / repetition if x > 0 else x * repetition
            expected[row, token] = x - (frequency * times + presence if times else 0.0)
    counts = torch.zeros((4, vocab), dtype=torch.int32, device=DEVICE)
    found, numbers = logits.to(DEVICE), torch.tensor(requests, dtype=torch.float64).T.contiguous().to(DEVICE)
    penalize(found, counts, token_ids.to(DEVICE), numbers, 600)
    torch.testing.assert_close(found.cpu(), expected)
    assert not counts.any()
