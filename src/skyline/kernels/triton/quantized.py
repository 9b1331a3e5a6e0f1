"""Linear layers on weights of int8, int4 and FP4.

One kernel serves them all: a program multiplies a tile of rows of x with a band of the weight's rows, which it widens
as it reads them. Few rows are bound by reading the weight. There, the warps of a program share its band by columns:
each sums up its own blocks of K, and all are added at the end, so that even a narrow weight keeps every processor
reading.

Integers of int8 are multiplied as such. x is quantized by a kernel of its own before, as the reference does. Four bits
become numbers of x's type where they are read; one row of x has a kernel of its own (words.py), and for many the weight
is widened as a whole (widen.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.device import has_assembly, multiprocessors, overlaps
from skyline.kernels.triton.four_bits import a_byte, fp4_factors, fp4_numbers, int4_numbers, int4_scales
from skyline.kernels.triton.layouts import Fp4Words, Int4Weight, Words, fp4_words, int4_words
from skyline.kernels.triton.linear import fused_linear
from skyline.kernels.triton.linear_kernels import tile_and_band
from skyline.kernels.triton.norms import rms_norm
from skyline.kernels.triton.sizes import cdiv, next_power_of_2
from skyline.kernels.triton.thresholds import widens
from skyline.kernels.triton.widen import widen
from skyline.kernels.triton.words import one_row
from skyline.ops import Fp4Weight, QuantizedWeight
from skyline.ops.fp4 import NVFP4_GROUP

FEW_ROWS = 16  # up to so many rows of x the warps of a program share a band by columns

_INT8_WEIGHT_ONLY, _INT8, _INT4, _FP4 = (tl.constexpr(kind) for kind in range(4))


class Tactic(NamedTuple):
    """Rows of x and of the weight (of gate and of up each) a program, columns a block, blocks at a time."""

    rows: int
    band: int
    width: int
    split: int
    warps: int
    stages: int


def tactic(rows: int, n: int, width: int, group: int, silu_mul: bool, wide: bool, sms: int) -> Tactic:
    """For `rows` of x and n columns of the result.

    width: the most columns a block. group: the least. wide: products of float32.
    """
    if wide:  # without the matrix unit, where a thread holds whole rows of its blocks
        return Tactic(16 if rows <= 16 else 32, 32, max(32, group), 1, 4, 2)
    if rows <= FEW_ROWS:
        return Tactic(16, 16 if silu_mul or n < 32 * sms else 32, width, 4, 4, 4)
    width = max(group, min(width, 64))
    if rows <= 32:
        return Tactic(32, 32, width, 1, 4, 4)
    if rows <= 64:
        return Tactic(64, 64, width, 1, 4, 3)
    return Tactic(128, 128 >> silu_mul, width, 1, 8, 3)


@triton.jit
def _quantize_kernel(
    x,  # [T, K]
    levels,  # [T, K] int8
    scales,  # [T] float32
    k,
    x_stride,
    SIZE: tl.constexpr,  # of a row, padded
):
    """`skyline.ops.quantized.quantize_rows` to the bit: a product is rounded to float32 before it is to an integer."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    wide = tl.load(x + row * x_stride + column, mask=column < k, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(wide), 0)
    broken = tl.max((wide != wide).to(tl.int32), 0)
    largest = tl.where(broken > 0, float("nan"), largest)
    inverse = tl.div_rn(127.0, largest)
    inverse = tl.where(inverse < float("inf"), inverse, 0.0)
    scaled = wide * inverse
    # Numbers from 2^23 on are integers, and additions round half to even.
    integers = (scaled + 12582912.0) - 12582912.0
    integers = tl.where(integers == integers, integers, 0.0)
    tl.store(levels + row * k + column, integers.to(tl.int8), mask=column < k)
    tl.store(scales + row, tl.div_rn(largest, 127.0))


