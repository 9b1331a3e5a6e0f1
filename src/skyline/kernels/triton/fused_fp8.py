"""FP8 linears with what makes their input, which is quantized where it is made."""

from __future__ import annotations

from torch import Tensor

from skyline.kernels.triton import attention
from skyline.kernels.triton.linear import fused_linear_fp8, product_fp8, quantize_rows
from skyline.kernels.triton.thresholds import BAND_ROWS, quantizes_attention
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
) -> Tensor:
    attends = (q, cache, batch, scale, window, sinks, softcap)
    if quantizes_attention(q, weight, cache.head_dim):
        values, scales = attention.quantized_attention(*attends)
        return product_fp8(values, scales, weight, q.dtype, bias, False, residual)
    return fused_linear_fp8(attention.paged_attention(*attends), weight, bias, residual=residual)
