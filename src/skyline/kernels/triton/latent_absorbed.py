"""Latent attention over the latents themselves: a step of one or a few queries a request, or of chosen positions.

A query is multiplied by W_k, so that its keys are the latents, and the weighted sum of latents by W_v: a tile of them
is read once for all heads of a program, as keys and as values. The context, or each query's list of positions, is cut
into splits that a second launch merges in their order. The softmax is online (arXiv:2205.14135), in base 2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.device import capability, multiprocessors, overlaps, shared_memory
from skyline.kernels.triton.latent_tactics import LEAST_KEYS, absorbed_tactic, num_splits
from skyline.kernels.triton.sizes import cdiv, next_power_of_2
from skyline.ops import AttentionBatch, LatentCache
from skyline.ops.caches import LATENT_GROUP

LOG2E = math.log2(math.e)


@triton.jit
def softmax_step(scores, top, total):
    """Scores [rows, keys] in base 2 become weights; what was summed up before is to be multiplied by `shrink`."""
    higher = tl.maximum(top, tl.max(scores, 1))
    # Of a row that has seen nothing yet: any number will do but minus infinity.
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(top - safe)
    weights = tl.exp2(scores - safe[:, None])
    return weights, shrink, higher, total * shrink + tl.sum(weights, 1)


@triton.jit
def request_of(token, query_starts, requests, WIDE: tl.constexpr):
    """Whose token it is, counted as query_starts [requests + 1] does. WIDE: requests, or the next power of two."""
    index = tl.arange(0, WIDE)
    ends = tl.load(query_starts + 1 + index, mask=index < requests, other=0x7FFFFFFF)
    return tl.sum((ends <= token).to(tl.int32))


@triton.jit
def dequantized(values, scales, place, there, KEYS: tl.constexpr, RANK: tl.constexpr, WIDE_RANK: tl.constexpr,
                GROUP: tl.constexpr):  # fmt: skip
    """values [KEYS, WIDE_RANK] of a quantized cache times the scales of their places, float32."""
    GROUPS: tl.constexpr = (RANK + GROUP - 1) // GROUP
    WIDE: tl.constexpr = WIDE_RANK // GROUP
    group = tl.arange(0, WIDE)[None, :]
    scale = tl.load(scales + place[:, None] * GROUPS + group, mask=there[:, None] & (group < GROUPS), other=0.0)
    wide = tl.reshape(values.to(tl.float32), (KEYS, WIDE, GROUP)) * scale[:, :, None]
    return tl.reshape(wide, (KEYS, WIDE_RANK))


@triton.jit(do_not_specialize=["first_token", "tokens", "requests", "tiles"])
def _absorbed_kernel(
    q_latent,  # [HEADS, T, RANK]: queries times W_k
    q,  # [T, HEADS * (PLAIN + ROPE)]
    data,  # [places, RANK + ROPE], or [places, RANK] if QUANTIZED
    scales,  # [places, ceil(RANK / GROUP)] float32, if QUANTIZED
    keys,  # [places, ROPE], if QUANTIZED
    tables,  # [R, longest]
    query_starts,
    context_lens,
    chosen,  # [T, listed], or unused
    mixed,  # [T * HEADS, RANK], out where SPLITS is 1
    parts,  # [T * HEADS, SPLITS, RANK] float32, out
    sums,  # [T * HEADS, SPLITS, 2] float32, out: the largest score, and the sum over it
    first_token,  # the number in query_starts of the first of these T
    tokens,
    requests,
    tiles,
    q_stride,
    table_stride,
    chosen_stride,
    listed,
    scale,  # in base 2
    HEADS: tl.constexpr,
    PLAIN: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    WIDE_RANK: tl.constexpr,
    WIDE_ROPE: tl.constexpr,
    WIDE_REQUESTS: tl.constexpr,
    BLOCK: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    CHOSEN: tl.constexpr,
    QUANTIZED: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program takes a tile of a request's queries and their heads, or with CHOSEN some heads of one query."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    unit, tile, split = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    request = request_of(unit + first_token, query_starts, requests, WIDE_REQUESTS) if CHOSEN else unit
    start = tl.load(query_starts + request) - first_token
    count = tl.load(query_starts + request + 1) - first_token - start
    context = tl.load(context_lens + request)
    earliest = context - count  # position of the first query
    if CHOSEN:
        earliest += unit - start
        start, count = unit, 1
    if tile * ROWS >= count * HEADS:
        return
    row = tile * ROWS + tl.arange(0, ROWS)
    index, head = row // HEADS, row % HEADS
    real = index < count
    token = (start + index).to(tl.int64)
    rank, turn = tl.arange(0, WIDE_RANK), tl.arange(0, WIDE_ROPE)
    in_rank, in_turn = rank < RANK, turn < ROPE
    at = (head * tokens + token) * RANK
    q_plain = tl.load(q_latent + at[:, None] + rank[None, :], mask=real[:, None] & in_rank[None, :], other=0.0)
    at = token * q_stride + head * (PLAIN + ROPE) + PLAIN
    q_turned = tl.load(q + at[:, None] + turn[None, :], mask=real[:, None] & in_turn[None, :], other=0.0)

    # Not more keys than the tile's last query sees.
    limit = listed if CHOSEN else tl.minimum(earliest + (tile * ROWS + ROWS - 1) // HEADS + 1, context)
    share = tl.cdiv(tl.maximum(tl.cdiv(limit, SPLITS), LEAST), KEYS) * KEYS
    first = split * share
    last = tl.minimum(first + share, limit)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, WIDE_RANK), tl.float32)
    table = tables + request.to(tl.int64) * table_stride
    for begin in tl.range(first, last, KEYS, num_stages=STAGES):
        key = begin + tl.arange(0, KEYS)
        there = key < last
        if CHOSEN:
            key = tl.load(chosen + unit.to(tl.int64) * chosen_stride + key, mask=there, other=-1)
            there = (key >= 0) & (key <= earliest)
            key = tl.where(there, key, 0)
        block = tl.load(table + key // BLOCK, mask=there, other=0).to(tl.int64)
        place = block * BLOCK + key % BLOCK
        if QUANTIZED:
            latent_at, turned_at = data + place * RANK, keys + place * ROPE
        else:
            latent_at = data + place * (RANK + ROPE)
            turned_at = latent_at + RANK
        latents = tl.load(latent_at[:, None] + rank[None, :], mask=there[:, None] & in_rank[None, :], other=0.0)
        if QUANTIZED:
            latents = dequantized(latents, scales, place, there, KEYS, RANK, WIDE_RANK, GROUP)
        latents = latents.to(q.dtype.element_ty)
        turned = tl.load(turned_at[:, None] + turn[None, :], mask=there[:, None] & in_turn[None, :], other=0.0)
        scores = tl.dot(q_plain, latents.T, input_precision=PRECISION)
        scores = tl.dot(q_turned, turned.to(q.dtype.element_ty).T, scores, input_precision=PRECISION)
        seen = there[None, :]
        if not CHOSEN:
            seen = seen & (key[None, :] <= (earliest + index)[:, None])
        scores = tl.where(seen, scores * scale, float("-inf"))
        weights, shrink, top, total = softmax_step(scores, top, total)
        summed = tl.dot(weights.to(q.dtype.element_ty), latents, summed * shrink[:, None], input_precision=PRECISION)

    out = token * HEADS + head
    mask = real[:, None] & in_rank[None, :]
    if SPLITS == 1:
        result = summed / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(mixed + out[:, None] * RANK + rank[None, :], result.to(mixed.dtype.element_ty), mask=mask)
    else:
        out = out * SPLITS + split
        tl.store(sums + out * 2, top, mask=real)
        tl.store(sums + out * 2 + 1, total, mask=real)
        tl.store(parts + out[:, None] * RANK + rank[None, :], summed, mask=mask & (first < last))


@triton.jit
def _merge_kernel(
    mixed,  # [rows, RANK], out
    parts,  # [rows, SPLITS, RANK] float32; not written where the sum is 0
    sums,  # [rows, SPLITS, 2] float32
    RANK: tl.constexpr,
    WIDE_RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE_SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * SPLITS
    rank = tl.arange(0, WIDE_RANK)
    every = tl.arange(0, WIDE_SPLITS)
    tops = tl.load(sums + (row + every) * 2, mask=every < SPLITS, other=float("-inf"))
    totals = tl.load(sums + (row + every) * 2 + 1, mask=every < SPLITS, other=0.0)
    top = tl.maximum(tl.max(tops), -1e38)  # a number, also of a row that has seen nothing
    total = tl.sum(totals * tl.exp2(tops - top))
    merged = tl.zeros((WIDE_RANK,), tl.float32)
    for begin in range(0, SPLITS, AT_ONCE):
        split = begin + tl.arange(0, AT_ONCE)
        shrink = tl.exp2(tl.load(sums + (row + split) * 2, mask=split < SPLITS, other=float("-inf")) - top)
        written = tl.load(sums + (row + split) * 2 + 1, mask=split < SPLITS, other=0.0) > 0.0
        mask = written[:, None] & (rank < RANK)[None, :]
        part = tl.load(parts + (row + split)[:, None] * RANK + rank[None, :], mask=mask, other=0.0)
        merged += tl.sum(part * shrink[:, None], 0)
    result = merged / tl.where(total > 0.0, total, 1.0)
    tl.store(mixed + tl.program_id(0).to(tl.int64) * RANK + rank, result.to(mixed.dtype.element_ty), mask=rank < RANK)


class Heads(NamedTuple):
    """What is the same for all parts of a batch. w: kv_b as [heads, plain + value_dim, rank]."""

    w: Tensor
    plain: int
    scale: float
    cache: LatentCache


def parts_of(cache: LatentCache) -> tuple[Tensor, Tensor, Tensor]:
    """data, scales and keys; where the cache is not quantized, the latter two stand for nothing."""
    data, *others = cache.tensors
    scales, keys = others or (data, data)
    return data, scales, keys


def absorbed(
    q: Tensor, out: Tensor, heads: Heads, batch: AttentionBatch, requests: slice, first_token: int, longest: int,
    chosen: Tensor | None,
) -> None:  # fmt: skip
    """Attention of some requests, whose tokens are q [T, heads * head_dim], to out [T, heads * value_dim]."""
    w, plain, scale, cache = heads
    data, scales, keys = parts_of(cache)
    tokens, count, rank = q.shape[0], w.shape[0], cache.rank
    turned = q.view(tokens, count, -1)
    q_latent = torch.bmm(turned[..., :plain].transpose(0, 1), w[:, :plain])
    tables = batch.of(cache).block_tables[requests]
    wide_rank, wide_rope = (max(16, next_power_of_2(size)) for size in (rank, cache.rope_dim))
    rows = count if chosen is not None else count * longest
    hopper = capability(q.device)[0] == 9
    shared = shared_memory(q.device)
    quantized = cache.quantized is not None
    width, item = wide_rank + wide_rope, q.element_size()
    tactic = absorbed_tactic(rows, width, item, shared, hopper, chosen is not None, quantized)
    tiles = cdiv(rows, tactic.rows)
    programs = (tokens if chosen is not None else tables.shape[0]) * tiles
    capacity = tables.shape[1] * data.shape[1] if chosen is None else chosen.shape[1]
    splits = num_splits(programs, capacity, multiprocessors(q.device))
    mixed = q.new_empty((tokens, count, rank))
    parts = mixed if splits == 1 else torch.empty((tokens * count, splits, rank), device=q.device)
    sums = mixed if splits == 1 else torch.empty((tokens * count, splits, 2), device=q.device)
    early = overlaps(q.device)
    _absorbed_kernel[(programs, splits)](
        q_latent,
        q,
        data,
        scales,
        keys,
        tables,
        batch.query_starts[requests.start :],
        batch.context_lens[requests],
        tables if chosen is None else chosen,
        mixed,
        parts,
        sums,
        first_token,
        tokens,
        tables.shape[0],
        tiles,
        q.stride(0),
        tables.stride(0),
        0 if chosen is None else chosen.stride(0),
        0 if chosen is None else chosen.shape[1],
        scale * LOG2E,
        HEADS=count,
        PLAIN=plain,
        RANK=rank,
        ROPE=cache.rope_dim,
        WIDE_RANK=wide_rank,
        WIDE_ROPE=wide_rope,
        WIDE_REQUESTS=1 if chosen is None else next_power_of_2(tables.shape[0]),
        BLOCK=data.shape[1],
        LEAST=LEAST_KEYS,
        ROWS=tactic.rows,
        KEYS=tactic.keys,
        STAGES=tactic.stages,
        SPLITS=splits,
        CHOSEN=chosen is not None,
        QUANTIZED=quantized,
        GROUP=min(LATENT_GROUP, wide_rank),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        EARLY=early,
        num_warps=tactic.warps,
        launch_pdl=early,
    )
    if splits > 1:
        _merge_kernel[(tokens * count,)](
            mixed,
            parts,
            sums,
            RANK=rank,
            WIDE_RANK=wide_rank,
            SPLITS=splits,
            WIDE_SPLITS=next_power_of_2(splits),
            AT_ONCE=min(8, next_power_of_2(splits)),
            EARLY=early,
            num_warps=4,
            launch_pdl=early,
        )
    values = out.view(tokens, count, -1).transpose(0, 1)
    torch.bmm(mixed.transpose(0, 1), w[:, plain:].transpose(1, 2), out=values)