def quantize_rows_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> int8 [T, K], and a scale a row [T] float32."""
    rows, k = x.shape
    levels = torch.empty((rows, k), dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    size = next_power_of_2(k)
    _quantize_kernel[(rows,)](
        x, levels, scales, k, x.stride(0), SIZE=size, num_warps=max(1, min(16, size // 512)), enable_fp_fusion=False
    )
    return levels, scales


@triton.jit
def _turned(tile, SPLIT: tl.constexpr):
    """[.., BAND, WIDTH] -> [.., WIDTH, BAND]."""
    return tl.permute(tile, (0, 2, 1)) if SPLIT > 1 else tl.trans(tile)


@triton.jit
def _add_product(
    total,
    values,  # of x, [.., ROWS, WIDTH]
    weight,
    scales,
    zeros,
    byte,
    own,  # [BAND], inside the weight
    first,
    outputs,
    weight_stride,
    scale_stride,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    BAND: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total plus values times the weight's columns `first` and on: int32 for int8, otherwise float32."""
    # What lies in a row: a byte for each column, or a word for eight.
    LANES: tl.constexpr = 1 if KIND <= _INT8 else 8
    ITEMS: tl.constexpr = WIDTH // LANES
    PARTS: tl.constexpr = WIDTH // GROUP
    item = first // LANES + tl.arange(0, ITEMS)
    if SPLIT > 1:
        item = tl.arange(0, SPLIT)[:, None] * ITEMS + item[None, :]
        at = weight + own.to(tl.int64)[None, :, None] * weight_stride + item[:, None, :]
        inside = (item < weight_stride)[:, None, :]
    else:
        at = weight + own.to(tl.int64)[:, None] * weight_stride + item[None, :]
        inside = (item < weight_stride)[None, :]
    stored = tl.load(at) if EVEN_K else tl.load(at, mask=inside, other=0)
    if KIND <= _INT8:
        if KIND == _INT8_WEIGHT_ONLY:
            stored = stored.to(tl.float32).to(values.dtype)
        tile = _turned(stored, SPLIT)
        result = tl.dot(values, tile, total, input_precision=PRECISION, out_dtype=total.dtype)
    elif KIND == _INT4:
        group = first // GROUP + tl.arange(0, PARTS)
        if SPLIT > 1:
            group = tl.arange(0, SPLIT)[:, None] * PARTS + group[None, :]
            scale_at = group.to(tl.int64)[:, None, :] * outputs + own[None, :, None]
            known = (group < scale_stride)[:, None, :]
        else:
            scale_at = group.to(tl.int64)[None, :] * outputs + own[:, None]
            known = (group < scale_stride)[None, :]
        scale, zero = int4_scales(scales, zeros, scale_at, known, ZEROS)
        numbers = int4_numbers(stored, byte, scale, zero, NATIVE, values.dtype)
        result = tl.dot(values, _turned(numbers, SPLIT), total, input_precision=PRECISION)
    else:
        group = first // GROUP + tl.arange(0, PARTS)
        # Rows of scales are as long as all steps ask for: without a mask, whole words of them are copied ahead.
        if SPLIT > 1:
            group = tl.arange(0, SPLIT)[:, None] * PARTS + group[None, :]
            scale = tl.load(scales + own.to(tl.int64)[None, :, None] * scale_stride + group[:, None, :])
        else:
            scale = tl.load(scales + own.to(tl.int64)[:, None] * scale_stride + group[None, :])
        numbers = fp4_numbers(stored, fp4_factors(scale, GROUP), NATIVE and values.dtype == tl.bfloat16, values.dtype)
        result = tl.dot(values, _turned(numbers, SPLIT), total, input_precision=PRECISION)
    return result


