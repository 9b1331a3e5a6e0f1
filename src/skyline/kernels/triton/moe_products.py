"""Products of the rows of each expert with its matrix, in tiles, for every format that experts have.

moe_tiles.py tells which rows a program has; moe.py and moe_bytes.py make experts of the products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.device import has_assembly, overlaps, shared_memory
from skyline.kernels.triton.four_bits import a_byte, fp4_factors, fp4_numbers, int4_numbers, int4_scales
from skyline.kernels.triton.layouts import Fp4Words, Int4Weight, Words
from skyline.kernels.triton.linear_kernels import tile_and_band
from skyline.kernels.triton.moe_tiles import Groups, rows_of
from skyline.kernels.triton.sizes import cdiv, next_power_of_2
from skyline.ops import Fp8Weight, QuantizedWeight

_TOGETHER = 8  # as in `tile_and_band`

# What scales there are, of x's rows R and of the weight's N (2 N if GATED):
#   by row         FP8 and int8: x_scales [R], scales [E, N]
#   by block       FP8: x_scales [R, ceil(K / 128)], scales [E, ceil(N / 128), ceil(K / 128)]; STEP is 128
#   weight by row  int8, of the weight alone: scales [E, N]
#   FP4            scales [E, N, scale_stride] uint8, more [E, N], the rows' scales
#   int4           scales and more, the zero points, [E, groups, N] float16
_PLAIN, _BY_ROW, _BY_BLOCK, _WEIGHT_BY_ROW, _FP4, _INT4 = (tl.constexpr(kind) for kind in range(6))


@triton.jit
def activated(gate, up, alpha, limit, CLAMPED: tl.constexpr):
    """silu(gate) * up, or clamped as skyline.ops.moe_experts_clamped defines it."""
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return gate * tl.sigmoid(alpha * gate) * (up + 1.0)
    else:
        return gate * tl.sigmoid(gate) * up


@triton.jit
def _grouped_kernel(
    x,  # [rows // DIVISOR, K]
    weight,  # [E, N, K], or [E, 2 N, K] if GATED, gate rows first or last; words of eight, if they have four bits
    bias,  # [E, N or 2 N], contiguous, or unused
    x_scales,  # as KIND says
    scales,
    more,
    y,  # [rows, N], contiguous
    index,
    order,
    tiles,
    pairs,
    experts,
    capacity,
    n,
    k,
    x_stride,
    expert_stride,
    weight_stride,
    scale_stride,
    alpha,
    limit,
    LAYOUT: tl.constexpr,
    ORDER: tl.constexpr,
    INDEX: tl.constexpr,  # pairs of the layout "ids", else experts, padded
    DIVISOR: tl.constexpr,  # so many rows of y belong to one of x
    GATED: tl.constexpr,  # the result is the activation, clamped if there is a bias
    UP_FIRST: tl.constexpr,
    BIAS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,  # neighbours that share a scale, of FP4 and int4
    ZEROS: tl.constexpr,  # int4 with zero points
    WIDEN: tl.constexpr,  # float16 times FP4 in tf32, which holds both: float16 has not the range of the scales
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    BAND: tl.constexpr,
    STEP: tl.constexpr,
    TOGETHER: tl.constexpr,
    NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    WIDTH: tl.constexpr = BAND // 2 if GATED else BAND
    tile, band = tile_and_band(tiles, tl.cdiv(n, WIDTH), TOGETHER)
    expert, row, count, room = rows_of(tile, index, order, pairs, experts, capacity, LAYOUT, ORDER, ROWS, INDEX)
    if room <= 0:
        return
    FILL: tl.constexpr = LAYOUT == "counts" and not GATED
    if not FILL and count <= 0:
        return
    there = tl.arange(0, ROWS) < count
    each = tl.arange(0, BAND)
    # Gate and up rows alternate, so that one product yields both, next to each other in a thread's registers.
    own = band * WIDTH + each // 2 if GATED else band * WIDTH + each
    safe = tl.where(own < n, own, 0)
    if GATED:
        safe += (1 - each % 2 if UP_FIRST else each % 2) * n
    steps = tl.arange(0, STEP)
    x_row = (row // DIVISOR).to(tl.int64)
    x_at = x + x_row[:, None] * x_stride + steps[None, :]
    matrix_rows = 2 * n if GATED else n
    weight_row = expert.to(tl.int64) * matrix_rows + safe
    row_at = weight + expert.to(tl.int64) * expert_stride + safe.to(tl.int64) * weight_stride
    words = tl.arange(0, STEP // 8)
    if KIND == _FP4:
        scale_at = scales + weight_row[:, None] * scale_stride + tl.arange(0, STEP // GROUP)[None, :]
    elif KIND == _INT4:
        groups = tl.cdiv(k, GROUP)
        scale_at = expert.to(tl.int64) * groups * matrix_rows + safe
        byte = a_byte(weight, BAND, NATIVE)
    if KIND >= _FP4:
        weight_at = row_at[:, None] + words[None, :]
    else:
        weight_at = row_at[None, :] + steps[:, None]
    IN_INTEGERS: tl.constexpr = KIND == _BY_ROW and weight.dtype.element_ty == tl.int8
    total = tl.zeros((ROWS, BAND), tl.int32 if IN_INTEGERS else tl.float32)
    columns = tl.where(count > 0, k, 0)
    for first in range(0, columns, STEP):
        left = first + steps < k
        if EVEN_K:
            a = tl.load(x_at + first, mask=there[:, None], other=0.0)
        else:
            a = tl.load(x_at + first, mask=there[:, None] & left[None, :], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
        if EVEN_K:
            b = tl.load(weight_at + (first // 8 if KIND >= _FP4 else first))
        elif KIND >= _FP4:
            b = tl.load(weight_at + first // 8, mask=(first // 8 + words < weight_stride)[None, :], other=0)
        else:
            b = tl.load(weight_at + first, mask=left[:, None], other=0.0)
        if KIND == _FP4:
            # Rows of scales are as long as all steps ask for: without a mask, whole words of them are copied ahead.
            factors = fp4_factors(tl.load(scale_at + first // GROUP), GROUP)
            numbers = fp4_numbers(b, factors, NATIVE and a.dtype == tl.bfloat16, a.dtype)
            total = tl.dot(a, tl.trans(numbers), total, input_precision=PRECISION)
        elif KIND == _INT4:
            part = first // GROUP + tl.arange(0, STEP // GROUP)
            parts_at = scale_at[:, None] + part.to(tl.int64)[None, :] * matrix_rows
            known = (part < groups)[None, :]
            scale, zero = int4_scales(scales, more, parts_at, known, ZEROS)
            numbers = int4_numbers(b, byte, scale, zero, NATIVE, a.dtype)
            total = tl.dot(a, tl.trans(numbers), total, input_precision=PRECISION)
        elif KIND == _BY_BLOCK:
            blocks = tl.cdiv(k, 128)
            mine = tl.load(x_scales + x_row * blocks + first // 128, mask=there, other=0.0)
            block_row = expert.to(tl.int64) * tl.cdiv(matrix_rows, 128) + safe // 128
            theirs = tl.load(scales + block_row * blocks + first // 128)
            total += tl.dot(a, b) * (mine[:, None] * theirs[None, :])
        else:
            if KIND == _WEIGHT_BY_ROW:
                b = b.to(tl.float32).to(a.dtype)
            total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
    if KIND == _BY_ROW:
        mine = tl.load(x_scales + x_row, mask=there, other=0.0)
        total = total.to(tl.float32) * (mine[:, None] * tl.load(scales + weight_row)[None, :])
    elif KIND == _WEIGHT_BY_ROW:
        total *= tl.load(scales + weight_row)[None, :]
    elif KIND == _FP4:
        total *= tl.load(more + weight_row)[None, :]
    if BIAS:
        biases = bias + expert.to(tl.int64) * matrix_rows
        total += tl.load(biases + safe).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(total, (ROWS, WIDTH, 2)))
        total = activated(gate, up, alpha, limit, BIAS)
    if FILL:
        total = tl.where(there[:, None], total, 0.0)
        there = tl.arange(0, ROWS) < room
    column = band * WIDTH + tl.arange(0, WIDTH)
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=there[:, None] & (column < n)[None, :])


class Quantized(NamedTuple):
    """Rows of x as bytes: values [rows, K], and their scales as the weight's KIND has them."""

    values: Tensor
    scales: Tensor


