"""Attention over paged keys and values: split over the context for single queries, in tiles for prompts.

Both keep an online softmax (arXiv:2205.14135) in base 2, and treat the query heads of one KV head as rows of one
product. Requests with one query go to the one, all others to the other; each kernel passes over the other's requests,
which it recognises on the device. For single queries nothing depends on the host's numbers, so that a step can be
recorded.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.device import multiprocessors, overlaps, shared_memory
from skyline.kernels.triton.knobs import current
from skyline.ops import AttentionBatch, KVCache

_LOG2E = math.log2(math.e)
_LEAST_KEYS = 512  # of a context's upper bound that a split is worth
_MOST_SPLITS = 64


class Tactic(NamedTuple):
    """Rows of queries and keys in a tile, warps, stages of the pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def decode_tactic(group: int, head_dim: int, item: int, shared: int) -> Tactic:
    """item: bytes of a cached number."""
    wide = triton.next_power_of_2(head_dim)
    keys = max(16, min(current().keys, 32768 // (wide * item)))
    stages = max(1, min(current().stages, shared // (2 * keys * wide * item)))
    return Tactic(max(16, triton.next_power_of_2(group)), keys, 4, stages)


def prefill_tactic(group: int, head_dim: int, item: int, shared: int) -> Tactic:
    wide = triton.next_power_of_2(head_dim)
    rows = max(128 if wide * item <= 256 else 64, triton.next_power_of_2(group))
    keys = 64 if wide * item <= 512 else 32
    stages = max(1, min(3, (shared - rows * wide * item) // (2 * keys * wide * item)))
    return Tactic(rows, keys, 8 if rows >= 128 else 4, stages)


def num_splits(requests: int, kv_heads: int, capacity: int, processors: int) -> int:
    """Into how many parts a context is cut, of which no more is known than that it is at most `capacity` long."""
    wanted = -(-current().splits * processors // max(1, requests * kv_heads))
    most = min(wanted, capacity // _LEAST_KEYS, _MOST_SPLITS)
    return 1 << max(0, most.bit_length() - 1)  # few different numbers: each is compiled for


@triton.jit
def _cached(at, mask, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Keys or values as they are multiplied; their scales are applied to the products."""
    return tl.load(at, mask=mask, other=0.0 if KIND != 2 else 0).to(DTYPE)


@triton.jit
def _scores(qk, k_factor, scale, softcap, SOFTCAP: tl.constexpr):
    """In base 2."""
    qk *= k_factor * scale
    if SOFTCAP:
        qk = softcap * (2.0 * tl.sigmoid(2.0 * qk / softcap) - 1.0)
    return qk * 1.4426950408889634


@triton.jit
def _finish(
    out, sinks, v_scale, start, head, context, top, total, mixed,
    ROWS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    KIND: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Divide by the softmax's sum, and write the heads of one query."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDE)
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
    place = start.to(tl.int64) * (HEADS * GROUP * SIZE) + (head * GROUP + row)[:, None] * SIZE + column[None, :]
    writes = real[:, None] & (column < SIZE)[None, :]
    tl.store(out + place, tl.where(context > 0, result, 0.0).to(out.dtype.element_ty), mask=writes)


@triton.jit
def _decode_kernel(
    q,  # [T, Hq * D]
    k,  # [blocks, BLOCK, Hk, D]
    v,
    k_scale,  # [Hk], or [blocks, BLOCK, Hk]
    v_scale,
    tables,  # [R, longest]
    query_starts,
    context_lens,
    sinks,  # [Hq]
    out,  # [T, Hq * D]
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
    k_factor = tl.load(k_scale + head) if KIND == 1 else 1.0
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDE), tl.float32)
    table = tables + request.to(tl.int64) * table_stride
    for begin in tl.range(first, last, KEYS, num_stages=STAGES):
        key = begin + tl.arange(0, KEYS)
        there = key < last
        block = tl.load(table + key // BLOCK, mask=there, other=0).to(tl.int64)
        place = (block * BLOCK + key % BLOCK) * HEADS + head
        address = place[:, None] * SIZE + column[None, :]
        inside = there[:, None] & known[None, :]
        keys = _cached(k + address, inside, KIND, q.dtype.element_ty)
        values = _cached(v + address, inside, KIND, q.dtype.element_ty)
        scores = tl.dot(query, keys.T, input_precision=PRECISION)
        if KIND == 2:
            scores *= tl.load(k_scale + place, mask=there, other=0.0)[None, :]
        scores = _scores(scores, k_factor, scale, softcap, SOFTCAP)
        seen = there & (key >= lowest) if WINDOW else there
        scores = tl.where(seen[None, :], scores, float("-inf"))
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
            out, sinks, v_scale, start, head, context, top, total, mixed, ROWS, HEADS, GROUP, SIZE, WIDE, KIND, SINKS
        )
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
            out,
            sinks,
            v_scale,
            start,
            head,
            context,
            highest,
            summed,
            whole,
            REAL,
            HEADS,
            GROUP,
            SIZE,
            WIDE,
            KIND,
            SINKS,
        )


@triton.jit
def _tile(
    query, position, top, total, mixed, table, k, v, k_scale, v_scale, head, k_factor, scale, softcap, window,
    first, last, context, column, known,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    KIND: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax of the queries at `position` over keys `first` to `last`."""
    for begin in tl.range(first, last, KEYS, num_stages=STAGES):
        key = begin + tl.arange(0, KEYS)
        if MASK:
            there = key < context
            block = tl.load(table + key // BLOCK, mask=there, other=0).to(tl.int64)
            inside = there[:, None] & known[None, :]
        else:
            block = tl.load(table + key // BLOCK).to(tl.int64)
            inside = known[None, :]
        place = (block * BLOCK + key % BLOCK) * HEADS + head
        address = place[:, None] * SIZE + column[None, :]
        keys = _cached(k + address, inside, KIND, query.dtype)
        scores = tl.dot(query, keys.T, input_precision=PRECISION)
        if KIND == 2:
            scores *= tl.load(k_scale + place, mask=key < context, other=0.0)[None, :]
        scores = _scores(scores, k_factor, scale, softcap, SOFTCAP)
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
            weights *= tl.load(v_scale + place, mask=key < context, other=0.0)[None, :]
        values = _cached(v + address, inside, KIND, query.dtype)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights.to(query.dtype), values, mixed, input_precision=PRECISION)
        top = higher
    return top, total, mixed


@triton.jit
def _prefill_kernel(
    q,  # as of _decode_kernel
    k,
    v,
    k_scale,
    v_scale,
    tables,
    query_starts,
    context_lens,
    sinks,
    out,
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
    PRECISION: tl.constexpr,
):
    request, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys first
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
    k_factor = tl.load(k_scale + head) if KIND == 1 else 1.0
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDE), tl.float32)
    table = tables + request.to(tl.int64) * table_stride
    earliest = context - count + tile * ROWS // GROUP
    latest = tl.minimum(context - count + (tile * ROWS + ROWS - 1) // GROUP, context - 1)
    lowest = 0
    if WINDOW:
        lowest = tl.maximum(earliest - window + 1, 0) // KEYS * KEYS
    # Up to here, all queries of the tile see every key; with a window, none is sure to.
    whole = lowest if WINDOW else (earliest + 1) // KEYS * KEYS
    if not WINDOW:
        top, total, mixed = _tile(
            query, position, top, total, mixed, table, k, v, k_scale, v_scale, head, k_factor, scale, softcap, window,
            lowest, whole, context, column, known,
            HEADS, SIZE, BLOCK, KEYS, STAGES, KIND, False, WINDOW, SOFTCAP, PRECISION,
        )  # fmt: skip
    top, total, mixed = _tile(
        query, position, top, total, mixed, table, k, v, k_scale, v_scale, head, k_factor, scale, softcap, window,
        whole, latest + 1, context, column, known,
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
    place = (start + index).to(tl.int64)[:, None] * (HEADS * GROUP * SIZE) + heads[:, None] * SIZE + column[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=real[:, None] & known[None, :])


_COUNTERS: dict[torch.device, Tensor] = {}


def _counters(device: torch.device, count: int) -> Tensor:
    """Zeros, which every launch that uses them leaves as zeros. Kept: recorded steps go on using them."""
    known = _COUNTERS.get(device)
    if known is None or known.numel() < count:
        known = _COUNTERS[device] = torch.zeros(max(count, 1 << 16), dtype=torch.int32, device=device)
    return known


def paged_attention(
    q: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    k, v = cache.tensors
    heads, size, block = cache.num_kv_heads, cache.head_dim, k.shape[1]
    group = q.shape[1] // (heads * size)
    tables = batch.of(cache).block_tables
    requests = len(batch.host_query_lens)
    out = torch.empty((q.shape[0], q.shape[1]), dtype=q.dtype, device=q.device)
    kind = {torch.float8_e4m3fn: 1, torch.int8: 2}.get(cache.dtype, 0)
    k_scale, v_scale = cache.scales or (out, out)
    item, shared = k.element_size() if kind == 0 else q.element_size(), shared_memory(q.device)
    common = (
        q,
        k,
        v,
        k_scale,
        v_scale,
        tables,
        batch.query_starts,
        batch.context_lens,
        out if sinks is None else sinks,
        out,
    )
    numbers = (q.stride(0), tables.stride(0), scale, softcap or 1.0, window or 0)
    options = {
        "HEADS": heads,
        "GROUP": group,
        "SIZE": size,
        "BLOCK": block,
        "WIDE": max(16, triton.next_power_of_2(size)),
        "KIND": kind,
        "WINDOW": window is not None,
        "SINKS": sinks is not None,
        "SOFTCAP": softcap is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    longest = max(batch.host_query_lens, default=0)
    if min(batch.host_query_lens, default=0) == 1:
        chosen = decode_tactic(group, size, item, shared)
        splits = num_splits(requests, heads, tables.shape[1] * block, multiprocessors(q.device))
        wide, real = options["WIDE"], triton.next_power_of_2(group)
        pairs = requests * heads
        parts = out if splits == 1 else torch.empty((pairs, splits, real, wide), device=q.device)
        sums = out if splits == 1 else torch.empty((pairs, splits, 2, real), device=q.device)
        counters = _counters(q.device, pairs)
        early = overlaps(q.device)
        _decode_kernel[(pairs, splits)](
            *common,
            parts,
            sums,
            counters,
            *numbers,
            ROWS=chosen.rows,
            REAL=real,
            KEYS=chosen.keys,
            STAGES=chosen.stages,
            SPLITS=splits,
            TOGETHER=min(splits, max(1, 8192 // (real * wide))),
            EARLY=early,
            num_warps=chosen.warps,
            launch_pdl=early,
            **options,
        )
    if longest > 1:
        chosen = prefill_tactic(group, size, item, shared)
        _prefill_kernel[(triton.cdiv(longest * group, chosen.rows), requests * heads)](
            *common,
            *numbers,
            ROWS=chosen.rows,
            KEYS=chosen.keys,
            STAGES=chosen.stages,
            num_warps=chosen.warps,
            **options,
        )
    return out
