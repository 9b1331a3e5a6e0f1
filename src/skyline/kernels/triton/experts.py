"""Experts on int4 and on int8 weights alone, one after the other: each is two calls of the linear of the same format.

Right for every number of tokens, and slow for few: which experts there are is asked of the device. Experts in bfloat16
and in bytes have kernels of their own (moe.py, moe_bytes.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skyline.kernels.triton import quantized
from skyline.kernels.triton.layouts import Int4Weight
from skyline.ops import QuantizedWeight
from skyline.ops.quantized_moe import expert_weight


def _of(weight: QuantizedWeight | Int4Weight, expert: int) -> QuantizedWeight | Int4Weight:
    """The matrix [N, K] of one expert of a weight [E, N, K]."""
    if isinstance(weight, QuantizedWeight):
        return expert_weight(weight, expert)
    zeros = None if weight.zeros is None else weight.zeros[expert]
    return Int4Weight(weight.values[expert], weight.scales[expert], zeros, weight.group, weight.k)


def _mixture(linear: Callable[..., Tensor], x: Tensor, gate_up: Any, down: Any, weights: Tensor, ids: Tensor) -> Tensor:
    """Shapes as in skyline.ops.moe_experts_int8."""
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(ids).tolist():
        tokens, choices = (ids == expert).nonzero(as_tuple=True)
        hidden = linear(x.index_select(0, tokens), _of(gate_up, expert), None, True)
        result = linear(hidden, _of(down, expert), None, False)
        output.index_add_(0, tokens, result.float() * weights[tokens, choices].unsqueeze(1))
    return output.to(x.dtype)


def moe_experts_int8_weight_only(x: Tensor, gate_up: Any, down: Any, weights: Tensor, ids: Tensor) -> Tensor:
    return _mixture(quantized.linear_int8_weight_only, x, gate_up, down, weights, ids)


def moe_experts_int4(x: Tensor, gate_up: Any, down: Any, weights: Tensor, ids: Tensor) -> Tensor:
    return _mixture(quantized.linear_int4, x, gate_up, down, weights, ids)
