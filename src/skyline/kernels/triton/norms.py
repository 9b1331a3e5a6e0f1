"""Norms: a program a row, or a row's head. Statistics in float32, rounding as in the references (skyline.ops)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.device import overlaps
from skyline.kernels.triton.sizes import next_power_of_2


@triton.jit
def _norm_kernel(
    x,  # [rows, groups * size]
    residual,  # like x, or unused
    gate,  # like x, or unused
    weight,  # [size]
    y,  # [rows, groups * size], contiguous
    total,  # x + residual, contiguous, or unused
    x_stride,
    residual_stride,
    gate_stride,
    groups,
    size,
    eps,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    at = group * size + columns
    out = row * groups * size + at
    values = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0).to(tl.float32)
        rounded = (values + more).to(total.dtype.element_ty)
        tl.store(total + out, rounded, mask=inside)
        values = rounded.to(tl.float32)
    normed = values * tl.rsqrt(tl.sum(values * values) / size + eps)
    scale = tl.load(weight + columns, mask=inside, other=0.0)
    if OFFSET:
        result = (normed * (1.0 + scale.to(tl.float32))).to(y.dtype.element_ty)
    else:
        result = (normed.to(y.dtype.element_ty).to(tl.float32) * scale.to(tl.float32)).to(y.dtype.element_ty)
    if GATE:
        opened = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
        result = (result.to(tl.float32) * opened * tl.sigmoid(opened)).to(y.dtype.element_ty)
    tl.store(y + out, result, mask=inside)


def _norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Norm of each run of len(weight) columns of x [..., n], and x + residual, or x itself."""
    size = weight.shape[0]
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = x.new_empty(rows.shape)
    total = torch.empty_like(y) if residual is not None else y
    groups = rows.shape[1] // size
    if rows.shape[0]:
        block = next_power_of_2(size)
        early = overlaps(x.device)
        _norm_kernel[(rows.shape[0], groups)](
            rows,
            rows if residual is None else residual,
            rows if gate is None else gate,
            weight,
            y,
            total,
            rows.stride(0),
            rows.stride(0) if residual is None else residual.stride(0),
            rows.stride(0) if gate is None else gate.stride(0),
            groups,
            size,
            eps,
            ADD=residual is not None,
            GATE=gate is not None,
            OFFSET=offset,
            BLOCK=block,
            EARLY=early,
            launch_pdl=early,
            num_warps=max(1, min(16, block // 512)),
        )
    return (y, total) if x.dim() == 2 else (y.view(x.shape), total.view(x.shape))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, weight, eps)[0]


head_rms_norm = rms_norm


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _norm(x, weight, eps, residual)


def offset_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, weight, eps, offset=True)[0]


offset_head_rms_norm = offset_rms_norm


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, weight, eps, gate=gate)[0]


@triton.jit
def _layer_norm_kernel(
    x,  # [rows, size]
    weight,  # [size]
    bias,  # [size]
    y,  # [rows, size], contiguous
    x_stride,
    size,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values) / size, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / size + eps)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + columns, (normed * scale + shift).to(y.dtype.element_ty), mask=inside)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    size = weight.shape[0]
    rows = x if x.dim() == 2 else x.reshape(-1, size)
    y = x.new_empty(rows.shape)
    if rows.shape[0]:
        block = next_power_of_2(size)
        warps = max(1, min(16, block // 512))
        _layer_norm_kernel[(rows.shape[0],)](
            rows, weight, bias, y, rows.stride(0), size, eps, BLOCK=block, num_warps=warps
        )
    return y.view(x.shape)
