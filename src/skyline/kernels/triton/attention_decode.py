"""Triton kernel of attention for single queries: split over the context, merged by the last program to arrive."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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
def decode_kernel(
    q,  # [T, Hq * D]
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
    q_stride,
    table_stride,
    scale,
    softcap,
    window,
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
    EARLY: tl.constexpr,
):
    if EARLY:
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
    at = start.to(tl.int64) * q_stride + (head * GROUP + row)[:, None] * SIZE + column[None, :]
    query = tl.load(q + at, mask=real[:, None] & known[None, :], other=0.0)
    multiplier = factor_of(k_scale, head, scale, KIND, SOFTCAP)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDE), tl.float32)
    table = tables + request.to(tl.int64) * table_stride
    for begin in tl.range(first, last, KEYS, num_stages=STAGES):
        key = begin + tl.arange(0, KEYS)
        there = key < last
        if WINDOW:  # what is below it may have been let go: its place in the table says nothing
            there = there & (key >= lowest)
        block = tl.load(table + key // BLOCK, mask=there, other=0).to(tl.int64)
        place = (block * BLOCK + key % BLOCK) * HEADS + head
        address = place[:, None] * SIZE + column[None, :]
        inside = there[:, None] & known[None, :]
        keys = cached(k + address, inside, KIND, q.dtype.element_ty)
        values = cached(v + address, inside, KIND, q.dtype.element_ty)
        scores = tl.dot(query, keys.T, input_precision=PRECISION)
        if KIND == 2:
            scores *= tl.load(k_scale + place, mask=there, other=0.0)[None, :]
        scores = in_base_2(scores, multiplier, softcap, SOFTCAP)
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if KIND == 2:
            weights *= tl.load(v_scale + place, mask=there, other=0.0)[None, :]
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights.to(q.dtype.element_ty), values, mixed, input_precision=PRECISION)
        top = higher

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
