"""Linear layers of bfloat16, float16, float32 and FP8 weights, with the norm before and the residual behind them.

One row of x is bound by reading the weight: `_vector_kernel` streams it past the row, which it norms on the way. More
rows go to cuBLAS, through torch, which was the faster on an H200 from 4 rows on. In FP8, rows are quantized together
with their norm; up to BAND_ROWS of them are multiplied in `_bands_kernel`, more in cuBLAS, or, where scales belong to
blocks, in `_tiles_kernel`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.activations import silu_mul as _silu_mul
from skyline.kernels.triton.device import capability, overlaps, shared_memory
from skyline.kernels.triton.knobs import current
from skyline.kernels.triton.norms import rms_norm
from skyline.ops.attention import FP8_MAX
from skyline.ops.fp8 import BLOCK, FP8, Fp8Weight

BAND_ROWS = 64


class Tactic(NamedTuple):
    """How a weight is read: rows of it (of gate and of up each) and columns a tile, warps, stages of the pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int = 1


def vector_tactic(k: int, gated: bool, blocks: bool) -> Tactic:
    """For one row of x, results of k products each; blocks: of weights that have a scale a block."""
    if blocks:
        return Tactic(16, BLOCK, 4)
    rows, columns, warps = current().gated if gated else current().vector
    return Tactic(rows, min(triton.next_power_of_2(k), columns), warps)


