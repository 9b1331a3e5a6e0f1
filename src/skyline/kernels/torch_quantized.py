"""Quantized linears and experts in plain torch, for where there is no native kernel: right, and slow.

The weight is kept as skyline.ops.QuantizedWeight, quantized row by row as the checkpoint is read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.kernels.registry import Kernel, Layout, Request, register
from skyline.kernels.torch_invariant import ROW_TILE
from skyline.ops import (
    Op,
    QuantizedWeight,
    linear_int4,
    linear_int8,
    linear_int8_weight_only,
    moe_experts_int4,
    moe_experts_int8,
    moe_experts_int8_weight_only,
)
from skyline.ops.quantized_moe import mixture
from skyline.quantization import GROUPS, quantize_int4, quantize_int8


class Int8Layout:
    """`QuantizedWeight` of int8, as skyline.quantization.quantize_int8 makes it."""

    def __init__(self) -> None:
        self.name = "int8"

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedWeight:
        return QuantizedWeight(torch.empty(shape, dtype=torch.int8), torch.empty(shape[:-1]))

    def write(self, target: QuantizedWeight, first_row: int, rows: Tensor) -> None:
        """Raises ValueError if a value is NaN or infinite."""
        _write(target, first_row, quantize_int8(rows))


class Int4Layout:
    """`QuantizedWeight` of int4, as skyline.quantization.quantize_int4 makes it."""

    def __init__(self, group: int, symmetric: bool = True) -> None:
        self.name = f"int4 in groups of {group}" + ("" if symmetric else " with zero points")
        self.group = group
        self.symmetric = symmetric

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedWeight:
        per_group = (*shape[:-1], -(-shape[-1] // self.group))
        scales = torch.empty(per_group, dtype=torch.float16)
        zeros = None if self.symmetric else torch.empty_like(scales)
        return QuantizedWeight(torch.empty(shape, dtype=torch.int8), scales, zeros, self.group)

    def write(self, target: QuantizedWeight, first_row: int, rows: Tensor) -> None:
        """Raises ValueError if a value is NaN, infinite, or so large that its scale is beyond float16."""
        _write(target, first_row, quantize_int4(rows, self.group, self.symmetric))


def _write(target: QuantizedWeight, first_row: int, rows: QuantizedWeight) -> None:
    for whole, part in ((target.values, rows.values), (target.scales, rows.scales), (target.zeros, rows.zeros)):
        if whole is not None and part is not None:
            whole.view(-1, *part.shape[1:])[first_row : first_row + part.shape[0]] = part


INT8 = Int8Layout()
INT4 = {group: Int4Layout(group) for group in GROUPS}

Check = Callable[[Request], str | None]


def _on_cpu(request: Request) -> str | None:
    return None if request.device == "cpu" else "quantizes in the memory of the CPU"


def _in_groups(check: Check, group: int) -> Check:
    def supports(request: Request) -> str | None:
        return check(request) or (None if request.int4_group == group else f"shares a scale among {group} values")

    return supports


def _batch_dependent(request: Request) -> str | None:
    if request.batch_invariant:
        return "its reduction order depends on the number of rows"
    return _on_cpu(request)


def _batch_invariant(request: Request) -> str | None:
    if not request.batch_invariant:
        return "slower; only used when batch invariance is asked for"
    return _on_cpu(request)


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


def _provide(linear: Op, experts: Op, layout: Layout, restrict: Callable[[Check], Check] = lambda check: check) -> None:
    for op, tiled, layouts in (
        (linear, _tiled(linear), {1: layout}),
        (experts, _tiled_experts(linear), {1: layout, 2: layout}),
    ):
        register(Kernel(op.name, "torch-invariant", tiled, restrict(_batch_invariant), layouts=layouts))
        register(Kernel(op.name, "torch", op.reference, restrict(_batch_dependent), layouts=layouts))


# Sums of integers are exact in any order.
register(Kernel(linear_int8.name, "torch", linear_int8.reference, _on_cpu, layouts={1: INT8}))
register(Kernel(moe_experts_int8.name, "torch", moe_experts_int8.reference, _on_cpu, layouts={1: INT8, 2: INT8}))
_provide(linear_int8_weight_only, moe_experts_int8_weight_only, INT8)
for _group, _layout in INT4.items():
    _provide(linear_int4, moe_experts_int4, _layout, lambda check, group=_group: _in_groups(check, group))  # type: ignore[misc]
