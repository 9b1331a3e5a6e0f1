"""The lightning indexer: the keys' write to their cache, the scores of positions, and the best of them in order.

1. A program takes some heads of a token, and rotates them; the last one of each norms, rotates and caches its key.
2. Scores, float32: a program takes the heads of one or a few queries of a request, and part of its keys.
3. A program a query: the score of its last choice, by its digits in base 256, and then the choices in the order of
   their positions, so that of equals the earlier are taken.
4. Their order: each counts those ahead of it.

Nothing but the size of the buffer for scores depends on how long contexts may be.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.device import multiprocessors, overlaps, shared_memory
from skyline.kernels.triton.latent_absorbed import request_of
from skyline.kernels.triton.latent_tactics import queries_at_once
from skyline.kernels.triton.rope import by_own_scale, own_scale
from skyline.kernels.triton.sizes import cdiv, next_power_of_2
from skyline.ops import AttentionBatch, IndexCache

_LANES = 8  # heads of a token that are rotated together
_ROWS = 128  # of queries' heads in a product, where there are several queries
_KEYS = 128  # in a product
_TILE = 4096  # scores that are looked at together
_RANKED = 64  # choices of a program


@triton.jit
def _normed(values, norm, bias, column, mean, factor, mask):
    """Columns of a vector, by the mean and factor of all of it, rounded but in float32."""
    scale = tl.load(norm + column, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    return ((values - mean) * factor * scale + shift).to(norm.dtype.element_ty).to(tl.float32)


@triton.jit
def _store_quantized(place, scale_at, first, second, plain, turns, stays, HALF: tl.constexpr):
    """A key [1, ..] in three parts, where `turns` and `stays`, and its scale."""
    half, rest = tl.arange(0, first.shape[1])[None, :], 2 * HALF + tl.arange(0, plain.shape[1])[None, :]
    first, second, plain = first.to(tl.float32), second.to(tl.float32), plain.to(tl.float32)
    largest = tl.maximum(tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1)), tl.max(tl.abs(plain), 1))
    TYPE: tl.constexpr = place.dtype.element_ty
    tl.store(scale_at, own_scale(largest, TYPE)[:, None], mask=tl.max(turns.to(tl.int32), 1)[:, None] > 0)
    tl.store(place + half, by_own_scale(first, largest, TYPE).to(TYPE), mask=turns)
    tl.store(place + HALF + half, by_own_scale(second, largest, TYPE).to(TYPE), mask=turns)
    tl.store(place + rest, by_own_scale(plain, largest, TYPE).to(TYPE), mask=stays)


@triton.jit
def _turn_kernel(
    q,  # [T, HEADS * SIZE]
    k,  # [T, SIZE]
    norm,  # [SIZE], or unused
    bias,  # [SIZE], or unused
    positions,  # [T]
    table,  # [P, 2 * HALF] float32
    slots,  # [T] int64
    q_out,  # like q, contiguous
    keys,  # [places, SIZE]
    scales,  # [places] float32, if QUANTIZED
    q_stride,
    k_stride,
    eps,
    NORM: tl.constexpr,
    QUANTIZED: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    LANES: tl.constexpr,  # heads of a program
    WIDTH: tl.constexpr,  # HALF, padded
    REST: tl.constexpr,  # what is not rotated, padded
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of_key = group == tl.num_programs(1) - 1
    head = tl.where(of_key, 0, group * LANES) + tl.arange(0, LANES)
    slot = tl.load(slots + row)
    # Of a key, only the first lane is there.
    inside = (head < tl.where(of_key, tl.where(slot >= 0, 1, 0), HEADS))[:, None]
    source = tl.where(of_key, k + row * k_stride, q + row * q_stride) + head[:, None] * SIZE
    half, rest = tl.arange(0, WIDTH)[None, :], 2 * HALF + tl.arange(0, REST)[None, :]
    turns, stays = inside & (half < HALF), inside & (rest < SIZE)
    first = tl.load(source + half, mask=turns, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + half, mask=turns, other=0.0).to(tl.float32)
    plain = tl.load(source + rest, mask=stays, other=0.0).to(tl.float32)
    if NORM:  # noqa: SIM102  known to the compiler, unlike the rest
        if of_key:
            mean = (tl.sum(first, 1) + tl.sum(second, 1) + tl.sum(plain, 1))[:, None] / SIZE
            squares = tl.sum(tl.where(turns, (first - mean) * (first - mean), 0.0), 1)
            squares += tl.sum(tl.where(turns, (second - mean) * (second - mean), 0.0), 1)
            squares += tl.sum(tl.where(stays, (plain - mean) * (plain - mean), 0.0), 1)
            factor = tl.rsqrt(squares / SIZE + eps)[:, None]
            first = _normed(first, norm, bias, half, mean, factor, half < HALF)
            second = _normed(second, norm, bias, HALF + half, mean, factor, half < HALF)
            plain = _normed(plain, norm, bias, rest, mean, factor, rest < SIZE)
    at = table + tl.load(positions + row).to(tl.int64) * (2 * HALF) + half
    cosine = tl.load(at, mask=half < HALF, other=0.0).to(q.dtype.element_ty).to(tl.float32)
    sine = tl.load(at + HALF, mask=half < HALF, other=0.0).to(q.dtype.element_ty).to(tl.float32)
    turned = (first * cosine - second * sine).to(q.dtype.element_ty)
    other = (second * cosine + first * sine).to(q.dtype.element_ty)
    plain = plain.to(q.dtype.element_ty)
    if of_key:
        place = keys + slot * SIZE + head[:, None] * SIZE
        if QUANTIZED:
            _store_quantized(place, (scales + slot + head)[:, None], turned, other, plain, turns, stays, HALF)
        else:
            tl.store(place + half, turned.to(keys.dtype.element_ty), mask=turns)
            tl.store(place + HALF + half, other.to(keys.dtype.element_ty), mask=turns)
            tl.store(place + rest, plain.to(keys.dtype.element_ty), mask=stays)
    else:
        target = q_out + row * (HEADS * SIZE) + head[:, None] * SIZE
        tl.store(target + half, turned, mask=turns)
        tl.store(target + HALF + half, other, mask=turns)
        tl.store(target + rest, plain, mask=stays)


@triton.jit(do_not_specialize=["first_token", "last_token", "groups"])
def _score_kernel(
    q,  # [T, HEADS * SIZE], contiguous
    keys,  # [places, SIZE]
    scales,  # [places] float32, if QUANTIZED
    weights,  # [T, HEADS]
    tables,  # [R, longest]
    query_starts,
    context_lens,
    scores,  # [last_token - first_token, width] float32, out: of the positions each query sees
    first_token,
    last_token,
    groups,
    weights_stride,
    table_stride,
    width,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE_HEADS: tl.constexpr,
    WIDE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    request, group, split = tl.program_id(0) // groups, tl.program_id(0) % groups, tl.program_id(1)
    end = tl.load(query_starts + request + 1)
    first = tl.maximum(tl.load(query_starts + request), first_token) + group * QUERIES
    last = tl.minimum(tl.minimum(end, last_token), first + QUERIES)
    if first >= last:
        return
    visible = tl.load(context_lens + request) - end + last  # to the last of these queries
    lane = tl.arange(0, QUERIES * WIDE_HEADS)
    token, head = (first + lane // WIDE_HEADS).to(tl.int64), lane % WIDE_HEADS
    real = (token < last) & (head < HEADS)
    column = tl.arange(0, WIDE_SIZE)
    known = column < SIZE
    at = (token * HEADS + head) * SIZE
    query = tl.load(q + at[:, None] + column[None, :], mask=real[:, None] & known[None, :], other=0.0)
    factor = tl.load(weights + token * weights_stride + head, mask=real, other=0.0).to(tl.float32)
    row = first + tl.arange(0, QUERIES)
    out = scores + (row - first_token).to(tl.int64)[:, None] * width
    table = tables + request.to(tl.int64) * table_stride
    for begin in tl.range(split * KEYS, visible, SPLITS * KEYS, num_stages=STAGES):
        key = begin + tl.arange(0, KEYS)
        there = key < visible
        block = tl.load(table + key // BLOCK, mask=there, other=0).to(tl.int64)
        place = block * BLOCK + key % BLOCK
        source = keys + (place * SIZE)[:, None] + column[None, :]
        some = tl.load(source, mask=there[:, None] & known[None, :], other=0.0)
        products = tl.dot(query, some.to(query.dtype).T, input_precision=PRECISION)
        if QUANTIZED:
            products *= (scale * tl.load(scales + place, mask=there, other=0.0))[None, :]
        else:
            products *= scale
        products = tl.maximum(products, 0.0) * factor[:, None]
        summed = tl.sum(tl.reshape(products, (QUERIES, WIDE_HEADS, KEYS)), 1)
        tl.store(out + key[None, :], summed, mask=(row < last)[:, None] & there[None, :])


@triton.jit
def _ordered(scores, key, visible):
    """Scores at `key` as integers that order alike, from 0; -0.0 equals 0.0."""
    values = tl.load(scores + key, mask=key < visible, other=0.0)
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return bits.to(tl.int64) + 0x80000000


@triton.jit(do_not_specialize=["first_token", "requests", "top_k"])
def _select_kernel(
    scores,  # [rows, width] float32
    query_starts,
    context_lens,
    counts,  # [rows] int32, out
    places,  # [rows, top_k] int32, out: as many positions, rising
    values,  # [rows, top_k] int64, out: and their scores as `_ordered`
    first_token,
    requests,
    width,
    top_k,
    WIDE_REQUESTS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(0) + first_token
    request = request_of(token, query_starts, requests, WIDE_REQUESTS)
    visible = tl.load(context_lens + request) - tl.load(query_starts + request + 1) + token + 1
    scores += row * width
    # Chosen are scores above `bound`, and the first `left` that equal it. To begin with, all.
    bound, left = tl.full((), 0, tl.int64), top_k
    if visible > top_k:
        digits = tl.arange(0, 256)
        for step in tl.static_range(4):
            found = tl.zeros((256,), tl.int32)
            for begin in range(0, visible, TILE):
                key = begin + tl.arange(0, TILE)
                value = _ordered(scores, key, visible)
                alike = (key < visible) & ((value >> (32 - 8 * step)) == bound)
                found += tl.histogram(((value >> (24 - 8 * step)) & 255).to(tl.int32), 256, mask=alike)
            above = tl.sum(found) - tl.cumsum(found, 0)
            digit = tl.sum((above >= left).to(tl.int32))
            left -= tl.sum(tl.where(digits == digit, above, 0))
            bound = bound * 256 + digit
    taken = tl.full((), 0, tl.int32)
    equal = tl.full((), 0, tl.int32)
    for begin in range(0, visible, TILE):
        key = begin + tl.arange(0, TILE)
        value = _ordered(scores, key, visible)
        same = ((key < visible) & (value == bound)).to(tl.int32)
        ahead = equal + tl.cumsum(same, 0) - same
        takes = (key < visible) & ((value > bound) | ((same > 0) & (ahead < left)))
        number = takes.to(tl.int32)
        at = row * top_k + taken + tl.cumsum(number, 0) - number
        tl.store(places + at, key, mask=takes)
        tl.store(values + at, value, mask=takes)
        taken += tl.sum(number)
        equal += tl.sum(same)
    tl.store(counts + row, taken)


@triton.jit
def _rank_kernel(
    counts,  # of _select_kernel
    places,
    values,
    chosen,  # [rows, top_k] int32, out: the best first, -1 behind the last
    top_k,
    RANKED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    mine = tl.program_id(1) * RANKED + tl.arange(0, RANKED)
    real = mine < count
    value = tl.load(values + row * top_k + mine, mask=real, other=0)
    ahead = tl.zeros((RANKED, RANKED), tl.int32)
    for begin in range(0, count if tl.program_id(1) * RANKED < count else 0, RANKED):
        index = begin + tl.arange(0, RANKED)
        other = tl.load(values + row * top_k + index, mask=index < count, other=-1)[None, :]
        earlier = index[None, :] < mine[:, None]
        ahead += ((other > value[:, None]) | ((other == value[:, None]) & earlier)).to(tl.int32)
    place = tl.load(places + row * top_k + mine, mask=real, other=-1)
    tl.store(chosen + row * top_k + tl.where(real, tl.sum(ahead, 1), mine), place, mask=mine < top_k)


def index_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    positions: Tensor,
    table: Tensor,
    cache: IndexCache,
    batch: AttentionBatch,
    top_k: int,
    scale: float,
    norm: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    keys = cache.tensors[0]
    scales = cache.tensors[-1]  # where there are none, they stand for nothing
    quantized = cache.quantized is not None
    tokens, size, heads = q.shape[0], cache.head_dim, weights.shape[1]
    chosen = torch.empty((tokens, top_k), dtype=torch.int32, device=q.device)
    if not tokens:
        return chosen
    turned = q.new_empty(q.shape)
    places, early = batch.of(cache), overlaps(q.device)
    half, lanes = table.shape[1] // 2, min(_LANES, next_power_of_2(heads))
    _turn_kernel[(tokens, cdiv(heads, lanes) + 1)](
        q,
        k,
        q if norm is None else norm,
        q if norm_bias is None else norm_bias,
        positions,
        table,
        places.slot_mapping,
        turned,
        keys,
        scales,
        q.stride(0),
        k.stride(0),
        eps,
        NORM=norm is not None,
        QUANTIZED=quantized,
        HEADS=heads,
        SIZE=size,
        HALF=half,
        LANES=lanes,
        WIDTH=next_power_of_2(half),
        REST=next_power_of_2(max(1, size - 2 * half)),
        EARLY=early,
        num_warps=2,
        launch_pdl=early,
        enable_fp_fusion=cache.quantized != torch.int8,  # as in latent_rope_write
    )

    tables, longest = places.block_tables, max(batch.host_query_lens)
    requests, capacity = tables.shape[0], tables.shape[1] * keys.shape[1]
    # A step of single queries may be recorded, and replayed for any contexts.
    width = capacity if longest == 1 else max(batch.host_context_lens)
    at_once = queries_at_once(tokens, width)
    wide_heads, wide_size = (max(16, next_power_of_2(number)) for number in (heads, size))
    item = q.element_size()
    queries = 1 if longest == 1 or item == 4 else max(1, _ROWS // wide_heads)
    groups = cdiv(min(longest, at_once), queries)
    rows, tile = queries * wide_heads, _KEYS if item == 2 else 16
    # Beside the stages of keys there are the queries, and products that threads exchange to add them up.
    free = shared_memory(q.device) - rows * (wide_size * item + 4 * tile)
    stages = max(1, min(3, free // (tile * wide_size * item)))
    splits = max(1, min(cdiv(width, tile), cdiv(4 * multiprocessors(q.device), requests * groups)))
    scores = torch.empty((at_once, width), device=q.device)
    counts = torch.empty((at_once,), dtype=torch.int32, device=q.device)
    found = torch.empty((at_once, top_k), dtype=torch.int32, device=q.device)
    values = torch.empty((at_once, top_k), dtype=torch.int64, device=q.device)
    for first in range(0, tokens, at_once):
        last = min(first + at_once, tokens)
        _score_kernel[(requests * groups, splits)](
            turned,
            keys,
            scales,
            weights,
            tables,
            batch.query_starts,
            batch.context_lens,
            scores,
            first,
            last,
            groups,
            weights.stride(0),
            tables.stride(0),
            width,
            scale,
            HEADS=heads,
            SIZE=size,
            WIDE_HEADS=wide_heads,
            WIDE_SIZE=wide_size,
            BLOCK=keys.shape[1],
            QUERIES=queries,
            KEYS=tile,
            STAGES=stages,
            SPLITS=splits,
            QUANTIZED=quantized,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=4 if item == 2 and rows <= 64 else 8,
        )
        _select_kernel[(last - first,)](
            scores,
            batch.query_starts,
            batch.context_lens,
            counts,
            found,
            values,
            first,
            requests,
            width,
            top_k,
            WIDE_REQUESTS=next_power_of_2(requests),
            TILE=_TILE,
            num_warps=16,
        )
        _rank_kernel[(last - first, cdiv(top_k, _RANKED))](
            counts, found, values, chosen[first:last], top_k, RANKED=_RANKED, num_warps=4
        )
    return chosen
