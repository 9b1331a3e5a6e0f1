"""Oracles of the ops that only GPUs use: products of FP8 weights, and what takes in a norm or a sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skyline.ops import Fp8Weight, KVCache

from .oracles import ORACLES, oracle


@oracle
def linear_fp8(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None, activated: bool = False) -> list[Tensor]:
    values, scales = weight.values.double().tolist(), weight.scales.double().tolist()  # elements of tensors are slow
    blocks = weight.scales.dim() == 2

    def scale(row: int, column: int) -> float:
        return scales[row // 128][column // 128] if blocks else scales[row]

    rows = [[value * scale(row, column) for column, value in enumerate(line)] for row, line in enumerate(values)]
    plain = torch.tensor(rows, dtype=torch.float64)
    return ORACLES["linear"](x, plain, bias, activated)


@oracle
def fused_linear(x: Tensor, weight: Any, *rest: Any) -> list[Tensor]:
    return _fused("linear", x, weight, *rest)


@oracle
def fused_linear_fp8(x: Tensor, weight: Any, *rest: Any) -> list[Tensor]:
    return _fused("linear_fp8", x, weight, *rest)


@oracle
def fused_linear_fp4(x: Tensor, weight: Any, *rest: Any) -> list[Tensor]:
    return _fused("linear_fp4", x, weight, *rest)


@oracle
def fused_linear_nvfp4(x: Tensor, weight: Any, bias: Any, activated: bool, norm: Any, eps: float, *rest: Any) -> Any:
    # Rounded as the reference rounds: else other numbers would be quantized.
    rows = x if norm is None else ORACLES["rms_norm"](x, torch.ones_like(norm), eps)[0].to(x.dtype) * norm
    return _fused("linear_nvfp4", rows, weight, bias, activated, None, 0.0, *rest)


@oracle
def fused_linear_int4(x: Tensor, weight: Any, *rest: Any) -> list[Tensor]:
    return _fused("linear_int4_weight_only", x, weight, *rest)


@oracle
def gated_mlp_fp8(
    x: Tensor, gate_up: Fp8Weight, down: Fp8Weight, norm: Tensor | None, eps: float, residual: Tensor | None
) -> list[Tensor]:
    (hidden,) = _fused("linear_fp8", x, gate_up, None, True, norm, eps, None)
    return _fused("linear_fp8", hidden.to(x.dtype), down, None, False, None, 0.0, residual)


@oracle
def rope_attention(qkv: Tensor, *rest: Any) -> list[Tensor]:
    *turn, cache, batch = rest[:7]
    q, *written = ORACLES["rope_kv_write"](qkv, *turn, cache, batch)
    k, v = (part.to(qkv.dtype) for part in written)
    fresh = KVCache(cache.num_kv_heads, cache.head_dim, qkv.dtype, k, v)
    return [*ORACLES["paged_attention"](q.to(qkv.dtype), fresh, batch, *rest[7:]), *written]


@oracle
def attention_linear_fp8(q: Tensor, weight: Fp8Weight, *rest: Any) -> list[Tensor]:
    *attends, bias, residual = rest[:8]
    if rest[8:]:
        attended, *written = rope_attention(q, *rest[8:], *attends)
    else:
        (attended,), written = ORACLES["paged_attention"](q, *attends), []
    return [*_fused("linear_fp8", attended.to(q.dtype), weight, bias, False, None, 0.0, residual), *written]


def _fused(
    linear: str,
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    activated: bool,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> list[Tensor]:
    rows = x.double() if norm is None else ORACLES["rms_norm"](x, norm, eps)[0].double()
    (result,) = ORACLES[linear](rows, weight, bias, activated)
    return [result if residual is None else result + residual.double()]


@oracle
def moe_experts_fp8(
    x: Tensor, gate_up: Fp8Weight, down: Fp8Weight, weights: Tensor, ids: Tensor, residual: Tensor | None = None
) -> list[Tensor]:
    result = torch.zeros(x.shape, dtype=torch.float64) if residual is None else residual.double().clone()
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token].tolist(), ids[token].tolist(), strict=True):
            first, second = (Fp8Weight(each.values[expert], each.scales[expert]) for each in (gate_up, down))
            (hidden,) = linear_fp8(x[token : token + 1], first, None, True)
            (added,) = linear_fp8(hidden.to(x.dtype), second)
            result[token] += weight * added[0]
    return [result]


@oracle
def norm_router(x: Tensor, norm: Tensor, eps: float, *rest: Any) -> list[Tensor]:
    (normed,) = ORACLES["rms_norm"](x, norm, eps)
    return [normed, *ORACLES["router"](normed, *rest)]


@oracle
def fused_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, more: Tensor) -> list[Tensor]:
    (result,) = ORACLES["moe_experts"](x, gate_up, down, weights, ids)
    return [result + more.double()]
