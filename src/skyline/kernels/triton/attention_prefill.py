"""Triton kernel of attention for several queries of a request, in tiles of queries and heads that share keys."""

from __future__ import annotations

import triton
import triton.language as tl

from skyline.kernels.triton.attention_decode import cached, factor_of, in_base_2, store_heads


@triton.jit
def _tile(
    query, position, top, total, mixed, table, k, v, k_scale, v_scale, head, multiplier, softcap, window,
    first, last, oldest, context, column, known,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    KIND: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax of the queries at `position` over keys `first` to `last`, none before `oldest`."""
    for begin in tl.range(first, last, KEYS, num_stages=STAGES):
        key = begin + tl.arange(0, KEYS)
        if MASK:
            there = key < context
            if WINDOW:
                there = there & (key >= oldest)
            block = tl.load(table + key // BLOCK, mask=there, other=0).to(tl.int64)
            inside = there[:, None] & known[None, :]
        else:
            there = key < context
            block = tl.load(table + key // BLOCK).to(tl.int64)
            inside = known[None, :]
        place = (block * BLOCK + key % BLOCK) * HEADS + head
        address = place[:, None] * SIZE + column[None, :]
        keys = cached(k + address, inside, KIND, query.dtype)
        scores = tl.dot(query, keys.T, input_precision=PRECISION)
        if KIND == 2:
            scores *= tl.load(k_scale + place, mask=there, other=0.0)[None, :]
        scores = in_base_2(scores, multiplier, softcap, SOFTCAP)
        if MASK:
            seen = key[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # Of a row that has seen nothing yet: any number will do but minus infinity.
        safe = tl.where(higher == float("-inf"), 0.0, higher) if MASK else higher
        shrink = tl.exp2(top - safe)
        weights = tl.exp2(scores - safe[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if KIND == 2:
            weights *= tl.load(v_scale + place, mask=there, other=0.0)[None, :]
        values = cached(v + address, inside, KIND, query.dtype)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights.to(query.dtype), values, mixed, input_precision=PRECISION)
        top = higher
    return top, total, mixed


@triton.jit
def prefill_kernel(
    q,  # as of decode_kernel
    k,
    v,
    k_scale,
    v_scale,
    tables,
    query_starts,
    context_lens,
    sinks,
    out,
    out_scales,
    q_stride,
    table_stride,
    scale,
    softcap,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    QUANT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    request, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # those with the most keys first
    start = tl.load(query_starts + request)
    count = tl.load(query_starts + request + 1) - start
    # Rows are queries, and of each the heads that share this KV head.
    if count <= 1 or tile * ROWS >= count * GROUP:
        return
    context = tl.load(context_lens + request)
    row, column = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    index, member = row // GROUP, row % GROUP
    real, known = index < count, column < SIZE
    position = context - count + index
    heads = head * GROUP + member
    at = (start + index).to(tl.int64)[:, None] * q_stride + heads[:, None] * SIZE + column[None, :]
    query = tl.load(q + at, mask=real[:, None] & known[None, :], other=0.0)
    multiplier = factor_of(k_scale, head, scale, KIND, SOFTCAP)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDE), tl.float32)
    table = tables + request.to(tl.int64) * table_stride
    earliest = context - count + tile * ROWS // GROUP
    latest = tl.minimum(context - count + (tile * ROWS + ROWS - 1) // GROUP, context - 1)
    oldest = tl.maximum(earliest - window + 1, 0) if WINDOW else 0
    lowest = oldest // KEYS * KEYS
    # Up to here, all queries of the tile see every key; with a window, none is sure to.
    whole = lowest if WINDOW else (earliest + 1) // KEYS * KEYS
    if not WINDOW:
        top, total, mixed = _tile(
            query, position, top, total, mixed, table, k, v, k_scale, v_scale, head, multiplier, softcap, window,
            lowest, whole, oldest, context, column, known,
            HEADS, SIZE, BLOCK, KEYS, STAGES, KIND, False, WINDOW, SOFTCAP, PRECISION,
        )  # fmt: skip
    top, total, mixed = _tile(
        query, position, top, total, mixed, table, k, v, k_scale, v_scale, head, multiplier, softcap, window,
        whole, latest + 1, oldest, context, column, known,
        HEADS, SIZE, BLOCK, KEYS, STAGES, KIND, True, WINDOW, SOFTCAP, PRECISION,
    )  # fmt: skip
    if SINKS:
        sink = tl.load(sinks + heads, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
        higher = tl.maximum(top, sink)
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.exp2(sink - higher)
        mixed *= shrink[:, None]
    result = mixed / total[:, None]
    if KIND == 1:
        result *= tl.load(v_scale + head)
    at = (start + index).to(tl.int64) * (HEADS * GROUP * SIZE) + heads * SIZE
    store_heads(out, out_scales, at, result, real, SIZE, QUANT)
