"""FP8 linears with what makes their input, which is quantized where it is made."""

from __future__ import annotations

from torch import Tensor

from skyline.kernels.triton import attention
from skyline.kernels.triton.device import multiprocessors
from skyline.kernels.triton.linear import fused_linear_fp8, product_fp8, quantize_rows
from skyline.kernels.triton.thresholds import BAND_ROWS, quantizes_attention, turns_heads
from skyline.ops import AttentionBatch, KVCache
from skyline.ops.fp8 import Fp8Weight


def gated_mlp_fp8(
    x: Tensor,
    gate_up: Fp8Weight,
    down: Fp8Weight,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    if x.shape[0] <= BAND_ROWS:  # products of few rows apply silu_mul themselves
        hidden = fused_linear_fp8(x, gate_up, None, True, norm, eps)
        return fused_linear_fp8(hidden, down, residual=residual)
    both = fused_linear_fp8(x, gate_up, None, False, norm, eps)
    values, scales = quantize_rows(both, down.blocks, gated=True)
    return product_fp8(values, scales, down, x.dtype, residual=residual)


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
    turn = None
    if positions is not None and table is not None:
        turn = attention.Turn(q_norm, k_norm, eps, positions, table)
        if not turns_heads(batch, cache.num_kv_heads, multiprocessors(q.device)):
            q, turn = turn.apply(q, cache, batch), None
    attends = (cache, batch, scale, window, sinks, softcap)
    if quantizes_attention(q.shape[0], weight, cache.head_dim):
        values, scales = attention.quantized_attention(q, *attends, turn)
        return product_fp8(values, scales, weight, q.dtype, bias, False, residual)
    if turn is None:
        attended = attention.paged_attention(q, *attends)
    else:
        attended = attention.rope_attention(q, *turn, cache, batch, scale, window, sinks, softcap)
    return fused_linear_fp8(attended, weight, bias, residual=residual)
