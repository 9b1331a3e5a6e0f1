"""Triton kernel of attention for single queries: split over the context, merged by the last program to arrive.

With TURN it also does what comes before: heads are normed and rotated where they are used, and the newest token's key
and value, which no cache holds yet, are taken into account, and written, by the program whose part of the context ends
with it. Nothing else that it reads of the cache comes from the launch ahead of it, so it begins before that has ended.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.rope import by_own_scale, own_scale, to_fp8


@triton.jit
def cached(at, mask, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Keys or values as they are multiplied; their scales are applied to the products."""
    return tl.load(at, mask=mask, other=0.0 if KIND != 2 else 0).to(DTYPE)


@triton.jit
def in_base_2(qk, factor, softcap, SOFTCAP: tl.constexpr):
    """In base 2. factor: one multiplication a score, with the base's in it where nothing comes between."""
    qk *= factor
    if SOFTCAP:
        qk = softcap * 1.4426950408889634 * (2.0 * tl.sigmoid(2.0 * qk / softcap) - 1.0)
    return qk


@triton.jit
def factor_of(k_scale, head, scale, KIND: tl.constexpr, SOFTCAP: tl.constexpr):
    """What `in_base_2` multiplies by."""
    factor = scale if SOFTCAP else scale * 1.4426950408889634
    return factor * tl.load(k_scale + head) if KIND == 1 else factor


