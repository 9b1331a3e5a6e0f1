"""Latent attention of a request with many queries: its latents become keys and values of each head first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skyline.kernels.triton.device import shared_memory
from skyline.kernels.triton.latent_absorbed import LOG2E, Heads, dequantized, parts_of, softmax_step
from skyline.kernels.triton.latent_tactics import Tactic, heads_at_once
from skyline.kernels.triton.sizes import cdiv, next_power_of_2
from skyline.ops import AttentionBatch, LatentCache
from skyline.ops.caches import LATENT_GROUP


def expanded_tactic(head_dim: int, value_dim: int, item: int, shared: int) -> Tactic:
    """Of sizes that are padded."""
    if item == 4:
        return Tactic(16, 16, 4, 1)
    rows, keys = 128 if shared > 128 << 10 else 64, 64 if shared > 192 << 10 else 32
    fits = (shared - rows * head_dim * item) // (keys * (head_dim + value_dim) * item)
    return Tactic(rows, keys, rows // 16, max(1, min(3, fits)))


@triton.jit
def _tile(
    query, turned, position, top, total, mixed, expanded, shared, first, last, context, scale, shared_stride,
    ROW: tl.constexpr, PLAIN: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
    WIDE_PLAIN: tl.constexpr, WIDE_ROPE: tl.constexpr, WIDE_VALUE: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax of the queries at `position` over keys `first` to `last`."""
    plain, turn, column = tl.arange(0, WIDE_PLAIN), tl.arange(0, WIDE_ROPE), tl.arange(0, WIDE_VALUE)
    for begin in tl.range(first, last, KEYS, num_stages=STAGES):
        key = begin + tl.arange(0, KEYS)
        there = key < context  # all of them, unless MASK
        at = expanded + key.to(tl.int64)[:, None] * ROW
        keys = tl.load(at + plain[None, :], mask=(plain < PLAIN)[None, :] & (there[:, None] | (not MASK)), other=0.0)
        other = shared + key.to(tl.int64)[:, None] * shared_stride + turn[None, :]
        other = tl.load(other, mask=(turn < ROPE)[None, :] & (there[:, None] | (not MASK)), other=0.0)
        scores = tl.dot(query, keys.T, input_precision=PRECISION)
        scores = tl.dot(turned, other.T, scores, input_precision=PRECISION) * scale
        if MASK:
            scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
        weights, shrink, top, total = softmax_step(scores, top, total)
        inside = (column < VALUE)[None, :] & (there[:, None] | (not MASK))
        values = tl.load(at + PLAIN + column[None, :], mask=inside, other=0.0)
        mixed = tl.dot(weights.to(query.dtype), values, mixed * shrink[:, None], input_precision=PRECISION)
    return top, total, mixed


@triton.jit(do_not_specialize=["count", "context"])
def _expanded_kernel(
    q,  # [count, heads * (PLAIN + ROPE)]
    expanded,  # [context, heads * (PLAIN + VALUE)], contiguous
    shared,  # [context, ROPE]
    out,  # [count, heads * VALUE]
    count,
    context,
    q_stride,
    shared_stride,
    out_stride,
    scale,  # in base 2
    HEADS: tl.constexpr,
    PLAIN: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    WIDE_PLAIN: tl.constexpr,
    WIDE_ROPE: tl.constexpr,
    WIDE_VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # those with the most keys first
    row = tile * ROWS + tl.arange(0, ROWS)
    real = row < count
    position = context - count + row
    plain, turn, column = tl.arange(0, WIDE_PLAIN), tl.arange(0, WIDE_ROPE), tl.arange(0, WIDE_VALUE)
    at = q + (row.to(tl.int64) * q_stride + head * (PLAIN + ROPE))[:, None]
    query = tl.load(at + plain[None, :], mask=real[:, None] & (plain < PLAIN)[None, :], other=0.0)
    turned = tl.load(at + PLAIN + turn[None, :], mask=real[:, None] & (turn < ROPE)[None, :], other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDE_VALUE), tl.float32)
    expanded += head * (PLAIN + VALUE)
    earliest = context - count + tile * ROWS
    # Up to here, all queries of the tile see every key.
    whole = (earliest + 1) // KEYS * KEYS
    top, total, mixed = _tile(
        query, turned, position, top, total, mixed, expanded, shared, 0, whole, context, scale, shared_stride,
        HEADS * (PLAIN + VALUE), PLAIN, ROPE, VALUE, WIDE_PLAIN, WIDE_ROPE, WIDE_VALUE, KEYS, STAGES, False, PRECISION,
    )  # fmt: skip
    top, total, mixed = _tile(
        query, turned, position, top, total, mixed, expanded, shared, whole, tl.minimum(earliest + ROWS, context),
        context, scale, shared_stride,
        HEADS * (PLAIN + VALUE), PLAIN, ROPE, VALUE, WIDE_PLAIN, WIDE_ROPE, WIDE_VALUE, KEYS, STAGES, True, PRECISION,
    )  # fmt: skip
    result = (mixed / total[:, None]).to(out.dtype.element_ty)
    at = out + (row.to(tl.int64) * out_stride + head * VALUE)[:, None] + column[None, :]
    tl.store(at, result, mask=real[:, None] & (column < VALUE)[None, :])


