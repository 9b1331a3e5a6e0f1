"""Attention over paged keys and values: planned for prompts, from device memory alone for Blackwell's decode steps."""

from __future__ import annotations

from typing import cast

import flashinfer.decode
import flashinfer.jit
import torch
from torch import Tensor

from skyline.kernels.flashinfer import LEAST_TOKENS, calls, step, trials
from skyline.kernels.flashinfer.linear import fused_linear_fp8
from skyline.kernels.flashinfer.trials import checked
from skyline.kernels.triton import attention as triton
from skyline.kernels.triton import fused_fp8
from skyline.kernels.triton import linear as ours
from skyline.kernels.triton.device import capability
from skyline.kernels.triton.rope import rope_kv_write
from skyline.ops import AttentionBatch, KVCache
from skyline.ops.fp8 import Fp8Weight

_HEAD_DIMS = (64, 128, 256)
_BLOCK_SIZES = (16, 32, 64)
_MOST_GROUPED = 16  # query heads of a KV head


def serves(shape: calls.Shape, decodes: bool, tokens: int, capability: tuple[int, int]) -> bool:
    """Whether the kernels are made for such a step, and are worth it; softcap only for prompts before Blackwell's own.

    Hopper's for decode steps (XQA) took 0.9 to 1.3 times as long as Triton's.
    """
    if shape.head_dim not in _HEAD_DIMS or shape.block_size not in _BLOCK_SIZES:
        return False
    if shape.heads // shape.kv_heads > _MOST_GROUPED:
        return False
    if decodes:
        return shape.softcap is None and capability[0] in (10, 12)
    return tokens >= LEAST_TOKENS and (shape.softcap is None or capability[0] != 10)


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
    size, major = cache.head_dim, capability(q.device)
    heads = q.shape[1] // size
    shape = calls.Shape(heads, cache.num_kv_heads, size, k.shape[1], q.dtype, scale, window, softcap, cache.group)
    mine = step.of(batch)
    if sinks is not None or k.dtype != q.dtype or not q.shape[0] or not serves(shape, mine.decodes, q.shape[0], major):
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

    def compiled() -> bool:
        return bool(flashinfer.jit.gen_batch_prefill_module(**calls.prompts_module(shape)).is_compiled)

    return checked(
        ("decoding with" if mine.decodes else "prompts with", shape),
        decode if mine.decodes else prefill,
        lambda: triton.paged_attention(q, cache, batch, scale, window, sinks, softcap),
        compiled if major[0] == 9 else None,
    )


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
    if step.of(batch).decodes and capability(qkv.device)[0] == 9:
        turn = triton.Turn(q_norm, k_norm, eps, positions, table)
        return triton.rope_attention(qkv, *turn, cache, batch, scale, window, sinks, softcap)
    q = rope_kv_write(qkv, q_norm, k_norm, eps, positions, table, cache, batch)
    return paged_attention(q, cache, batch, scale, window, sinks, softcap)


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
    if step.of(batch).decodes and capability(q.device)[0] == 9:
        turn = (q_norm, k_norm, eps, positions, table)
        return fused_fp8.attention_linear_fp8(
            q, weight, cache, batch, scale, window, sinks, softcap, bias, residual, *turn
        )
    if positions is not None and table is not None:
        q = rope_kv_write(q, q_norm, k_norm, eps, positions, table, cache, batch)
    attended = paged_attention(q, cache, batch, scale, window, sinks, softcap)
    multiply = fused_linear_fp8 if trials.BUILDS else ours.fused_linear_fp8
    return multiply(attended, weight, bias, residual=residual)
