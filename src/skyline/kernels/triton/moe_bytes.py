"""Mixtures of experts in FP8 and int8: the launches of skyline.kernels.triton.moe on what is quantized.

One token in FP8: its row, and what the activation makes of it, stay as they are, and weights are read in words of four,
as in linear_kernels.fp8_vector_kernel. Otherwise rows are quantized, with a scale for each 128 neighbours where weights
have blocks, and tiles are products of what comes out; but for int8 of the weight alone, which is widened.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.device import has_assembly, overlaps, reads_whole
from skyline.kernels.triton.knobs import current
from skyline.kernels.triton.linear import quantize_rows
from skyline.kernels.triton.linear_kernels import fours, times_word
from skyline.kernels.triton.moe import combine, groups_of
from skyline.kernels.triton.moe_products import Quantized, Weight, product
from skyline.kernels.triton.moe_tiles import Kind, tile_for
from skyline.kernels.triton.quantized import quantize_rows_int8
from skyline.kernels.triton.sizes import cdiv, next_power_of_2
from skyline.kernels.triton.thresholds import experts_in_words
from skyline.ops import QuantizedWeight
from skyline.ops.fp8 import Fp8Weight


@triton.jit
def _gate_up_kernel(
    x,  # [T, H]
    weight,  # [E, 2 I, H / 4] int32, of float8_e4m3fn, gate rows first or last
    scales,  # [E, 2 I], or [E, ceil(2 I / 128), ceil(H / 128)]
    ids,  # [T * TOP_K]
    y,  # [T * TOP_K, I]
    n,  # I
    words,  # H / 4
    scale_rows,
    scale_columns,
    x_stride,
    TOP_K: tl.constexpr,
    UP_FIRST: tl.constexpr,
    BLOCKS: tl.constexpr,  # then BAND divides n and 128
    BAND: tl.constexpr,
    STEP: tl.constexpr,
    NATIVE: tl.constexpr,
    WHOLE: tl.constexpr,  # of x, as in `fours`
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    pair = tl.program_id(1)
    first_row = tl.program_id(0) * BAND
    own = first_row + tl.arange(0, BAND)
    safe = tl.where(own < n, own, 0)
    steps = tl.arange(0, STEP)
    expert = tl.load(ids + pair)
    gates_at, ups_at = (n, 0) if UP_FIRST else (0, n)
    gate_at = weight + (expert * 2 * n + gates_at + safe)[:, None] * words + steps[None, :]
    up_at = weight + (expert * 2 * n + ups_at + safe)[:, None] * words + steps[None, :]
    x_at = x + (pair // TOP_K).to(tl.int64) * x_stride
    own_scales = scales + expert * scale_rows * scale_columns
    gate = tl.zeros((BAND, STEP), tl.float32)
    up = tl.zeros((BAND, STEP), tl.float32)
    nothing = tl.zeros((BAND, STEP), tl.float32)
    part = tl.load(gate_at, mask=(steps < words)[None, :], other=0)
    other = tl.load(up_at, mask=(steps < words)[None, :], other=0)
    for first in range(0, words, STEP):
        x0, x1, x2, x3 = fours(x_at, first, words, STEP, WHOLE)
        x0, x1, x2, x3 = x0[None, :], x1[None, :], x2[None, :], x3[None, :]
        left = (first + STEP + steps < words)[None, :]
        if BLOCKS:
            at = own_scales + (first + steps) // 32
            there = first + steps < words
            scale = tl.load(at + (gates_at + first_row) // 128 * scale_columns, mask=there, other=0.0)
            gate += times_word(part, x0, x1, x2, x3, nothing, NATIVE) * scale[None, :]
            part = tl.load(gate_at + first + STEP, mask=left, other=0)
            scale = tl.load(at + (ups_at + first_row) // 128 * scale_columns, mask=there, other=0.0)
            up += times_word(other, x0, x1, x2, x3, nothing, NATIVE) * scale[None, :]
        else:
            gate = times_word(part, x0, x1, x2, x3, gate, NATIVE)
            part = tl.load(gate_at + first + STEP, mask=left, other=0)
            up = times_word(other, x0, x1, x2, x3, up, NATIVE)
        other = tl.load(up_at + first + STEP, mask=left, other=0)
    gates, ups = tl.sum(gate, 1), tl.sum(up, 1)
    if not BLOCKS:
        gates *= tl.load(own_scales + gates_at + safe)
        ups *= tl.load(own_scales + ups_at + safe)
    result = gates * tl.sigmoid(gates) * ups
    tl.store(y + pair.to(tl.int64) * n + own, result.to(y.dtype.element_ty), mask=own < n)


@triton.jit
def _down_kernel(
    x,  # [T * TOP_K, I]
    weight,  # [E, H, I / 4] int32, of float8_e4m3fn
    scales,  # [E, H], or [E, ceil(H / 128), ceil(I / 128)]
    weights,  # [T * TOP_K] float32
    ids,  # [T * TOP_K]
    residual,  # [T, H], or unused
    y,  # [T, H]
    n,  # H
    words,  # I / 4
    scale_rows,
    scale_columns,
    residual_stride,
    TOP_K: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCKS: tl.constexpr,  # then BAND divides 128
    BAND: tl.constexpr,
    STEP: tl.constexpr,
    NATIVE: tl.constexpr,
    WHOLE: tl.constexpr,  # of x, as in `fours`
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0) * BAND
    own = first_row + tl.arange(0, BAND)
    safe = tl.where(own < n, own, 0)
    steps = tl.arange(0, STEP)
    rows_at = weight + safe.to(tl.int64)[:, None] * words + steps[None, :]
    sums = tl.zeros((BAND, STEP), tl.float32)
    nothing = tl.zeros((BAND, STEP), tl.float32)
    for choice in range(TOP_K):
        pair = token * TOP_K + choice
        expert = tl.load(ids + pair)
        own_scales = scales + expert * scale_rows * scale_columns
        factor = tl.load(weights + pair)
        if not BLOCKS:
            row_factor = factor * tl.load(own_scales + safe)
        for first in range(0, words, STEP):
            left = first + steps < words
            part = tl.load(rows_at + expert * n * words + first, mask=left[None, :], other=0)
            x0, x1, x2, x3 = fours(x + pair * words * 4, first, words, STEP, WHOLE)
            value = times_word(part, x0[None, :], x1[None, :], x2[None, :], x3[None, :], nothing, NATIVE)
            if BLOCKS:
                at = own_scales + first_row // 128 * scale_columns + (first + steps) // 32
                sums += value * (factor * tl.load(at, mask=left, other=0.0))[None, :]
            else:
                sums += value * row_factor[:, None]
    result = tl.sum(sums, 1)
    if RESIDUAL:
        result += tl.load(residual + token * residual_stride + safe).to(tl.float32)
    tl.store(y + token * n + own, result.to(y.dtype.element_ty), mask=own < n)


def _step(k: int, columns: int) -> int:
    """Words a tile."""
    words: int = min(next_power_of_2(k), columns) // 4
    return max(1, words)


def _grid(weight: Fp8Weight) -> tuple[int, int]:
    """Scales that an expert has: rows and columns."""
    return (weight.scales.shape[1], weight.scales.shape[2]) if weight.blocks else (weight.scales.shape[1], 1)


def _stream(
    x: Tensor,
    gate_up: Fp8Weight,
    down: Fp8Weight,
    weights: Tensor,
    ids: Tensor,
    residual: Tensor | None,
    up_first: bool,
) -> Tensor:
    (tokens, top_k), (_, h, i) = ids.shape, down.shape
    early, native = overlaps(x.device), has_assembly(x.device)
    gate_up_band, down_band, columns, warps = current().experts_fp8
    hidden = x.new_empty((tokens * top_k, i))
    _gate_up_kernel[(cdiv(i, gate_up_band), tokens * top_k)](
        x,
        gate_up.values.view(torch.int32),
        gate_up.scales,
        ids,
        hidden,
        i,
        h // 4,
        *_grid(gate_up),
        x.stride(0),
        TOP_K=top_k,
        UP_FIRST=up_first,
        BLOCKS=gate_up.blocks,
        BAND=gate_up_band,
        STEP=_step(h, columns),
        NATIVE=native,
        WHOLE=reads_whole(4, x),
        EARLY=early,
        num_warps=warps,
        launch_pdl=early,
    )
    y = x.new_empty((tokens, h))
    _down_kernel[(cdiv(h, down_band), tokens)](
        hidden,
        down.values.view(torch.int32),
        down.scales,
        weights,
        ids,
        x if residual is None else residual,
        y,
        h,
        i // 4,
        *_grid(down),
        0 if residual is None else residual.stride(0),
        TOP_K=top_k,
        RESIDUAL=residual is not None,
        BLOCKS=down.blocks,
        BAND=down_band,
        STEP=_step(i, columns),
        NATIVE=native,
        WHOLE=reads_whole(4, hidden),
        EARLY=early,
        num_warps=warps,
        launch_pdl=early,
    )
    return y


def _grouped(
    x: Tensor,
    gate_up: Weight,
    down: Weight,
    weights: Tensor,
    ids: Tensor,
    kind: Kind,
    quantize: Callable[[Tensor, Weight], Tensor | Quantized],
    residual: Tensor | None = None,
    up_first: bool = False,
) -> Tensor:
    """quantize: the rows that a weight is multiplied by, as it wants them."""
    weights, ids = weights.contiguous(), ids.contiguous()
    (tokens, top_k), experts = ids.shape, gate_up.shape[0]
    if tokens == 0:
        return torch.empty_like(x)
    groups = groups_of(ids, experts, tile_for(tokens * top_k, experts, x, kind))
    hidden = product(quantize(x, gate_up), gate_up, groups, top_k, True, x.dtype, up_first=up_first)
    rows = product(quantize(hidden, down), down, groups, 1, False, x.dtype)
    return combine(rows, None, weights, residual)


def moe_experts_fp8(
    x: Tensor,
    gate_up: Fp8Weight,
    down: Fp8Weight,
    weights: Tensor,
    ids: Tensor,
    residual: Tensor | None = None,
    up_first: bool = False,
) -> Tensor:
    """up_first: as of `fused_experts`."""
    if x.shape[0] == 1 and experts_in_words(gate_up, down):
        return _stream(x, gate_up, down, weights.contiguous(), ids.contiguous(), residual, up_first)

    def quantize(rows: Tensor, weight: Weight) -> Quantized:
        assert isinstance(weight, Fp8Weight)
        return Quantized(*quantize_rows(rows, weight.blocks))

    kind: Kind = "blocks" if gate_up.blocks else "bytes"
    return _grouped(x, gate_up, down, weights, ids, kind, quantize, residual, up_first)


def moe_experts_int8(
    x: Tensor, gate_up: QuantizedWeight, down: QuantizedWeight, weights: Tensor, ids: Tensor
) -> Tensor:
    return _grouped(x, gate_up, down, weights, ids, "bytes", lambda rows, _: Quantized(*quantize_rows_int8(rows)))


def moe_experts_int8_weight_only(
    x: Tensor, gate_up: QuantizedWeight, down: QuantizedWeight, weights: Tensor, ids: Tensor
) -> Tensor:
    return _grouped(x, gate_up, down, weights, ids, "plain", lambda rows, _: rows)
