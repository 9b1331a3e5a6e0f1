"""Linear layers and experts of NVFP4 weights times rows in NVFP4, in the matrix units of Blackwell.

Rows are quantized to the same words as weights lie in, so both are in the same order of columns, whatever it is, and
the matrix units multiply them as they lie: nothing is unpacked. Their rows are the weight's, of which they take 128 at
a time, and their columns those of x, of which there may be as few as 16. Few rows go to the kernels for words, and are
not quantized.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.device import multiplies_fp4, overlaps, shared_memory
from skyline.kernels.triton.layouts import NVFP4_LESS, WORD, Fp4Words, fp4_words, row_scales_of, row_words
from skyline.kernels.triton.linear_kernels import tile_and_band
from skyline.kernels.triton.moe import combine, groups_of, moe_experts_fp4
from skyline.kernels.triton.moe_tiles import Groups, Tile, rows_of
from skyline.kernels.triton.quantized import fused_linear_fp4
from skyline.kernels.triton.sizes import cdiv, next_power_of_2
from skyline.ops import Fp4Weight
from skyline.ops.fp4 import NVFP4_GROUP
from skyline.ops.nvfp4 import FEW_ROWS

_BAND = 128  # rows of the weight a program: what the matrix units of data centers' Blackwells take
_TOGETHER = 8  # as in `tile_and_band`
_LESS = tl.constexpr(2.0**-NVFP4_LESS)


@triton.jit
def _quantize_kernel(
    x,  # [T, K]
    norm,  # [K], or unused
    words,  # [T, WORDS] int32
    scales,  # [T, SCALES] uint8, of float8_e4m3fn
    row_scales,  # [T] float32
    k,
    x_stride,
    word_stride,
    scale_stride,
    eps,
    NORM: tl.constexpr,
    GROUPS: tl.constexpr,  # of 16 columns that a row has, a power of two
    SWIZZLED: tl.constexpr,  # how scales lie: as skyline.kernels.flashinfer.layouts.swizzled_places has them
    EARLY: tl.constexpr,
):
    """`skyline.ops.nvfp4.quantize_nvfp4` to the bit; what is behind a row's own columns becomes 0."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, GROUPS)[:, None] * 16 + tl.arange(0, 16)[None, :]
    wide = tl.load(x + row * x_stride + column, mask=column < k, other=0.0).to(tl.float32)
    if NORM:
        root = tl.rsqrt(tl.sum(tl.sum(wide * wide, 1), 0) / k + eps)
        normed = (wide * root).to(x.dtype.element_ty).to(tl.float32)
        weight = tl.load(norm + column, mask=column < k, other=0.0).to(tl.float32)
        wide = (normed * weight).to(x.dtype.element_ty).to(tl.float32)
    broken = tl.max(tl.max((wide != wide).to(tl.int32), 1), 0)
    largest = tl.max(tl.max(tl.abs(wide), 1), 0)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.where(broken > 0, float("inf"), power)
    raised = tl.div_rn(1024.0, power)
    raised = tl.where(raised < float("inf"), raised, 0.0)
    numbers = wide * raised
    scale = tl.div_rn(tl.max(tl.abs(numbers), 1), 6.0).to(tl.float8e4nv)
    factor = scale.to(tl.float32)
    factor = tl.where(factor > 0, factor, float("inf"))  # by which all become 0
    size = tl.abs(tl.div_rn(numbers, tl.broadcast_to(factor[:, None], numbers.shape)))
    codes = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    codes += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    codes += (size > 5.0).to(tl.int32)
    codes += tl.where(numbers < 0, 8, 0)
    eights = tl.reshape(codes, (2 * GROUPS, 8))
    place = tl.arange(0, 8)
    word = tl.sum(eights << (16 * (place % 2) + 4 * (place // 2))[None, :], 1)
    at = tl.arange(0, 2 * GROUPS)
    tl.store(words + row * word_stride + at, word, mask=at < word_stride)
    at = tl.arange(0, GROUPS)
    if SWIZZLED:
        place = (row // 128 * (scale_stride // 4) + at // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + at % 4
    else:
        place = row * scale_stride + at
    tl.store(scales + place, scale.to(tl.uint8, bitcast=True), mask=at < scale_stride)
    tl.store(row_scales + row, power / 1024.0)


class Rows(NamedTuple):
    """Rows [T, k] in NVFP4: words int32 [T, row_words(k)], scales uint8 as of `Fp4Words`, or swizzled; row_scales [T]
    float32 times elements and groups' scales are the numbers.
    """

    words: Tensor
    scales: Tensor
    row_scales: Tensor
    k: int


def quantize_rows(x: Tensor, norm: Tensor | None = None, eps: float = 0.0, swizzled: Tensor | None = None) -> Rows:
    """x [T, K], normed as by rms_norm if there is `norm` [K]. swizzled: where scales are put, if not in rows."""
    rows, k = x.shape
    words = torch.empty((rows, row_words(k)), dtype=torch.int32, device=x.device)
    # Swizzled, there are as many groups as words.
    columns = row_scales_of(k, NVFP4_GROUP) if swizzled is None else words.shape[1] // 2
    scales = swizzled
    if scales is None:
        scales = torch.empty((rows, columns), dtype=torch.uint8, device=x.device)
    row_scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    groups = next_power_of_2(max(cdiv(words.shape[1], 2), columns))
    early = overlaps(x.device)
    _quantize_kernel[(rows,)](
        x,
        x if norm is None else norm,
        words,
        scales,
        row_scales,
        k,
        x.stride(0),
        words.stride(0),
        columns,
        eps,
        NORM=norm is not None,
        GROUPS=groups,
        SWIZZLED=swizzled is not None,
        EARLY=early,
        num_warps=max(1, min(16, groups // 32)),
        launch_pdl=early,
        enable_fp_fusion=False,
    )
    return Rows(words, scales, row_scales, k)


@triton.jit
def _numbers(packed, scale):
    """What the matrix units make of bytes of two elements [R, columns / 2] and scales [R, groups]: float32."""
    low, high = packed & 15, packed >> 4
    codes = tl.reshape(tl.join(low, high), (packed.shape[0], 2 * packed.shape[1])).to(tl.int16)
    # Moved up they are float16, whose exponents are biased by 14 more.
    moved = (((codes & 7) << 9) | ((codes & 8) << 12)).to(tl.float16, bitcast=True)
    groups = tl.reshape(moved.to(tl.float32) * 16384.0, (packed.shape[0], scale.shape[1], 16))
    return tl.reshape(groups * scale.to(tl.float32)[:, :, None], codes.shape)


@triton.jit
def _product_kernel(
    x,  # [rows // DIVISOR, x_stride] uint8, two elements each
    x_scales,  # [.., x_scale_stride] float8_e4m3fn
    x_row_scales,  # [..] float32
    weight,  # [E, N, weight_stride] uint8, or without E; of gate and up rows, gate first, if GATED
    scales,  # [E, N, scale_stride] float8_e4m3fn
    row_scales,  # [E, N] float32
    bias,  # [N], or unused
    residual,  # [rows, n], or unused
    y,  # [rows, n], contiguous
    index,
    order,
    tiles,
    rows,
    experts,
    n,  # columns of y: N, or N / 2
    outputs,  # N
    columns,  # of x and the weight, with what fills up their rows
    x_stride,
    x_scale_stride,
    weight_stride,
    scale_stride,
    residual_stride,
    LAYOUT: tl.constexpr,  # as skyline.kernels.triton.moe_tiles has them; "rows": no experts
    ORDER: tl.constexpr,
    INDEX: tl.constexpr,
    DIVISOR: tl.constexpr,  # so many rows of y belong to one of x
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BAND: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    TOGETHER: tl.constexpr,
    NATIVE: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    WIDTH: tl.constexpr = BAND // 2 if GATED else BAND
    tile, band = tile_and_band(tiles, tl.cdiv(n, WIDTH), TOGETHER)
    if LAYOUT == "rows":
        expert, row, count = 0, tile * ROWS + tl.arange(0, ROWS), rows - tile * ROWS
    else:
        expert, row, count, _ = rows_of(tile, index, order, rows, experts, 0, LAYOUT, ORDER, ROWS, INDEX)
    if count <= 0:
        return
    there = tl.arange(0, ROWS) < count
    x_row = tl.where(there, row // DIVISOR, 0).to(tl.int64)
    each = tl.arange(0, BAND)
    # Gate and up rows alternate, so that one product yields both, next to each other.
    own = band * WIDTH + each // 2 if GATED else band * WIDTH + each
    safe = tl.where(own < n, own, 0)
    if GATED:
        safe += each % 2 * n
    weight_row = (tl.zeros((1,), tl.int64) + expert) * outputs + safe
    pair, group = tl.arange(0, STEP // 2), tl.arange(0, STEP // 16)
    x_at = x + x_row[:, None] * x_stride + pair[None, :]
    x_scale_at = x_scales + x_row[:, None] * x_scale_stride + group[None, :]
    weight_at = weight + weight_row[:, None] * weight_stride + pair[None, :]
    scale_at = scales + weight_row[:, None] * scale_stride + group[None, :]
    total = tl.zeros((BAND, ROWS), tl.float32)
    # Rows are filled up with zeros to a multiple of STEP.
    for first in tl.range(0, columns, STEP, num_stages=STAGES):
        mine = tl.load(weight_at + first // 2)
        my_scale = tl.load(scale_at + first // 16)
        theirs = tl.load(x_at + first // 2)
        their_scale = tl.load(x_scale_at + first // 16)
        if NATIVE:
            total = tl.dot_scaled(mine, my_scale, "e2m1", tl.trans(theirs), their_scale, "e2m1", total)
        else:
            numbers = tl.trans(_numbers(theirs, their_scale))
            total = tl.dot(_numbers(mine, my_scale), numbers, total, input_precision="ieee")
    total *= (tl.load(row_scales + weight_row) * _LESS)[:, None] * tl.load(x_row_scales + x_row)[None, :]
    if BIAS:
        total += tl.load(bias + safe).to(tl.float32)[:, None]
    result = tl.trans(total)
    if GATED:
        gate, up = tl.split(tl.reshape(result, (ROWS, WIDTH, 2)))
        result = gate * tl.sigmoid(gate) * up
    column = band * WIDTH + tl.arange(0, WIDTH)
    writes = there[:, None] & (column < n)[None, :]
    if RESIDUAL:
        at = row.to(tl.int64)[:, None] * residual_stride + column[None, :]
        result += tl.load(residual + at, mask=writes, other=0.0).to(tl.float32)
    tl.store(y + row.to(tl.int64)[:, None] * n + column[None, :], result.to(y.dtype.element_ty), mask=writes)


@triton.jit
def _finish_kernel(
    product,  # [T, N], contiguous
    x_row_scales,  # [T]
    row_scales,  # [N]
    bias,  # [N], or unused
    residual,  # [T, n], or unused
    y,  # [T, n], contiguous
    n,  # N, or N / 2
    outputs,  # N
    residual_stride,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    factor = tl.load(x_row_scales + row)
    result = tl.load(product + row * outputs + column, mask=inside, other=0.0).to(tl.float32)
    result *= factor * tl.load(row_scales + column, mask=inside, other=0.0)
    if BIAS:
        result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(product + row * outputs + n + column, mask=inside, other=0.0).to(tl.float32)
        up *= factor * tl.load(row_scales + n + column, mask=inside, other=0.0)
        if BIAS:
            up += tl.load(bias + n + column, mask=inside, other=0.0).to(tl.float32)
        result = result * tl.sigmoid(result) * up
    if RESIDUAL:
        result += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * n + column, result.to(y.dtype.element_ty), mask=inside)


def finish(
    product: Tensor,
    x_row_scales: Tensor,
    row_scales: Tensor,
    bias: Tensor | None,
    silu_mul: bool,
    residual: Tensor | None,
) -> Tensor:
    """What comes behind a product [T, N] of elements and groups' scales alone: scales of both rows, and the rest."""
    rows, outputs = product.shape
    n = outputs // 2 if silu_mul else outputs
    y = product.new_empty((rows, n))
    block, early = min(1024, next_power_of_2(n)), overlaps(product.device)
    _finish_kernel[(rows, cdiv(n, block))](
        product,
        x_row_scales,
        row_scales,
        product if bias is None else bias,
        product if residual is None else residual,
        y,
        n,
        outputs,
        0 if residual is None else residual.stride(0),
        GATED=silu_mul,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        BLOCK=block,
        EARLY=early,
        launch_pdl=early,
    )
    return y


def _tile(rows: float) -> Tile:
    """For products with so many rows, on average an expert. By what fits, not by measurements."""
    padded = next_power_of_2(int(rows))
    return Tile(max(16, min(128, padded)), _BAND, 256, 4 if rows <= 64 else 8, 4)


def _product(
    rows: Rows,
    weight: Fp4Words,
    tile: Tile,
    gated: bool,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    groups: Groups | None = None,
    divisor: int = 1,
) -> Tensor:
    """Each row times the weight [N, K], or its expert's of [E, N, K], activated if gated -> [rows, N or N / 2]."""
    *_, outputs, _ = weight.shape
    n = outputs // 2 if gated else outputs
    count = rows.words.shape[0] if groups is None else groups.rows
    y = torch.empty((count, n), dtype=dtype, device=rows.words.device)
    columns = rows.words.shape[1] * WORD
    step = tile.columns if columns % tile.columns == 0 else 128
    tiles = cdiv(count, tile.rows) if groups is None else groups.tiles
    where = rows.row_scales if groups is None else groups.where
    stage = (tile.rows + tile.band) * (step // 2 + step // NVFP4_GROUP)
    early = overlaps(y.device)
    _product_kernel[(tiles * cdiv(n, tile.band // 2 if gated else tile.band),)](
        rows.words.view(torch.uint8),
        rows.scales.view(torch.float8_e4m3fn),
        rows.row_scales,
        weight.values.view(torch.uint8),
        weight.scales.view(torch.float8_e4m3fn),
        weight.row_scales,
        y if bias is None else bias,
        y if residual is None else residual,
        y,
        where,
        where if groups is None or groups.order is None else groups.order,
        tiles,
        count,
        1 if groups is None else groups.experts,
        n,
        outputs,
        columns,
        4 * rows.words.stride(0),
        rows.scales.stride(0),
        4 * weight.values.stride(-2),
        weight.scales.stride(-2),
        0 if residual is None else residual.stride(0),
        LAYOUT="rows" if groups is None else groups.layout,
        ORDER=groups is not None and groups.order is not None,
        INDEX=1 if groups is None else next_power_of_2(groups.rows if groups.layout == "ids" else groups.experts),
        DIVISOR=divisor,
        GATED=gated,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        ROWS=tile.rows,
        BAND=tile.band,
        STEP=step,
        STAGES=max(1, min(tile.stages, (shared_memory(y.device) - 8192) // stage)),
        TOGETHER=_TOGETHER,
        NATIVE=multiplies_fp4(y.device),
        EARLY=early,
        num_warps=tile.warps,
        launch_pdl=early,
    )
    return y


def fused_linear_nvfp4(
    x: Tensor,
    weight: Fp4Weight | Fp4Words,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    if x.shape[0] <= FEW_ROWS:
        return fused_linear_fp4(x, weight, bias, silu_mul, norm, eps, residual)
    rows = quantize_rows(x, norm, eps)
    return _product(rows, fp4_words(weight), _tile(x.shape[0]), silu_mul, x.dtype, bias, residual)


def linear_nvfp4(x: Tensor, weight: Fp4Weight | Fp4Words, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    return fused_linear_nvfp4(x, weight, bias, silu_mul)


def moe_experts_nvfp4(
    x: Tensor,
    gate_up: Fp4Weight | Fp4Words,
    down: Fp4Weight | Fp4Words,
    weights: Tensor,
    ids: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    (tokens, top_k), experts = ids.shape, gate_up.shape[0]
    if tokens <= FEW_ROWS:
        return moe_experts_fp4(x, gate_up, down, weights, ids, residual)
    weights, ids = weights.contiguous(), ids.contiguous()
    tile = _tile(max(1.0, tokens * top_k / experts))
    groups = groups_of(ids, experts, tile)
    hidden = _product(quantize_rows(x), fp4_words(gate_up), tile, True, x.dtype, groups=groups, divisor=top_k)
    rows = _product(quantize_rows(hidden), fp4_words(down), tile, False, x.dtype, groups=groups)
    return combine(rows, None, weights, residual)