@triton.jit
def store_heads(out, scales, at, result, writes, SIZE: tl.constexpr, QUANT: tl.constexpr):
    """Heads' results [ROWS, SIZE or more] to `at` [ROWS], counted in numbers; with QUANT as FP8, 128 to a scale."""
    column = tl.arange(0, result.shape[1])
    if QUANT:
        PARTS: tl.constexpr = SIZE // 128
        grouped = tl.reshape(result, (result.shape[0], PARTS, 128))
        largest = tl.max(tl.abs(grouped), 2)
        scale = tl.where(largest > 0, largest / 448.0, 1.0)
        group = (at // 128)[:, None] + tl.arange(0, PARTS)[None, :]
        tl.store(scales + group, scale, mask=writes[:, None])
        result = tl.reshape(grouped / scale[:, :, None], (result.shape[0], SIZE))
    place = out + at[:, None] + column[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=writes[:, None] & (column < SIZE)[None, :])


@triton.jit
def _finish(
    out, out_scales, sinks, v_scale, start, head, context, top, total, mixed,
    ROWS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    KIND: tl.constexpr, SINKS: tl.constexpr, QUANT: tl.constexpr,
):  # fmt: skip
    """Divide by the softmax's sum, and write the heads of one query."""
    row = tl.arange(0, ROWS)
    real = row < GROUP
    if SINKS:
        sink = tl.load(sinks + head * GROUP + row, mask=real, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        higher = tl.maximum(top, sink)
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.exp2(sink - higher)
        mixed *= shrink[:, None]
    result = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
    if KIND == 1:
        result *= tl.load(v_scale + head)
    at = start.to(tl.int64) * (HEADS * GROUP * SIZE) + (head * GROUP + row) * SIZE
    store_heads(out, out_scales, at, tl.where(context > 0, result, 0.0), real, SIZE, QUANT)


@triton.jit
def _angles(table, HALF: tl.constexpr, WIDE: tl.constexpr, TYPE: tl.constexpr):
    """Of a head's numbers [WIDE]: cosines, and sines as the other number of a pair is multiplied.

    table: cosines of the token's position, and behind these HALF its sines.
    """
    column = tl.arange(0, WIDE)
    turns = column < 2 * HALF
    cosine = tl.load(table + column % HALF, mask=turns, other=1.0).to(TYPE).to(tl.float32)
    sine = tl.load(table + HALF + column % HALF, mask=turns, other=0.0).to(TYPE).to(tl.float32)
    return cosine, tl.where(column < HALF, -sine, sine)


@triton.jit
def _turned(
    at, inside, norm, eps, cosine, sine,
    NORM: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Heads at `at` [ROWS], normed and rotated: [ROWS, WIDE] float32, rounded as skyline.kernels.triton.rope does."""
    column = tl.arange(0, WIDE)
    # Of the one that it turns with, if there is one.
    other = tl.where(column < HALF, column + HALF, tl.where(column < 2 * HALF, column - HALF, column))
    mask = inside[:, None] & (column < SIZE)[None, :]
    mine = tl.load(at[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    theirs = tl.load(at[:, None] + other[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(mine * mine, 1) / SIZE + eps)[:, None]
        weight = tl.load(norm + column, mask=column < SIZE, other=0.0).to(tl.float32)[None, :]
        mine = ((mine * factor).to(TYPE).to(tl.float32) * weight).to(TYPE).to(tl.float32)
        weight = tl.load(norm + other, mask=column < SIZE, other=0.0).to(tl.float32)[None, :]
        theirs = ((theirs * factor).to(TYPE).to(tl.float32) * weight).to(TYPE).to(tl.float32)
    return (mine * cosine[None, :] + theirs * sine[None, :]).to(TYPE).to(tl.float32)


@triton.jit
def _stored(values, target, scales, place, head, HEADS: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr):
    """Write values [1, WIDE] of a head to a token's place -> as they will be read, and what their scale is."""
    column = tl.arange(0, values.shape[1])
    at, known = place * HEADS + head, (column < SIZE)[None, :]
    TYPE: tl.constexpr = target.dtype.element_ty
    scale = 1.0
    if KIND == 1:
        one = tl.load(scales + head + tl.arange(0, 1))
        values = to_fp8(values, one).to(TYPE)
    elif KIND == 2:
        largest = tl.max(tl.abs(values), 1)
        each = own_scale(largest, TYPE)
        tl.store(scales + at + tl.arange(0, 1), each)
        values = by_own_scale(values, largest, TYPE).to(TYPE)
        scale = tl.sum(each, 0)
    else:
        values = values.to(TYPE)
    tl.store(target + at * SIZE + column[None, :], values, mask=known)
    return values.to(tl.float32), scale


@triton.jit
def _taken(
    query, keys, values, k_scales, v_scales, there, top, total, mixed, multiplier, softcap,
    KIND: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of keys and values into the sums of an online softmax: the largest score, and what is summed up."""
    scores = tl.dot(query, keys.T, input_precision=PRECISION)
    if KIND == 2:
        scores *= k_scales[None, :]
    scores = tl.where(there[None, :], in_base_2(scores, multiplier, softcap, SOFTCAP), float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(higher > float("-inf"), higher, 0.0)  # a tile may have no key at all
    shrink = tl.exp2(top - base)
    weights = tl.exp2(scores - base[:, None])
    total = total * shrink + tl.sum(weights, 1)
    if KIND == 2:
        weights *= v_scales[None, :]
    mixed = tl.dot(weights.to(query.dtype), values, mixed * shrink[:, None], input_precision=PRECISION)
    return higher, total, mixed


@triton.jit
def _tile(
    begin, last, lowest, k, v, k_scale, v_scale, table, head,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    KEYS: tl.constexpr, KIND: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Keys and values from `begin` on, their scales, if they are int8, and which of them are there."""
    key, column = begin + tl.arange(0, KEYS), tl.arange(0, WIDE)
    there = key < last
    if WINDOW:  # what is below it may have been let go: its place in the table says nothing
        there = there & (key >= lowest)
    block = tl.load(table + key // BLOCK, mask=there, other=0).to(tl.int64)
    place = (block * BLOCK + key % BLOCK) * HEADS + head
    address = place[:, None] * SIZE + column[None, :]
    inside = there[:, None] & (column < SIZE)[None, :]
    keys, values = cached(k + address, inside, KIND, TYPE), cached(v + address, inside, KIND, TYPE)
    k_scales, v_scales = place, place
    if KIND == 2:
        k_scales = tl.load(k_scale + place, mask=there, other=0.0)
        v_scales = tl.load(v_scale + place, mask=there, other=0.0)
    return keys, values, k_scales, v_scales, there


@triton.jit
def decode_kernel(
    q,  # [T, Hq * D]; with TURN [T, (Hq + 2 Hk) * D], of queries, keys and values
    k,  # [blocks, BLOCK, Hk, D]
    v,
    k_scale,  # [Hk], or [blocks, BLOCK, Hk]
    v_scale,
    tables,  # [R, longest]
    query_starts,
    context_lens,
    sinks,  # [Hq]
    out,  # [T, Hq * D], with QUANT float8_e4m3fn
    out_scales,  # [T, Hq * D / 128] float32, with QUANT
    parts,  # [R * Hk, SPLITS, REAL, WIDE] float32
    sums,  # [R * Hk, SPLITS, 2, REAL] float32: the largest score, and the sum over it
    counters,  # [R * Hk] int32, zeros
    q_norm,  # [D], with NORM; and all that follows with TURN
    k_norm,
    positions,  # [T]
    rope_table,  # [P, 2 * HALF] float32
    slots,  # [T] int64
    q_stride,
    table_stride,
    scale,
    softcap,
    window,
    eps,
    HEADS: tl.constexpr,  # Hk
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,  # D
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # GROUP, padded for the matrix unit
    REAL: tl.constexpr,  # GROUP, padded to a power of two
    WIDE: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    TOGETHER: tl.constexpr,  # splits that are merged at once
    KIND: tl.constexpr,  # 0: as q, 1: fp8, 2: int8
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    QUANT: tl.constexpr,
    PRECISION: tl.constexpr,
    TURN: tl.constexpr,  # every request has a single query
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY and not TURN:
        gdc_wait()
        gdc_launch_dependents()
    pair, split = tl.program_id(0), tl.program_id(1)
    request, head = pair // HEADS, pair % HEADS
    start = tl.load(query_starts + request)
    if tl.load(query_starts + request + 1) - start != 1:
        return
    context = tl.load(context_lens + request)
    lowest = tl.maximum(context - window, 0) if WINDOW else 0
    base = lowest // KEYS * KEYS
    share = tl.cdiv(tl.cdiv(context - base, SPLITS), KEYS) * KEYS
    first = base + split * share
    last = tl.minimum(first + share, context)

    row, column = tl.arange(0, ROWS), tl.arange(0, WIDE)
    real, known = row < GROUP, column < SIZE
    TYPE: tl.constexpr = q.dtype.element_ty
    multiplier = factor_of(k_scale, head, scale, KIND, SOFTCAP)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDE), tl.float32)
    table = tables + request.to(tl.int64) * table_stride
    head_at = start.to(tl.int64) * q_stride + (head * GROUP + row) * SIZE
    if TURN:
        newest = context - 1
        ends_here = (first <= newest) & (newest < last)
        last = tl.minimum(last, newest)
        keys, values, k_scales, v_scales, there = _tile(
            first, last, lowest, k, v, k_scale, v_scale, table, head,
            WINDOW, HEADS, SIZE, BLOCK, WIDE, KEYS, KIND, TYPE,
        )  # fmt: skip
        turn_at = rope_table + tl.load(positions + request).to(tl.int64) * (2 * HALF)
        cosine, sine = _angles(turn_at, HALF, WIDE, TYPE)
        place = tl.load(slots + request)
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        query = _turned(q + head_at, real, q_norm, eps, cosine, sine, NORM, SIZE, HALF, WIDE, TYPE).to(TYPE)
        top, total, mixed = _taken(
            query, keys, values, k_scales, v_scales, there, top, total, mixed, multiplier, softcap,
            KIND, SOFTCAP, PRECISION,
        )  # fmt: skip
        if ends_here:
            one = tl.arange(0, 1)
            at = q + start.to(tl.int64) * q_stride + (HEADS * GROUP + head + one) * SIZE
            key = _turned(at, one == 0, k_norm, eps, cosine, sine, NORM, SIZE, HALF, WIDE, TYPE)
            key, key_scale = _stored(key, k, k_scale, place, head, HEADS, SIZE, KIND)
            at = (at + HEADS * SIZE)[:, None] + column[None, :]
            value = tl.load(at, mask=known[None, :], other=0.0).to(tl.float32)
            value, value_scale = _stored(value, v, v_scale, place, head, HEADS, SIZE, KIND)
            score = in_base_2(tl.sum(query.to(tl.float32) * key, 1) * key_scale, multiplier, softcap, SOFTCAP)
            higher = tl.maximum(top, score)
            shrink, weight = tl.exp2(top - higher), tl.exp2(score - higher)
            total = total * shrink + weight
            mixed = mixed * shrink[:, None] + (weight * value_scale)[:, None] * value
            top = higher
        first += KEYS
    else:
        query = tl.load(q + head_at[:, None] + column[None, :], mask=real[:, None] & known[None, :], other=0.0)
    for begin in tl.range(first, last, KEYS, num_stages=STAGES):
        keys, values, k_scales, v_scales, there = _tile(
            begin, last, lowest, k, v, k_scale, v_scale, table, head,
            WINDOW, HEADS, SIZE, BLOCK, WIDE, KEYS, KIND, TYPE,
        )  # fmt: skip
        top, total, mixed = _taken(
            query, keys, values, k_scales, v_scales, there, top, total, mixed, multiplier, softcap,
            KIND, SOFTCAP, PRECISION,
        )  # fmt: skip

    if SPLITS == 1:
        _finish(
            out, out_scales, sinks, v_scale, start, head, context, top, total, mixed,
            ROWS, HEADS, GROUP, SIZE, WIDE, KIND, SINKS, QUANT,
        )  # fmt: skip
        return
    mine = pair.to(tl.int64) * SPLITS + split
    kept = row < REAL
    tl.store(parts + (mine * REAL + row[:, None]) * WIDE + column[None, :], mixed, mask=kept[:, None])
    tl.store(sums + mine * 2 * REAL + row, top, mask=kept)
    tl.store(sums + (mine * 2 + 1) * REAL + row, total, mask=kept)
    tl.debug_barrier()  # all of this program's threads have written before it says so
    if tl.atomic_add(counters + pair, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(counters + pair, 0)
        every = pair.to(tl.int64) * SPLITS
        # Past the first-level cache, which does not see what other processors write.
        part, line = tl.arange(0, SPLITS), tl.arange(0, REAL)
        each = (every + part)[:, None] * 2 * REAL + line[None, :]
        tops = tl.load(sums + each, cache_modifier=".cg")
        totals = tl.load(sums + each + REAL, cache_modifier=".cg")
        highest = tl.max(tops, 0)
        summed = tl.sum(tl.where(totals > 0.0, totals * tl.exp2(tops - highest[None, :]), 0.0), 0)
        whole = tl.zeros((REAL, WIDE), tl.float32)
        used = tl.cdiv(context - base, tl.maximum(share, 1))
        few = tl.arange(0, TOGETHER)
        for index in range(0, used, TOGETHER):  # several at once: each load takes its time
            other = every + index + few
            merged = ((index + few) < used)[:, None] & (line < GROUP)[None, :]
            entry = other[:, None] * 2 * REAL + line[None, :]
            high = tl.load(sums + entry, mask=merged, other=float("-inf"), cache_modifier=".cg")
            cell = (other[:, None, None] * REAL + line[None, :, None]) * WIDE + column[None, None, :]
            some = tl.load(parts + cell, mask=merged[:, :, None], other=0.0, cache_modifier=".cg")
            factor = tl.where(high > float("-inf"), tl.exp2(high - highest[None, :]), 0.0)
            whole += tl.sum(factor[:, :, None] * some, 0)
        _finish(
            out, out_scales, sinks, v_scale, start, head, context, highest, summed, whole,
            REAL, HEADS, GROUP, SIZE, WIDE, KIND, SINKS, QUANT,
        )  # fmt: skip
