"""Gates: an activation of one half, times the other. Rounding as in the references (skyline.ops)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.device import multiprocessors, overlaps
from skyline.kernels.triton.sizes import cdiv, next_power_of_2

_SILU, _GELU, _SIGMOID = (tl.constexpr(kind) for kind in range(3))
_WIDE, _NARROW = 2048, 512  # columns a program, where there are programs for all processors, and where not


@triton.jit
def _gate_kernel(
    gate,  # [rows, columns], or [rows, 1]
    x,  # [rows, columns]
    y,  # [rows, columns], contiguous
    gate_stride,
    x_stride,
    columns,
    KIND: tl.constexpr,
    ONE: tl.constexpr,  # gate a row
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    if ONE:
        wide = tl.load(gate + row * gate_stride).to(tl.float32)
    else:
        wide = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    if KIND == _SILU:
        opened = wide * tl.sigmoid(wide)
    elif KIND == _GELU:  # 1 + tanh(z) = 2 sigmoid(2 z), with z = sqrt(2 / pi) (x + 0.044715 x^3)
        opened = wide * tl.sigmoid(1.5957691216057308 * (wide + 0.044715 * wide * wide * wide))
    else:
        opened = tl.sigmoid(wide)
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    product = opened.to(y.dtype.element_ty).to(tl.float32) * values
    tl.store(y + row * columns + column, product.to(y.dtype.element_ty), mask=inside)


def _gate(gate: Tensor, x: Tensor, kind: tl.constexpr) -> Tensor:
    """gate [T, H] or [T, 1], x [T, H] -> activation(gate) * x, [T, H]."""
    rows, columns = x.shape
    y = x.new_empty((rows, columns))
    if rows:
        busy = rows * cdiv(columns, _WIDE) >= multiprocessors(x.device)
        early = overlaps(x.device)
        block = min(_WIDE if busy else _NARROW, next_power_of_2(columns))
        _gate_kernel[(rows, cdiv(columns, block))](
            gate,
            x,
            y,
            gate.stride(0),
            x.stride(0),
            columns,
            KIND=kind,
            ONE=gate.shape[1] == 1 < columns,
            BLOCK=block,
            EARLY=early,
            launch_pdl=early,
            num_warps=max(1, block // 512),
        )
    return y


def _halves(gate_up: Tensor, kind: tl.constexpr) -> Tensor:
    """gate_up [..., 2I] -> [..., I]."""
    gate, up = gate_up.reshape(-1, gate_up.shape[-1]).chunk(2, dim=-1)
    return _gate(gate, up, kind).view(*gate_up.shape[:-1], -1)


def silu_mul(gate_up: Tensor) -> Tensor:
    return _halves(gate_up, _SILU)


def gelu_mul(gate_up: Tensor) -> Tensor:
    return _halves(gate_up, _GELU)


def sigmoid_mul(x: Tensor, gate: Tensor) -> Tensor:
    return _gate(gate, x, _SIGMOID)
