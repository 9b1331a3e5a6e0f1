"""Attention over paged keys and values: planned for prompts, from device memory alone for decode steps."""

from __future__ import annotations

from typing import cast

import flashinfer.decode
import torch
from torch import Tensor

from skyline.kernels.flashinfer import calls, step
from skyline.kernels.flashinfer.linear import fused_linear_fp8
from skyline.kernels.flashinfer.trials import checked
from skyline.kernels.triton import attention as triton
from skyline.kernels.triton import fused_fp8
from skyline.kernels.triton.device import capability
from skyline.ops import AttentionBatch, KVCache
from skyline.ops.fp8 import Fp8Weight

_HEAD_DIMS = (64, 128, 256)
_BLOCK_SIZES = (16, 32, 64)
_MOST_GROUPED = 16  # query heads of a KV head


def serves(shape: calls.Shape, decodes: bool, capability: tuple[int, int]) -> bool:
    """Whether the kernels are made for such a step; softcap only for prompts before Blackwell's own kernels.

    No windows: tiles that lie across a window's edge are read whole and weighted with 0, and below it the block may
    have been let go. What its memory holds then may be no number, which no weight makes 0.
    """
    if shape.head_dim not in _HEAD_DIMS or shape.block_size not in _BLOCK_SIZES or shape.window is not None:
        return False
    if shape.heads // shape.kv_heads > _MOST_GROUPED:
        return False
    if decodes:
        return shape.softcap is None and capability[0] in (10, 12)
    return shape.softcap is None or capability[0] != 10


def _served(
    q: Tensor, heads: int, cache: KVCache, batch: AttentionBatch, scale: float, window: int | None,
    sinks: Tensor | None, softcap: float | None,
) -> calls.Shape | None:  # fmt: skip
    """The shape of a call with so many query heads, if the library's kernels are made for it."""
    k = cache.tensors[0]
    shape = calls.Shape(
        heads, cache.num_kv_heads, cache.head_dim, k.shape[1], q.dtype, scale, window, softcap, cache.group
    )
    able = sinks is None and k.dtype == q.dtype and q.shape[0] > 0
    return shape if able and serves(shape, step.of(batch).decodes, capability(q.device)) else None


def paged_attention(
    q: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    (k, v), size, major = cache.tensors, cache.head_dim, capability(q.device)
    heads, mine = q.shape[1] // size, step.of(batch)
    shape = _served(q, heads, cache, batch, scale, window, sinks, softcap)
    if shape is None:
        return triton.paged_attention(q, cache, batch, scale, window, sinks, softcap)
    tables = batch.of(cache).block_tables

    def decode() -> Tensor:
        queries = q.reshape(-1, heads, size).contiguous()
        lengths, padding = mine.lengths()
        memory = step.workspace("decode", q.device)
        found = flashinfer.decode.trtllm_batch_decode_with_kv_cache(
            **calls.decode(queries, k, v, memory, tables, lengths, shape)
        )
        return cast(Tensor, found.view(q.shape).masked_fill_(padding, 0))

    def prefill() -> Tensor:
        queries = q.reshape(-1, heads, size).contiguous()
        # On Blackwell the kernels chosen by default are those of Ampere.
        wrapper = mine.wrapper(shape, tables, "trtllm-gen" if major[0] == 10 else "auto")
        out = torch.empty_like(queries)
        wrapper.run(**calls.prefill_run(queries, k, v, out))
        return out.view(q.shape)

    return checked(
        ("decoding with" if mine.decodes else "prompts with", shape),
        decode if mine.decodes else prefill,
        lambda: triton.paged_attention(q, cache, batch, scale, window, sinks, softcap),
    )


def _query_heads(qkv: Tensor, cache: KVCache) -> int:
    """Of queries, keys and values side by side."""
    return qkv.shape[1] // cache.head_dim - 2 * cache.num_kv_heads


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
    turn = triton.Turn(q_norm, k_norm, eps, positions, table)
    if _served(qkv, _query_heads(qkv, cache), cache, batch, scale, window, sinks, softcap) is None:
        return triton.rope_attention(qkv, *turn, cache, batch, scale, window, sinks, softcap)
    return paged_attention(turn.apply(qkv, cache, batch), cache, batch, scale, window, sinks, softcap)


def attention_linear_fp8(
    q: Tensor,
    weight: Fp8Weight,
    cache: KVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    positions: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    turns = positions is not None and table is not None
    heads = _query_heads(q, cache) if turns else q.shape[1] // cache.head_dim
    if _served(q, heads, cache, batch, scale, window, sinks, softcap) is None:
        turn = (q_norm, k_norm, eps, positions, table)
        return fused_fp8.attention_linear_fp8(
            q, weight, cache, batch, scale, window, sinks, softcap, bias, residual, *turn
        )
    if positions is not None and table is not None:
        q = triton.Turn(q_norm, k_norm, eps, positions, table).apply(q, cache, batch)
    attended = paged_attention(q, cache, batch, scale, window, sinks, softcap)
    return fused_linear_fp8(attended, weight, bias, residual=residual)
