"""What the runner's sampler does with logits beside choosing: log-probabilities of tokens, and penalties."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skyline.kernels.triton.sizes import cdiv

_TILE = 4096
_BLOCK = 256
_IN_PROMPT = tl.constexpr(1 << 30)  # in a count of generated tokens: the token is in the prompt as well


@triton.jit
def _logprob_kernel(
    own,  # [rows] float32, out
    sums,  # [rows] float32, out
    ranks,  # [rows] int64, out
    logits,  # [rows, vocab]
    tokens,  # [rows]
    stride,
    vocab,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    mine = tl.load(logits + tl.load(tokens + row)).to(tl.float32)
    most = tl.full((TILE,), -float("inf"), tl.float32)
    parts = tl.zeros((TILE,), tl.float32)  # of exp(logit - most), lane by lane
    higher = tl.zeros((TILE,), tl.int32)
    for tile in range(TILES):
        ids = tile * TILE + tl.arange(0, TILE)
        x = tl.load(logits + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
        higher += (x > mine).to(tl.int32)
        top = tl.maximum(most, x)
        base = tl.where(top == -float("inf"), 0.0, top)
        parts = parts * tl.exp(most - base) + tl.exp(x - base)
        most = top
    top = tl.max(most)
    top = tl.where(top == -float("inf"), 0.0, top)
    tl.store(own + row, mine)
    tl.store(sums + row, top + tl.log(tl.sum(parts * tl.exp(most - top))))
    tl.store(ranks + row, tl.sum(higher).to(tl.int64) + 1)


def token_statistics(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's logit of its token [M] float32, logsumexp [M] float32, and the token's rank [M] int64, 1 at the top.

    logits [M, V] of any float dtype, tokens [M] integer.
    """
    rows, vocab = logits.shape
    own = torch.empty(rows, dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(own)
    ranks = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        _logprob_kernel[(rows,)](
            own,
            sums,
            ranks,
            logits,
            tokens,
            logits.stride(0),
            vocab,
            TILE=_TILE,
            TILES=cdiv(vocab, _TILE),
            num_warps=8,
        )
    return own, sums, ranks


@triton.jit
def _tokens_of(token_ids, numbers, stride, rows, BLOCK: tl.constexpr):
    """Places in this program's part of a request's tokens, which of them exist, and the tokens."""
    request = tl.program_id(1)
    slot = tl.load(numbers + rows + request).to(tl.int64)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exist = places < tl.load(numbers + 2 * rows + request).to(tl.int32)
    return places, exist, tl.load(token_ids + slot * stride + places, mask=exist, other=0)


@triton.jit(do_not_specialize=["rows"])
def _count_kernel(counts, token_ids, numbers, stride, rows, vocab, BLOCK: tl.constexpr):
    request = tl.program_id(1)
    places, exist, tokens = _tokens_of(token_ids, numbers, stride, rows, BLOCK)
    generated = places >= tl.load(numbers + 3 * rows + request).to(tl.int32)
    at = counts + request.to(tl.int64) * vocab + tokens
    tl.atomic_add(at, tl.full((BLOCK,), 1, tl.int32), mask=exist & generated)
    tl.atomic_or(at, tl.full((BLOCK,), _IN_PROMPT, tl.int32), mask=exist & ~generated)


@triton.jit(do_not_specialize=["rows"])
def _penalty_kernel(logits, counts, token_ids, numbers, logits_stride, stride, rows, vocab, BLOCK: tl.constexpr):
    request = tl.program_id(1)
    _, exist, tokens = _tokens_of(token_ids, numbers, stride, rows, BLOCK)
    at = counts + request.to(tl.int64) * vocab + tokens
    # Of all places with the same token one gets its count. It applies the penalties, and leaves zero for the next call.
    found = tl.atomic_xchg(at, tl.zeros((BLOCK,), tl.int32), mask=exist)
    mine = exist & (found != 0)
    count = found & (_IN_PROMPT - 1)
    repetition = tl.load(numbers + 4 * rows + request).to(tl.float32)
    frequency = tl.load(numbers + 5 * rows + request).to(tl.float32)
    presence = tl.load(numbers + 6 * rows + request).to(tl.float32)
    target = logits + tl.load(numbers + request).to(tl.int64) * logits_stride + tokens
    x = tl.load(target, mask=mine, other=0.0)
    x = tl.where(x > 0, tl.div_rn(x, repetition + tl.zeros_like(x)), x * repetition)
    x = tl.where(count > 0, x - frequency * count - presence, x)
    tl.store(target, x, mask=mine)


def penalize(logits: Tensor, counts: Tensor, token_ids: Tensor, numbers: Tensor, longest: int) -> None:
    """Apply repetition, frequency and presence penalties to some rows of logits [R, V] float32, in place.

    numbers [7, N] float64 has for each request: its row, its slot, how many tokens it has, how many of them are its
    prompt, and the three penalties. token_ids [slots, length] int32 holds each slot's tokens; longest is the largest
    number of tokens. counts [N or more, V] int32 contiguous must be zero, and is zero again afterwards.
    """
    rows, vocab = numbers.shape[1], logits.shape[1]
    grid = (cdiv(longest, _BLOCK), rows)
    if not grid[0] or not rows:
        return
    stride = token_ids.stride(0)
    _count_kernel[grid](counts, token_ids, numbers, stride, rows, vocab, BLOCK=_BLOCK, num_warps=4)
    _penalty_kernel[grid](
        logits, counts, token_ids, numbers, logits.stride(0), stride, rows, vocab, BLOCK=_BLOCK, num_warps=4
    )