@triton.jit
def _linear_kernel(
    x,  # [T, K], as it is or its integers
    x_scales,  # [T] float32
    weight,  # [N, weight_stride], int8, or int32 of eight a word
    scales,  # int8: [N] float32. int4: [groups, N] float16. FP4: [N, scale_stride] uint8
    zeros,  # like scales
    row_scales,  # [N] float32, of FP4
    bias,  # [N]
    residual,  # [T, n]
    y,  # [T, n]
    rows,
    n,  # columns of y: N, or N / 2
    outputs,  # N
    k,
    x_stride,
    weight_stride,
    scale_stride,  # of FP4; of int4 groups
    residual_stride,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BAND: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,  # float16 times FP4 in tf32, which holds both: float16 has not the range of the scales
    STAGES: tl.constexpr,
    NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    TOGETHER: tl.constexpr,  # as in `tile_and_band`
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    tile, band = tile_and_band(tl.cdiv(rows, ROWS), tl.cdiv(n, BAND), TOGETHER)
    row, column = tile * ROWS + tl.arange(0, ROWS), band * BAND + tl.arange(0, BAND)
    safe_row, own = tl.where(row < rows, row, 0), tl.where(column < n, column, 0)
    KIND_OF_SUM: tl.constexpr = tl.int32 if KIND == _INT8 else tl.float32
    if SPLIT > 1:
        steps = tl.arange(0, SPLIT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        x_at = x + safe_row.to(tl.int64)[None, :, None] * x_stride + steps[:, None, :]
        result = tl.zeros((SPLIT, ROWS, BAND), KIND_OF_SUM)
    else:
        steps = tl.arange(0, WIDTH)
        x_at = x + safe_row.to(tl.int64)[:, None] * x_stride + steps[None, :]
        result = tl.zeros((ROWS, BAND), KIND_OF_SUM)
    second = result
    byte = a_byte(weight, BAND, NATIVE and KIND == _INT4)
    for first in tl.range(0, k, SPLIT * WIDTH, num_stages=STAGES):
        left = first + steps < k
        if SPLIT > 1:
            # Rows of padding are not read: each program reads all of x, which is as much as its band of the weight.
            values = tl.load(x_at + first, mask=left[:, None, :] & (row < rows)[None, :, None], other=0)
        elif EVEN_K:
            values = tl.load(x_at + first)
        else:
            values = tl.load(x_at + first, mask=left[None, :], other=0)
        if WIDEN:
            values = values.to(tl.float32)
        result = _add_product(
            result, values, weight, scales, zeros, byte, own, first, outputs, weight_stride, scale_stride,
            KIND, ZEROS, BAND, WIDTH, GROUP, SPLIT, EVEN_K, NATIVE, PRECISION,
        )  # fmt: skip
        if GATED:
            second = _add_product(
                second, values, weight, scales, zeros, byte, own + n, first, outputs, weight_stride, scale_stride,
                KIND, ZEROS, BAND, WIDTH, GROUP, SPLIT, EVEN_K, NATIVE, PRECISION,
            )  # fmt: skip
    if SPLIT > 1:
        result = tl.sum(result, 0)
        second = tl.sum(second, 0)
    result = _finished(result, x_scales, scales, row_scales, bias, safe_row, own, KIND, BIAS)
    if GATED:
        up = _finished(second, x_scales, scales, row_scales, bias, safe_row, own + n, KIND, BIAS)
        result = result * tl.sigmoid(result) * up
    writes = (row < rows)[:, None] & (column < n)[None, :]
    if RESIDUAL:
        at = row.to(tl.int64)[:, None] * residual_stride + column[None, :]
        result += tl.load(residual + at, mask=writes, other=0.0).to(tl.float32)
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=writes)


@triton.jit
def _finished(total, x_scales, scales, row_scales, bias, row, own, KIND: tl.constexpr, BIAS: tl.constexpr):
    """The scales that are common to a whole sum, and the bias."""
    result = total.to(tl.float32)
    if KIND == _INT8:
        result *= tl.load(x_scales + row)[:, None] * tl.load(scales + own)[None, :]
    elif KIND == _INT8_WEIGHT_ONLY:
        result *= tl.load(scales + own)[None, :]
    elif KIND == _FP4:
        result *= tl.load(row_scales + own)[None, :]
    if BIAS:
        result += tl.load(bias + own).to(tl.float32)[None, :]
    return result


def _launch(
    kind: tl.constexpr,
    x: Tensor,
    dtype: torch.dtype,
    weight: QuantizedWeight | Int4Weight | Fp4Words,
    bias: Tensor | None,
    silu_mul: bool,
    residual: Tensor | None = None,
    x_scales: Tensor | None = None,
) -> Tensor:
    """x [T, K] as the kernel multiplies it, in int8 with scales [T] -> [T, N or N / 2] of `dtype`."""
    (rows, k), outputs = x.shape, weight.shape[0]
    n = outputs // 2 if silu_mul else outputs
    y = torch.empty((rows, n), dtype=dtype, device=x.device)
    if not rows:
        return y
    group, scales, zeros, row_scales = weight.group or 1, weight.scales, None, None
    scale_stride = 0
    if isinstance(weight, Fp4Words):
        row_scales, scale_stride = weight.row_scales, weight.scales.stride(0)
    elif isinstance(weight, Int4Weight):
        zeros, scale_stride = weight.zeros, weight.scales.shape[0]
    in_tf32 = row_scales is not None and x.dtype == torch.float16
    width = 64 if group == NVFP4_GROUP else 128
    chosen = tactic(rows, n, width, group, silu_mul, in_tf32 or x.dtype == torch.float32, multiprocessors(x.device))
    early = overlaps(x.device)
    _linear_kernel[(cdiv(rows, chosen.rows) * cdiv(n, chosen.band),)](
        x,
        x if x_scales is None else x_scales,
        weight.values,
        scales,
        scales if zeros is None else zeros,
        scales if row_scales is None else row_scales,
        x if bias is None else bias,
        x if residual is None else residual,
        y,
        rows,
        n,
        outputs,
        k,
        x.stride(0),
        weight.values.stride(0),
        scale_stride,
        0 if residual is None else residual.stride(0),
        KIND=kind,
        ZEROS=zeros is not None,
        GATED=silu_mul,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        ROWS=chosen.rows,
        BAND=chosen.band,
        WIDTH=chosen.width,
        GROUP=group,
        SPLIT=chosen.split,
        EVEN_K=k % (chosen.split * chosen.width) == 0,
        WIDEN=in_tf32,
        STAGES=chosen.stages,
        NATIVE=has_assembly(x.device),
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        TOGETHER=8,
        EARLY=early,
        num_warps=chosen.warps,
        launch_pdl=early,
    )
    return y


def linear_int8_weight_only(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, silu_mul: bool = False
) -> Tensor:
    return _launch(_INT8_WEIGHT_ONLY, x, x.dtype, weight, bias, silu_mul)


def linear_int8(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    levels, scales = quantize_rows_int8(x)
    return _launch(_INT8, levels, x.dtype, weight, bias, silu_mul, x_scales=scales)


def _fused(
    x: Tensor,
    weight: Words,
    bias: Tensor | None,
    silu_mul: bool,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor:
    if x.shape[0] == 1:
        return one_row(x, weight, bias, silu_mul, norm, eps, residual)
    if widens(x, weight):
        return fused_linear(x, widen(weight, x.dtype), bias, silu_mul, norm, eps, residual)
    if norm is not None:
        x = rms_norm(x, norm, eps)
    return _launch(_FP4 if isinstance(weight, Fp4Words) else _INT4, x, x.dtype, weight, bias, silu_mul, residual)


def fused_linear_int4(
    x: Tensor,
    weight: QuantizedWeight | Int4Weight,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    return _fused(x, int4_words(weight), bias, silu_mul, norm, eps, residual)


def linear_int4_weight_only(
    x: Tensor, weight: QuantizedWeight | Int4Weight, bias: Tensor | None = None, silu_mul: bool = False
) -> Tensor:
    return fused_linear_int4(x, weight, bias, silu_mul)


def fused_linear_fp4(
    x: Tensor,
    weight: Fp4Weight | Fp4Words,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    return _fused(x, fp4_words(weight), bias, silu_mul, norm, eps, residual)


def linear_fp4(x: Tensor, weight: Fp4Weight | Fp4Words, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    return fused_linear_fp4(x, weight, bias, silu_mul)
