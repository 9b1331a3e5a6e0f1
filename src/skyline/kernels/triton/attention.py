"""Attention over paged keys and values: split over the context for single queries, in tiles for prompts.

Both keep an online softmax (arXiv:2205.14135) in base 2, and treat the query heads of one KV head as rows of one
product. Requests with one query go to the one, all others to the other; each kernel passes over the other's requests,
which it recognises on the device. For single queries nothing depends on the host's numbers, so that a step can be
recorded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from skyline.kernels.triton.attention_decode import decode_kernel
from skyline.kernels.triton.attention_prefill import prefill_kernel
from skyline.kernels.triton.device import multiprocessors, overlaps, shared_memory
from skyline.kernels.triton.knobs import current
from skyline.kernels.triton.rope import rope_kv_write
from skyline.kernels.triton.sizes import cdiv, next_power_of_2
from skyline.kernels.triton.thresholds import turns_heads
from skyline.ops import AttentionBatch, KVCache
from skyline.ops.fp8 import BLOCK, FP8

_LEAST_KEYS = 512  # of a context's upper bound that a split is worth
_MOST_SPLITS = 64
# Tiles of 256 rows read keys half as often: 5 to 11 % less time for 8,192 tokens on an H200, 20 % more for 1,024, of
# which there are too few (benchmarks/results/2026-11-27-gpu-h200-prefill-tiles.json).
_ROUNDS = 4
_LARGE = 200_000  # bytes of shared memory of a processor that such a tile takes more than half of


class Turn(NamedTuple):
    """What is done to queries, keys and values [T, (Hq + 2 Hk) * D] on the way, as in the op `rope_kv_write`."""

    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    positions: Tensor
    table: Tensor

    def apply(self, qkv: Tensor, cache: KVCache, batch: AttentionBatch) -> Tensor:
        """By a launch of its own: the queries, [T, Hq * D]."""
        return rope_kv_write(qkv, *self, cache, batch)


class Tactic(NamedTuple):
    """Rows of queries and keys in a tile, warps, stages of the pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def decode_tactic(group: int, head_dim: int, item: int, shared: int) -> Tactic:
    """item: bytes of a cached number."""
    wide = next_power_of_2(head_dim)
    keys = max(16, min(current().keys, 32768 // (wide * item)))
    stages = max(1, min(current().stages, shared // (2 * keys * wide * item)))
    return Tactic(max(16, next_power_of_2(group)), keys, 4, stages)


def prefill_tactic(group: int, head_dim: int, item: int, shared: int, rounds: float) -> Tactic:
    """rounds: how often tiles of 256 rows would fill all processors."""
    wide = next_power_of_2(head_dim)
    if wide * item == 256 and shared >= _LARGE and rounds >= _ROUNDS:
        return Tactic(256, 64, 8, 2)
    rows = max(128 if wide * item <= 256 else 64, next_power_of_2(group))
    keys = 64 if wide * item <= 512 else 32
    while keys > 16 and (rows + 2 * keys) * wide * item > shared:
        keys //= 2
    stages = max(1, min(3, (shared - rows * wide * item) // (2 * keys * wide * item)))
    return Tactic(rows, keys, 8 if rows >= 128 else 4, stages)


def num_splits(requests: int, kv_heads: int, capacity: int, processors: int) -> int:
    """Into how many parts a context is cut, of which no more is known than that it is at most `capacity` long."""
    wanted = -(-current().splits * processors // max(1, requests * kv_heads))
    most = min(wanted, capacity // _LEAST_KEYS, _MOST_SPLITS)
    return 1 << max(0, most.bit_length() - 1)  # few different numbers: each is compiled for


# The largest is used; those that were outgrown stay, for recorded steps go on using them.
_COUNTERS: dict[torch.device, list[Tensor]] = {}


def _counters(device: torch.device, count: int) -> Tensor:
    """Zeros, which every launch that uses them leaves as zeros."""
    known = _COUNTERS.setdefault(device, [])
    if not known or known[-1].numel() < count:
        known.append(torch.zeros(max(count, 1 << 16), dtype=torch.int32, device=device))
    return known[-1]


def paged_attention(
    q: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    out = q.new_empty(q.shape)
    _attend(out, out, q, cache, batch, scale, window, sinks, softcap)
    return out


def rope_attention(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    table: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    turn = Turn(q_norm, k_norm, eps, positions, table)
    if not turns_heads(batch, cache.num_kv_heads, multiprocessors(qkv.device)):
        return paged_attention(turn.apply(qkv, cache, batch), cache, batch, scale, window, sinks, softcap)
    out = qkv.new_empty((qkv.shape[0], qkv.shape[1] - 2 * cache.num_kv_heads * cache.head_dim))
    _attend(out, out, qkv, cache, batch, scale, window, sinks, softcap, turn)
    return out


def quantized_attention(
    q: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    turn: Turn | None = None,
) -> tuple[Tensor, Tensor]:
    """`paged_attention` in FP8 [T, Hq * D], and float32 scales of each 128 numbers, [T, Hq * D / 128].

    With `turn`, q is queries, keys and values, of steps that `turns_heads`.
    """
    columns = q.shape[1] - (0 if turn is None else 2 * cache.num_kv_heads * cache.head_dim)
    values = torch.empty((q.shape[0], columns), dtype=FP8, device=q.device)
    scales = torch.empty((q.shape[0], columns // BLOCK), device=q.device)
    _attend(values, scales, q, cache, batch, scale, window, sinks, softcap, turn)
    return values, scales


def _attend(
    out: Tensor,
    out_scales: Tensor,
    q: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    softcap: float | None,
    turn: Turn | None = None,
) -> None:
    k, v = cache.tensors
    heads, size, block = cache.num_kv_heads, cache.head_dim, k.shape[1]
    group = out.shape[1] // (heads * size)
    tables = batch.of(cache).block_tables
    requests = len(batch.host_query_lens)
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
        out_scales,
    )
    numbers = (q.stride(0), tables.stride(0), scale, softcap or 1.0, window or 0)
    wide = max(16, next_power_of_2(size))
    options = {
        "HEADS": heads,
        "GROUP": group,
        "SIZE": size,
        "BLOCK": block,
        "WIDE": wide,
        "KIND": kind,
        "WINDOW": window is not None,
        "SINKS": sinks is not None,
        "SOFTCAP": softcap is not None,
        "QUANT": out.dtype == FP8,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    if min(batch.host_query_lens, default=0) == 1:
        chosen = decode_tactic(group, size, item, shared)
        splits = num_splits(requests, heads, tables.shape[1] * block, multiprocessors(q.device))
        real = next_power_of_2(group)
        pairs = requests * heads
        parts = out if splits == 1 else torch.empty((pairs, splits, real, wide), device=q.device)
        sums = out if splits == 1 else torch.empty((pairs, splits, 2, real), device=q.device)
        counters = _counters(q.device, pairs)
        early = overlaps(q.device)
        turned: tuple[Tensor | None, ...] = (None,) * 5
        if turn is not None:
            turned = (turn.q_norm, turn.k_norm, turn.positions, turn.table, batch.of(cache).slot_mapping)
        decode_kernel[(pairs, splits)](
            *common,
            parts,
            sums,
            counters,
            *(out if part is None else part for part in turned),
            *numbers,
            0.0 if turn is None else turn.eps,
            ROWS=chosen.rows,
            REAL=real,
            KEYS=chosen.keys,
            STAGES=chosen.stages,
            SPLITS=splits,
            TOGETHER=min(splits, max(1, 8192 // (real * wide))),
            TURN=turn is not None,
            NORM=turned[0] is not None and turned[1] is not None,
            HALF=1 if turn is None else turn.table.shape[1] // 2,
            EARLY=early,
            num_warps=chosen.warps,
            launch_pdl=early,
            enable_fp_fusion=turn is None or kind != 2,  # as in skyline.kernels.triton.rope
            **options,
        )
    longest = max(batch.host_query_lens, default=0)
    if longest > 1:
        rounds = 0.0  # of what is cached in bytes, which takes more registers
        if kind == 0:
            tiles = sum(cdiv(length * group, 256) for length in batch.host_query_lens if length > 1)
            rounds = heads * tiles / multiprocessors(q.device)
        chosen = prefill_tactic(group, size, item, shared, rounds)
        prefill_kernel[(requests * heads, cdiv(longest * group, chosen.rows))](
            *common,
            *numbers,
            ROWS=chosen.rows,
            KEYS=chosen.keys,
            STAGES=chosen.stages,
            num_warps=chosen.warps,
            **options,
        )