@triton.jit(do_not_specialize=["context"])
def _widen_kernel(
    data,  # [places, RANK]
    scales,  # [places, ceil(RANK / GROUP)] float32
    keys,  # [places, ROPE]
    table,  # of the request's blocks
    known,  # [context, RANK + ROPE], out
    context,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    WIDE_RANK: tl.constexpr,
    WIDE_ROPE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
):
    """What a request remembers in a quantized cache, as numbers that can be multiplied."""
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    there = key < context
    place = tl.load(table + key // BLOCK, mask=there, other=0).to(tl.int64) * BLOCK + key % BLOCK
    out = (known + key.to(tl.int64) * (RANK + ROPE))[:, None]
    rank, turn = tl.arange(0, WIDE_RANK)[None, :], tl.arange(0, WIDE_ROPE)[None, :]
    mask = there[:, None] & (rank < RANK)
    values = tl.load((data + place * RANK)[:, None] + rank, mask=mask, other=0.0)
    latents = dequantized(values, scales, place, there, KEYS, RANK, WIDE_RANK, GROUP)
    tl.store(out + rank, latents.to(known.dtype.element_ty), mask=mask)
    mask = there[:, None] & (turn < ROPE)
    turned = tl.load((keys + place * ROPE)[:, None] + turn, mask=mask, other=0.0)
    tl.store(out + RANK + turn, turned.to(known.dtype.element_ty), mask=mask)


def _known(cache: LatentCache, table: Tensor, context: int, q: Tensor) -> Tensor:
    """Latents and rotated keys of a request, [context, rank + rope_dim] of q's type; table: its blocks."""
    data, scales, keys = parts_of(cache)
    block_size = data.shape[1]
    if cache.quantized is None:
        blocks = table[: cdiv(context, block_size)]
        return data.index_select(0, blocks).flatten(0, 1)[:context].to(q.dtype)
    known = q.new_empty((context, cache.rank + cache.rope_dim))
    wide_rank = next_power_of_2(cache.rank)
    at_once = max(1, 4096 // wide_rank)
    _widen_kernel[(cdiv(context, at_once),)](
        data,
        scales,
        keys,
        table,
        known,
        context,
        RANK=cache.rank,
        ROPE=cache.rope_dim,
        WIDE_RANK=wide_rank,
        WIDE_ROPE=next_power_of_2(cache.rope_dim),
        GROUP=min(LATENT_GROUP, wide_rank),
        BLOCK=block_size,
        KEYS=at_once,
    )
    return known


def expanded(q: Tensor, out: Tensor, heads: Heads, batch: AttentionBatch, request: int) -> None:
    """Attention of one request, whose tokens are q [T, heads * head_dim], to out [T, heads * value_dim]."""
    w, plain, scale, cache = heads
    tokens, context = q.shape[0], batch.host_context_lens[request]
    known = _known(cache, batch.of(cache).block_tables[request], context, q)
    count, rows, rank = w.shape
    shared = known[:, rank:]
    sizes = (plain, cache.rope_dim, rows - plain)
    wide_plain, wide_rope, wide_value = (max(16, next_power_of_2(size)) for size in sizes)
    tactic = expanded_tactic(wide_plain + wide_rope, wide_value, q.element_size(), shared_memory(q.device))
    at_once = heads_at_once(count, context, rows, q.element_size())
    for first in range(0, count, at_once):
        some = w[first : first + at_once]
        made = known[:, :rank] @ some.flatten(0, 1).T
        _expanded_kernel[(cdiv(tokens, tactic.rows), some.shape[0])](
            q[:, first * (plain + cache.rope_dim) :],
            made,
            shared,
            out[:, first * (rows - plain) :],
            tokens,
            context,
            q.stride(0),
            shared.stride(0),
            out.stride(0),
            scale * LOG2E,
            HEADS=some.shape[0],
            PLAIN=plain,
            ROPE=cache.rope_dim,
            VALUE=rows - plain,
            WIDE_PLAIN=wide_plain,
            WIDE_ROPE=wide_rope,
            WIDE_VALUE=wide_value,
            ROWS=tactic.rows,
            KEYS=tactic.keys,
            STAGES=tactic.stages,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=tactic.warps,
        )
