"""Mixtures of experts of many rows, in CUTLASS's kernels; those of few rows are Triton's, on the same weights.

Those want the rows of up before those of gate, so the weights lie so (layouts.py), and Triton's kernels are told. Of
plain experts on Hopper and Blackwell, and of FP8 in blocks of 128 x 128 on Hopper, whose rows they quantize themselves.
The sum over a token's choices is a launch of its own: the way that needs none adds in no fixed order.
"""

from __future__ import annotations

from typing import Any, cast

import flashinfer.fused_moe
import torch
from torch import Tensor

from skyline.kernels.flashinfer import calls
from skyline.kernels.flashinfer.layouts import UpFirst
from skyline.kernels.flashinfer.trials import checked
from skyline.kernels.triton import moe as triton
from skyline.kernels.triton import moe_bytes
from skyline.kernels.triton.device import capability
from skyline.ops.fp8 import BLOCK, Fp8Weight

MANY_ROWS = 16  # an expert, on average, from which on products are bound by arithmetic
_ALIGNED = 16  # columns that plain rows have a multiple of


def serves(tokens: int, top_k: int, shape: tuple[int, ...], blocks: bool, major: int) -> bool:
    """Whether the kernels of this generation of GPUs are made for experts [E, 2 I, H], and there is enough to do."""
    experts, rows, h = shape
    if tokens * top_k < MANY_ROWS * experts:
        return False
    step = BLOCK if blocks else _ALIGNED
    return rows // 2 % step == 0 and h % step == 0 and major in ((9,) if blocks else (9, 10, 12))


def _mixture(x: Tensor, gate_up: UpFirst, down: Any, weights: Tensor, ids: Tensor) -> Tensor:
    scales = None if gate_up.scales is None else (gate_up.scales, down.scales)
    matrices = gate_up.values, down if scales is None else down.values
    rows = x.contiguous()
    out = torch.empty_like(rows)
    found = flashinfer.fused_moe.cutlass_fused_moe(
        **calls.mixture(rows, ids.int(), weights.float(), matrices, scales, out)
    )
    return cast(Tensor, found[0] if isinstance(found, (list, tuple)) else found)


def _experts(x: Tensor, gate_up: UpFirst, down: Any, weights: Tensor, ids: Tensor, residual: Tensor | None) -> Tensor:
    def ours(residual: Tensor | None = None) -> Tensor:
        if gate_up.scales is None:
            return triton.fused_experts(x, gate_up.values, down, weights, ids, residual, up_first=True)
        return moe_bytes.moe_experts_fp8(x, gate_up.weight, down, weights, ids, residual, up_first=True)

    blocks = gate_up.scales is not None
    if not serves(x.shape[0], ids.shape[1], gate_up.shape, blocks, capability(x.device)[0]):
        return ours(residual)
    kind = (f"experts in {'FP8' if blocks else str(x.dtype).removeprefix('torch.')} of", *gate_up.shape)
    y = checked(kind, lambda: _mixture(x, gate_up, down, weights, ids), ours)
    return y if residual is None else y + residual


def moe_experts(x: Tensor, gate_up: UpFirst, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    return _experts(x, gate_up, down, weights, ids, None)


def fused_experts(x: Tensor, gate_up: UpFirst, down: Tensor, weights: Tensor, ids: Tensor, residual: Tensor) -> Tensor:
    return _experts(x, gate_up, down, weights, ids, residual)


def moe_experts_fp8(
    x: Tensor,
    gate_up: UpFirst | Fp8Weight,
    down: Fp8Weight,
    weights: Tensor,
    ids: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    if isinstance(gate_up, Fp8Weight):  # with a scale a row
        return moe_bytes.moe_experts_fp8(x, gate_up, down, weights, ids, residual)
    return _experts(x, gate_up, down, weights, ids, residual)