Weight = Tensor | Fp8Weight | QuantizedWeight | Words


def product(
    x: Tensor | Quantized,
    weight: Weight,
    groups: Groups,
    divisor: int,
    gated: bool,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    alpha: float = 0.0,
    limit: float = 0.0,
    up_first: bool = False,
) -> Tensor:
    """Each row's expert's matrix [N, K], or [2 N, K] if gated, times the row, activated if gated: [groups.rows, N].

    x [rows // divisor, K], weight [E, N, K]. FP8 and int8 want x quantized by rows, or as the weight has its scales;
    int8 also takes it as it is. dtype: of the result. up_first: if gated, gate's rows are the last ones.
    """
    rows, mine = (x.values, x.scales) if isinstance(x, Quantized) else (x, None)
    values = weight if isinstance(weight, Tensor) else weight.values
    theirs = more = None
    kind, group = _PLAIN, 0
    if isinstance(weight, Fp4Words):
        kind, group, theirs, more = _FP4, weight.group, weight.scales, weight.row_scales
    elif isinstance(weight, Int4Weight):
        kind, group, theirs, more = _INT4, weight.group, weight.scales, weight.zeros
    elif not isinstance(weight, Tensor):
        theirs = weight.scales
        kind = _WEIGHT_BY_ROW if mine is None else _BY_BLOCK if theirs.dim() == 3 else _BY_ROW
    n, k = weight.shape[1] // 2 if gated else weight.shape[1], weight.shape[2]
    y = torch.empty((groups.rows, n), dtype=dtype, device=rows.device)
    tile = groups.tile
    step = tile.columns
    if kind in (_PLAIN, _WEIGHT_BY_ROW, _FP4, _INT4):
        step = min(tile.columns, next_power_of_2(k))
        while step > 64 and k % step and kind not in (_FP4, _INT4):
            step //= 2
        step = max(group, 16, step)
    stage = (tile.rows + tile.band) * step * rows.element_size()
    early = overlaps(rows.device)
    grid = (groups.tiles * cdiv(n, tile.band // 2 if gated else tile.band),)
    _grouped_kernel[grid](
        rows,
        values,
        rows if bias is None else bias,
        rows if mine is None else mine,
        rows if theirs is None else theirs,
        rows if more is None else more,
        y,
        groups.where,
        groups.where if groups.order is None else groups.order,
        groups.tiles,
        groups.rows,
        groups.experts,
        groups.capacity,
        n,
        k,
        rows.stride(0),
        values.stride(0),
        values.stride(1),
        theirs.stride(1) if theirs is not None and kind == _FP4 else 0,
        alpha,
        limit,
        LAYOUT=groups.layout,
        ORDER=groups.order is not None,
        INDEX=next_power_of_2(groups.rows if groups.layout == "ids" else groups.experts),
        DIVISOR=divisor,
        GATED=gated,
        UP_FIRST=up_first,
        BIAS=bias is not None,
        KIND=kind,
        GROUP=group,
        ZEROS=bool(kind == _INT4 and more is not None),
        WIDEN=bool(kind == _FP4 and rows.dtype == torch.float16),
        EVEN_K=k % step == 0,
        ROWS=tile.rows,
        BAND=tile.band,
        STEP=step,
        TOGETHER=_TOGETHER,
        NATIVE=has_assembly(rows.device),
        PRECISION="ieee" if rows.dtype == torch.float32 else "tf32",
        EARLY=early,
        launch_pdl=early,
        num_warps=tile.warps,
        num_stages=max(1, min(tile.stages, shared_memory(rows.device) // stage)),
    )
    return y


def grouped_experts(
    x: Tensor,
    groups: Groups,
    gate_up: Weight,
    down: Weight,
    divisor: int = 1,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 0.0,
    limit: float = 0.0,
    up_first: bool = False,
) -> Tensor:
    """The experts on their rows, [groups.rows, H]. Row r is of x's row r // divisor."""
    hidden = product(x, gate_up, groups, divisor, True, x.dtype, gate_up_bias, alpha, limit, up_first)
    return product(hidden, down, groups, 1, False, x.dtype, down_bias)
