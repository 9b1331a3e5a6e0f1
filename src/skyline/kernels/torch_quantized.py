"""Quantized linears and experts in plain torch, for where there is no native kernel: right, and slow.

The weight is kept as skyline.ops.QuantizedWeight, quantized row by row as the checkpoint is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.kernels.fp4_layout import fp4_layout
from skyline.kernels.fp8_layout import fp8_layout
from skyline.kernels.registry import CPU, Kernel, Layout, Request, register
from skyline.kernels.torch_invariant import ROW_TILE
from skyline.ops import (
    Op,
    QuantizedWeight,
    attention_linear_fp8,
    fused_linear_fp4,
    fused_linear_fp8,
    fused_linear_int4,
    fused_linear_nvfp4,
    gated_mlp_fp8,
    linear_fp4,
    linear_fp8,
    linear_int4,
    linear_int4_weight_only,
    linear_int8,
    linear_int8_weight_only,
    linear_nvfp4,
    moe_experts_clamped_fp4,
    moe_experts_fp4,
    moe_experts_fp8,
    moe_experts_int4,
    moe_experts_int4_weight_only,
    moe_experts_int8,
    moe_experts_int8_weight_only,
    moe_experts_nvfp4,
)
from skyline.ops.formats import DEFAULT_GROUP, IntegerFormat, integers_of
from skyline.ops.quantized_moe import mixture
from skyline.quantization import GROUPS, quantize_int4, quantize_int8


class Int8Layout:
    """`QuantizedWeight` of int8, as skyline.quantization.quantize_int8 makes it."""

    def __init__(self) -> None:
        self.name = "int8"

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> QuantizedWeight:
        values = torch.empty(shape, dtype=torch.int8, device=device)
        return QuantizedWeight(values, torch.empty(shape[:-1], device=device))

    def write(self, target: QuantizedWeight, first_row: int, rows: Tensor | QuantizedWeight) -> None:
        """Raises ValueError if a value is NaN or infinite."""
        _write(target, first_row, rows if isinstance(rows, QuantizedWeight) else quantize_int8(rows))


class Int4Layout:
    """`QuantizedWeight` of int4, as skyline.quantization.quantize_int4 makes it."""

    def __init__(self, group: int, symmetric: bool = True) -> None:
        self.name = f"int4 in groups of {group}" + ("" if symmetric else " with zero points")
        self.group = group
        self.symmetric = symmetric

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> QuantizedWeight:
        per_group = (*shape[:-1], -(-shape[-1] // self.group))
        scales = torch.empty(per_group, dtype=torch.float16, device=device)
        zeros = None if self.symmetric else torch.empty_like(scales)
        return QuantizedWeight(torch.empty(shape, dtype=torch.int8, device=device), scales, zeros, self.group)

    def write(self, target: QuantizedWeight, first_row: int, rows: Tensor | QuantizedWeight) -> None:
        """Raises ValueError if a value is NaN, infinite, or so large that its scale is beyond float16."""
        ready = rows if isinstance(rows, QuantizedWeight) else quantize_int4(rows, self.group, self.symmetric)
        _write(target, first_row, ready)


def _write(target: QuantizedWeight, first_row: int, rows: QuantizedWeight) -> None:
    for whole, part in ((target.values, rows.values), (target.scales, rows.scales), (target.zeros, rows.zeros)):
        if whole is not None and part is not None:
            whole.view(-1, *part.shape[1:])[first_row : first_row + part.shape[0]] = part


INT8 = Int8Layout()
INT4 = {(group, zeros): Int4Layout(group, not zeros) for group in GROUPS for zeros in (False, True)}


def _int4_layout(index: int) -> Callable[[tuple[Any, ...]], Layout]:
    """Of the weight among a call's arguments, with the group and zero points that were decided for it."""

    def choose(arguments: tuple[Any, ...]) -> Layout:
        decided = integers_of(arguments[index]) or IntegerFormat(4, DEFAULT_GROUP)
        return INT4[decided.group or DEFAULT_GROUP, decided.zeros]

    return choose


def _always(request: Request) -> str | None:
    return None


def _batch_dependent(request: Request) -> str | None:
    return "its reduction order depends on the number of rows" if request.batch_invariant else None


def _batch_invariant(request: Request) -> str | None:
    if not request.batch_invariant:
        return "slower; only used when batch invariance is asked for"
    return None if request.device == "cpu" else "BLAS reduces in one fixed order on a CPU only"


def _tiled(op: Op) -> Callable[..., Tensor]:
    """The reference on tiles of one fixed number of rows, for which BLAS reduces in one fixed order."""

    def run(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
        rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, max(1, -(-rows // ROW_TILE)) * ROW_TILE - rows))
        return torch.cat([op.reference(tile, weight, bias, silu_mul) for tile in torch.split(padded, ROW_TILE)])[:rows]

    return run


def _tiled_experts(linear: Op) -> Callable[..., Tensor]:
    tiled = _tiled(linear)

    def run(x: Tensor, gate_up: QuantizedWeight, down: QuantizedWeight, weights: Tensor, ids: Tensor) -> Tensor:
        return mixture(x, gate_up, down, weights, ids, tiled)

    return run


def _provide(linear: Op, experts: Op, layouts: Mapping[int, Layout | Callable[[tuple[Any, ...]], Layout]]) -> None:
    for op, tiled, wanted in (
        (linear, _tiled(linear), {1: layouts[1]}),
        (experts, _tiled_experts(linear), layouts),
    ):
        register(Kernel(op.name, "torch-invariant", tiled, _batch_invariant, layouts=wanted))
        register(Kernel(op.name, "torch", op.reference, _batch_dependent, layouts=wanted))


# Sums of integers are exact in any order.
register(Kernel(linear_int8.name, "torch", linear_int8.reference, _always, layouts={1: INT8}))
register(Kernel(moe_experts_int8.name, "torch", moe_experts_int8.reference, _always, layouts={1: INT8, 2: INT8}))
_provide(linear_int8_weight_only, moe_experts_int8_weight_only, {1: INT8, 2: INT8})
_provide(linear_int4, moe_experts_int4, {1: _int4_layout(1), 2: _int4_layout(2)})

_BY_REFERENCE: tuple[tuple[Op, dict[int, Callable[[tuple[Any, ...]], Layout]]], ...] = (
    (linear_int4_weight_only, {1: _int4_layout(1)}),
    (fused_linear_int4, {1: _int4_layout(1)}),
    (moe_experts_int4_weight_only, {1: _int4_layout(1), 2: _int4_layout(2)}),
    (fused_linear_fp4, {1: fp4_layout(1)}),
    (linear_fp8, {1: fp8_layout(1)}),
    (fused_linear_fp8, {1: fp8_layout(1)}),
    (attention_linear_fp8, {1: fp8_layout(1)}),
    (gated_mlp_fp8, {1: fp8_layout(1), 2: fp8_layout(2)}),
    (moe_experts_fp8, {1: fp8_layout(1), 2: fp8_layout(2)}),
    (linear_fp4, {1: fp4_layout(1)}),
    (moe_experts_fp4, {1: fp4_layout(1), 2: fp4_layout(2)}),
    (linear_nvfp4, {1: fp4_layout(1)}),
    (fused_linear_nvfp4, {1: fp4_layout(1)}),
    (moe_experts_nvfp4, {1: fp4_layout(1), 2: fp4_layout(2)}),
    (moe_experts_clamped_fp4, {1: fp4_layout(1), 3: fp4_layout(3)}),
)
for _op, _layouts in _BY_REFERENCE:
    register(Kernel(_op.name, "torch", _op.reference, _batch_dependent, layouts=_layouts))