def band_tactic(rows: int, gated: bool, blocks: bool, shared: int) -> Tactic:
    """For a few rows of x and weights of FP8."""
    band, columns, warps, stages = current().bands
    columns = BLOCK if blocks else columns
    tile = ((2 if gated else 1) * band + max(16, rows)) * columns
    return Tactic(band, columns, warps, max(2, min(stages, (shared - 8192) // tile)))


@triton.jit
def _ask(at, mask):
    """Bring lines of memory into the second-level cache."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r",
        [at.to(tl.int64, bitcast=True), mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _vector_kernel(
    x,  # [K]
    weight,  # [N, K]
    scales,  # of FP8: [N], or [ceil(N / 128), ceil(K / 128)]
    bias,  # [N]
    norm,  # [K]
    residual,  # [columns of y]
    y,  # [N], or [N / 2]
    n,  # columns of y
    k,
    weight_stride,
    scale_columns,
    eps,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALES: tl.constexpr,  # 0: none, 1: by row, 2: by block, which STEP divides
    BAND: tl.constexpr,
    STEP: tl.constexpr,
    AHEAD: tl.constexpr,  # columns beyond the first tile to ask for, a power of two, or 0
    EARLY: tl.constexpr,
):
    own = tl.program_id(0) * BAND + tl.arange(0, BAND)
    inside = own < n
    safe = tl.where(inside, own, 0)
    steps = tl.arange(0, STEP)
    gate_at = weight + safe.to(tl.int64)[:, None] * weight_stride + steps[None, :]
    up_at = gate_at + n * weight_stride.to(tl.int64) if GATED else gate_at
    gate = tl.zeros((BAND, STEP), tl.float32)
    up = tl.zeros((BAND, STEP), tl.float32)
    squares = tl.zeros((STEP,), tl.float32)
    # Of all inputs the weight alone is there before the launch before this one has ended: begin with it.
    left = (steps < k)[None, :]
    part = tl.load(gate_at, mask=left, other=0.0)
    other = tl.load(up_at, mask=left, other=0.0) if GATED else part
    if EARLY and AHEAD:
        LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # numbers in 128 bytes
        lines = STEP + tl.arange(0, AHEAD // LINE) * LINE
        ahead = weight + safe.to(tl.int64)[:, None] * weight_stride + lines[None, :]
        wanted = inside[:, None] & (lines < k)[None, :]
        _ask(ahead, wanted)
        if GATED:
            _ask(ahead + n * weight_stride.to(tl.int64), wanted)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    for first in range(0, k, STEP):
        there = first + steps < k
        values = tl.load(x + first + steps, mask=there, other=0.0).to(tl.float32)
        if NORM:
            squares += values * values
            values *= tl.load(norm + first + steps, mask=there, other=0.0).to(tl.float32)
        mine, theirs = part.to(tl.float32), other.to(tl.float32)
        left = (first + STEP + steps < k)[None, :]
        part = tl.load(gate_at + first + STEP, mask=left, other=0.0)
        if GATED:
            other = tl.load(up_at + first + STEP, mask=left, other=0.0)
        if SCALES == 2:
            at = first // 128
            mine *= tl.load(scales + (safe // 128) * scale_columns + at)[:, None]
            if GATED:
                theirs *= tl.load(scales + ((safe + n) // 128) * scale_columns + at)[:, None]
        gate += mine * values[None, :]
        if GATED:
            up += theirs * values[None, :]
    result, second = tl.sum(gate, 1), tl.sum(up, 1)
    if NORM:
        root = tl.rsqrt(tl.sum(squares, 0) / k + eps)
        result *= root
        second *= root
    if SCALES == 1:
        result *= tl.load(scales + safe)
        if GATED:
            second *= tl.load(scales + n + safe)
    if BIAS:
        result += tl.load(bias + safe).to(tl.float32)
        if GATED:
            second += tl.load(bias + n + safe).to(tl.float32)
    if GATED:
        result = result * tl.sigmoid(result) * second
    if RESIDUAL:
        result += tl.load(residual + safe).to(tl.float32)
    tl.store(y + own, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _bands_kernel(
    x,  # [T, K] float8_e4m3fn
    x_scales,  # [T, 1], or [T, ceil(K / 128)]
    weight,  # [N, K] float8_e4m3fn
    scales,  # [N], or [ceil(N / 128), ceil(K / 128)]
    bias,  # [N]
    residual,  # [T, columns of y]
    y,  # [T, N], or [T, N / 2]
    rows,
    n,  # columns of y
    k,
    groups,  # ceil(K / 128)
    residual_stride,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,  # of x, padded
    BAND: tl.constexpr,
    STEP: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    # The weight's rows are those of the product: its matrix units take 64 of them at least, and x may have few.
    own = tl.program_id(0) * BAND + tl.arange(0, BAND)
    inside = own < n
    safe = tl.where(inside, own, 0)
    row = tl.arange(0, ROWS)
    safe_row = tl.where(row < rows, row, 0)
    steps = tl.arange(0, STEP)
    x_at = x + safe_row[None, :] * k + steps[:, None]
    gate_at = weight + safe.to(tl.int64)[:, None] * k + steps[None, :]
    up_at = gate_at + n.to(tl.int64) * k if GATED else gate_at
    gate = tl.zeros((BAND, ROWS), tl.float32)
    up = tl.zeros((BAND, ROWS), tl.float32)
    if EARLY and AHEAD:  # as in _vector_kernel
        lines = tl.arange(0, AHEAD // 128) * 128
        ahead = weight + safe.to(tl.int64)[:, None] * k + lines[None, :]
        wanted = inside[:, None] & (lines < k)[None, :]
        _ask(ahead, wanted)
        if GATED:
            _ask(ahead + n.to(tl.int64) * k, wanted)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    for first in range(0, k, STEP):
        if EVEN_K:
            values, part = tl.load(x_at + first), tl.load(gate_at + first)
            other = tl.load(up_at + first) if GATED else part
        else:
            left = first + steps < k
            values = tl.load(x_at + first, mask=left[:, None], other=0.0)
            part = tl.load(gate_at + first, mask=left[None, :], other=0.0)
            other = tl.load(up_at + first, mask=left[None, :], other=0.0) if GATED else part
        if BLOCKS:
            at = first // 128
            theirs = tl.load(x_scales + safe_row * groups + at)[None, :]
            mine = tl.load(scales + (safe // 128) * groups + at)[:, None]
            gate += tl.dot(part, values) * (mine * theirs)
            if GATED:
                mine = tl.load(scales + ((safe + n) // 128) * groups + at)[:, None]
                up += tl.dot(other, values) * (mine * theirs)
        else:
            gate = tl.dot(part, values, gate)
            if GATED:
                up = tl.dot(other, values, up)
    if not BLOCKS:
        theirs = tl.load(x_scales + safe_row)[None, :]
        gate *= tl.load(scales + safe)[:, None] * theirs
        if GATED:
            up *= tl.load(scales + n + safe)[:, None] * theirs
    if BIAS:
        gate += tl.load(bias + safe).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(bias + n + safe).to(tl.float32)[:, None]
    if GATED:
        gate = gate * tl.sigmoid(gate) * up
    writes = inside[:, None] & (row < rows)[None, :]
    if RESIDUAL:
        at = safe_row.to(tl.int64)[None, :] * residual_stride + own[:, None]
        gate += tl.load(residual + at, mask=writes, other=0.0).to(tl.float32)
    tl.store(y + row.to(tl.int64)[None, :] * n + own[:, None], gate.to(y.dtype.element_ty), mask=writes)


@triton.jit
def _quantize_kernel(
    x,  # [T, K]
    norm,  # [K]
    values,  # [T, K] float8_e4m3fn
    scales,  # [T, 1], or [T, ceil(K / 128)]
    k,
    x_stride,
    groups,
    eps,
    MAX: tl.constexpr,
    NORM: tl.constexpr,
    GROUPS: tl.constexpr,  # of 128 that a row has, a power of two; 1 and all of K without blocks
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    columns = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    left = columns < k
    wide = tl.load(x + row * x_stride + columns, mask=left, other=0.0).to(tl.float32)
    if NORM:
        root = tl.rsqrt(tl.sum(tl.sum(wide * wide, 1), 0) / k + eps)
        wide *= root * tl.load(norm + columns, mask=left, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(wide), 1)
    scale = tl.where(largest > 0, largest / MAX, 1.0)
    tl.store(values + row * k + columns, (wide / scale[:, None]).to(values.dtype.element_ty), mask=left)
    tl.store(scales + row * groups + group, scale, mask=group < groups)


def quantize_rows(
    x: Tensor, blocks: bool = False, norm: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """x [T, K], normed by rms_norm if there is `norm` [K], in FP8 [T, K] and its scales float32.

    Scales are [T, 1], or, with blocks, [T, ceil(K / 128)] of each 128 neighbours.
    """
    rows, k = x.shape
    groups = triton.cdiv(k, BLOCK) if blocks else 1
    values = torch.empty((rows, k), dtype=FP8, device=x.device)
    scales = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    early = overlaps(x.device)
    size = triton.next_power_of_2(k)
    _quantize_kernel[(rows,)](
        x,
        x if norm is None else norm,
        values,
        scales,
        k,
        x.stride(0),
        groups,
        eps,
        MAX=FP8_MAX,
        NORM=norm is not None,
        GROUPS=triton.next_power_of_2(groups),
        GROUP=BLOCK if blocks else size,
        EARLY=early,
        num_warps=max(1, min(16, size // 512)),
        launch_pdl=early,
    )
    return values, scales


@triton.jit(do_not_specialize=["rows"])
def _tiles_kernel(
    x,  # [T, K] float8_e4m3fn
    x_scales,  # [T, 1] or [T, ceil(K / 128)]
    weight,  # [N, K] float8_e4m3fn
    scales,  # [N] or [ceil(N / 128), ceil(K / 128)]
    y,  # [T, N] float32 or as x was
    rows,
    n,
    k,
    groups,
    BLOCKS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    BAND: tl.constexpr,
    STEP: tl.constexpr,  # 128 with blocks
    TOGETHER: tl.constexpr,  # tiles of rows that go by before the next band of the weight is read
):
    program = tl.program_id(0)
    row_tiles, bands = tl.cdiv(rows, ROWS), tl.cdiv(n, BAND)
    group = program // (TOGETHER * bands)
    height = tl.minimum(row_tiles - group * TOGETHER, TOGETHER)
    tile = group * TOGETHER + program % (TOGETHER * bands) % height
    band = program % (TOGETHER * bands) // height
    row = tile * ROWS + tl.arange(0, ROWS)
    own = band * BAND + tl.arange(0, BAND)
    steps = tl.arange(0, STEP)
    safe_row, safe = tl.where(row < rows, row, 0), tl.where(own < n, own, 0)
    x_at = x + safe_row.to(tl.int64)[:, None] * k + steps[None, :]
    weight_at = weight + safe.to(tl.int64)[None, :] * k + steps[:, None]
    total = tl.zeros((ROWS, BAND), tl.float32)
    for first in range(0, k, STEP):
        if EVEN_K:
            a, b = tl.load(x_at + first), tl.load(weight_at + first)
        else:
            left = first + steps < k
            a = tl.load(x_at + first, mask=left[None, :], other=0.0)
            b = tl.load(weight_at + first, mask=left[:, None], other=0.0)
        if BLOCKS:
            at = first // 128
            mine = tl.load(x_scales + safe_row * groups + at)
            theirs = tl.load(scales + (safe // 128) * groups + at)
            total += tl.dot(a, b) * (mine[:, None] * theirs[None, :])
        else:
            total = tl.dot(a, b, total)
    if not BLOCKS:
        total *= tl.load(x_scales + safe_row)[:, None] * tl.load(scales + safe)[None, :]
    at = row.to(tl.int64)[:, None] * n + own[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (own < n)[None, :])


def _tiles(values: Tensor, x_scales: Tensor, weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """x [T, K] @ weight.T of x in FP8 with scales as `quantize_rows` makes them -> [T, N]."""
    (rows, k), n = values.shape, weight.shape[0]
    rowwise = not weight.blocks and values.is_cuda and capability(values.device) >= (9, 0)
    if rowwise and n % 16 == 0 and k % 16 == 0 and dtype == torch.bfloat16:
        scales = weight.scales.view(1, -1)
        return torch._scaled_mm(values, weight.values.t(), x_scales, scales, out_dtype=dtype, use_fast_accum=True)
    y = torch.empty((rows, n), dtype=dtype, device=values.device)
    grid = (triton.cdiv(rows, 128) * triton.cdiv(n, 128),)
    _tiles_kernel[grid](
        values,
        x_scales,
        weight.values,
        weight.scales,
        y,
        rows,
        n,
        k,
        triton.cdiv(k, BLOCK),
        BLOCKS=weight.blocks,
        EVEN_K=k % BLOCK == 0,
        ROWS=128,
        BAND=128,
        STEP=BLOCK,
        TOGETHER=8,
        num_warps=8,
        num_stages=3 if shared_memory(values.device) > 110_000 else 2,
    )
    return y


def _vector(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    silu_mul: bool,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    chosen: Tactic | None = None,
) -> Tensor:
    """Of one row of x, [1, K], and a weight of any dtype."""
    k, outputs = x.shape[1], weight.shape[0]
    n = outputs // 2 if silu_mul else outputs
    y = torch.empty((1, n), dtype=x.dtype, device=x.device)
    kind = 0 if scales is None else scales.dim()
    chosen = chosen or vector_tactic(k, silu_mul, kind == 2)
    early = overlaps(x.device)
    _vector_kernel[(triton.cdiv(n, chosen.rows),)](
        x,
        weight,
        x if scales is None else scales,
        x if bias is None else bias,
        x if norm is None else norm,
        x if residual is None else residual,
        y,
        n,
        k,
        weight.stride(0),
        scales.shape[1] if kind == 2 and scales is not None else 0,
        eps,
        GATED=silu_mul,
        BIAS=bias is not None,
        NORM=norm is not None,
        RESIDUAL=residual is not None,
        SCALES=kind,
        BAND=chosen.rows,
        STEP=chosen.columns,
        AHEAD=_ahead(k),
        EARLY=early,
        num_warps=chosen.warps,
        launch_pdl=early,
    )
    return y


def _ahead(k: int) -> int:
    """Columns to ask for ahead; at least a line."""
    columns: int = min(current().prefetch, triton.next_power_of_2(k))
    return columns // BLOCK * BLOCK


def _bands(
    values: Tensor,
    x_scales: Tensor,
    weight: Fp8Weight,
    dtype: torch.dtype,
    bias: Tensor | None,
    silu_mul: bool,
    residual: Tensor | None,
    chosen: Tactic | None = None,
) -> Tensor:
    """Of a few rows of x in FP8."""
    (rows, k), outputs = values.shape, weight.shape[0]
    n = outputs // 2 if silu_mul else outputs
    y = torch.empty((rows, n), dtype=dtype, device=values.device)
    chosen = chosen or band_tactic(rows, silu_mul, weight.blocks, shared_memory(values.device))
    early = overlaps(values.device)
    _bands_kernel[(triton.cdiv(n, chosen.rows),)](
        values,
        x_scales,
        weight.values,
        weight.scales,
        y if bias is None else bias,
        y if residual is None else residual,
        y,
        rows,
        n,
        k,
        triton.cdiv(k, BLOCK),
        0 if residual is None else residual.stride(0),
        GATED=silu_mul,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        BLOCKS=weight.blocks,
        EVEN_K=k % chosen.columns == 0,
        ROWS=max(16, triton.next_power_of_2(rows)),
        BAND=chosen.rows,
        STEP=chosen.columns,
        AHEAD=_ahead(k),
        EARLY=early,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        launch_pdl=early,
    )
    return y


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    if x.shape[0] == 1:
        return _vector(x, weight, None, bias, silu_mul, norm, eps, residual)
    if norm is not None:
        x = rms_norm(x, norm, eps)
    if residual is not None and bias is None and not silu_mul:
        return torch.addmm(residual, x, weight.t())
    return _finish(F.linear(x, weight, bias), None, silu_mul, residual)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    return fused_linear(x, weight, bias, silu_mul)


def fused_linear_fp8(
    x: Tensor,
    weight: Fp8Weight,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    rows = x.shape[0]
    if rows == 1 and (weight.blocks or not current().one_row_bands):
        return _vector(x, weight.values, weight.scales, bias, silu_mul, norm, eps, residual)
    if rows == 0:
        return x.new_empty((0, weight.shape[0] // 2 if silu_mul else weight.shape[0]))
    values, scales = quantize_rows(x, weight.blocks, norm, eps)
    if rows <= BAND_ROWS:
        return _bands(values, scales, weight, x.dtype, bias, silu_mul, residual)
    return _finish(_tiles(values, scales, weight, x.dtype), bias, silu_mul, residual)


def linear_fp8(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    return fused_linear_fp8(x, weight, bias, silu_mul)


def _finish(y: Tensor, bias: Tensor | None, silu_mul: bool, residual: Tensor | None) -> Tensor:
    if bias is not None:
        y = y + bias
    if silu_mul:
        y = _silu_mul(y)
    return y if residual is None else y + residual
