"""Linear layers of bfloat16, float16, float32 and FP8 weights, with the norm before and the residual behind them.

One row of x is bound by reading the weight: `vector_kernel`, or `fp8_vector_kernel`, streams it past the row, which it
norms on the way and does not quantize. More rows go to cuBLAS, through torch, which was the faster on an H200 from 4
rows on. In FP8, they are quantized together with their norm; up to BAND_ROWS of them are multiplied in `bands_kernel`,
more in cuBLAS, or, where scales belong to blocks, in `tiles_kernel`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.kernels.triton.activations import silu_mul as _silu_mul
from skyline.kernels.triton.device import capability, has_assembly, overlaps, reads_whole, shared_memory
from skyline.kernels.triton.knobs import current
from skyline.kernels.triton.linear_kernels import (
    bands_kernel,
    fp8_vector_kernel,
    quantize_kernel,
    tiles_kernel,
    vector_kernel,
)
from skyline.kernels.triton.norms import rms_norm
from skyline.kernels.triton.sizes import cdiv, next_power_of_2
from skyline.kernels.triton.thresholds import BAND_ROWS, in_words
from skyline.ops.attention import FP8_MAX
from skyline.ops.fp8 import BLOCK, FP8, Fp8Weight


class Tactic(NamedTuple):
    """How a weight is read: rows of it (of gate and of up each) and columns a tile, warps, stages of the pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int = 1


def vector_tactic(k: int, gated: bool) -> Tactic:
    """For one row of x, results of k products each."""
    rows, columns, warps = current().gated if gated else current().vector
    return Tactic(rows, min(next_power_of_2(k), columns), warps)


def fp8_vector_tactic(k: int, gated: bool, normed: bool) -> Tactic:
    """The same of an FP8 weight."""
    knobs = current()
    rows, columns, warps = knobs.fp8_gated if gated else knobs.fp8_normed if normed else knobs.fp8_vector
    return Tactic(rows, min(next_power_of_2(k), columns), warps)


def _padded(rows: int) -> int:
    """Rows of x as the matrix units take them."""
    wide: int = next_power_of_2(rows)
    return max(16, wide)


def band_tactic(rows: int, gated: bool, blocks: bool, shared: int) -> Tactic:
    """For a few rows of x and weights of FP8."""
    band, columns, warps, stages = current().bands
    columns = BLOCK if blocks else columns
    tile = ((2 if gated else 1) * band + _padded(rows)) * columns
    return Tactic(band, columns, warps, max(2, min(stages, (shared - 8192) // tile)))


def quantize_rows(
    x: Tensor, blocks: bool = False, norm: Tensor | None = None, eps: float = 0.0, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """x [T, K], normed by rms_norm if there is `norm` [K], in FP8 [T, K] and its scales float32.

    Scales are [T, 1], or, with blocks, [T, ceil(K / 128)] of each 128 neighbours. gated: of x [T, 2 K] silu_mul.
    """
    rows, k = x.shape
    k = k // 2 if gated else k
    groups = cdiv(k, BLOCK) if blocks else 1
    values = torch.empty((rows, k), dtype=FP8, device=x.device)
    scales = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    early = overlaps(x.device)
    size = next_power_of_2(k)
    quantize_kernel[(rows,)](
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
        GATED=gated,
        GROUPS=next_power_of_2(groups),
        GROUP=BLOCK if blocks else size,
        EARLY=early,
        num_warps=max(1, min(16, size // 512)),
        launch_pdl=early,
    )
    return values, scales


def _tiles(values: Tensor, x_scales: Tensor, weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """x [T, K] @ weight.T of x in FP8 with scales as `quantize_rows` makes them -> [T, N]."""
    (rows, k), n = values.shape, weight.shape[0]
    rowwise = not weight.blocks and values.is_cuda and capability(values.device) >= (9, 0)
    if rowwise and n % 16 == 0 and k % 16 == 0 and dtype == torch.bfloat16:
        scales = weight.scales.view(1, -1)
        return torch._scaled_mm(values, weight.values.t(), x_scales, scales, out_dtype=dtype, use_fast_accum=True)
    y = torch.empty((rows, n), dtype=dtype, device=values.device)
    # Blocks' products are scaled in registers; there, 368 bytes a thread of 128 rows did not fit.
    tile = 64 if weight.blocks and capability(values.device)[0] == 10 else 128
    grid = (cdiv(rows, tile) * cdiv(n, 128),)
    tiles_kernel[grid](
        values,
        x_scales,
        weight.values,
        weight.scales,
        y,
        rows,
        n,
        k,
        cdiv(k, BLOCK),
        BLOCKS=weight.blocks,
        EVEN_K=k % BLOCK == 0,
        ROWS=tile,
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
    bias: Tensor | None,
    silu_mul: bool,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    chosen: Tactic | None = None,
) -> Tensor:
    """Of one row of x, [1, K]."""
    k, outputs = x.shape[1], weight.shape[0]
    n = outputs // 2 if silu_mul else outputs
    y = x.new_empty((1, n))
    chosen = chosen or vector_tactic(k, silu_mul)
    early = overlaps(x.device)
    vector_kernel[(cdiv(n, chosen.rows),)](
        x,
        weight,
        x if bias is None else bias,
        x if norm is None else norm,
        x if residual is None else residual,
        y,
        n,
        k,
        weight.stride(0),
        eps,
        GATED=silu_mul,
        BIAS=bias is not None,
        NORM=norm is not None,
        RESIDUAL=residual is not None,
        BAND=chosen.rows,
        STEP=chosen.columns,
        EARLY=early,
        num_warps=chosen.warps,
        launch_pdl=early,
    )
    return y


def _fp8_vector(
    x: Tensor,
    weight: Fp8Weight,
    bias: Tensor | None,
    silu_mul: bool,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    chosen: Tactic | None = None,
) -> Tensor:
    """Of one row of x, [1, K], and a weight that is `in_words`."""
    k, outputs = x.shape[1], weight.shape[0]
    n = outputs // 2 if silu_mul else outputs
    y = x.new_empty((1, n))
    chosen = chosen or fp8_vector_tactic(k, silu_mul, norm is not None)
    early = overlaps(x.device)
    fp8_vector_kernel[(cdiv(n, chosen.rows),)](
        x,
        weight.values.view(torch.int32),
        weight.scales,
        x if bias is None else bias,
        x if norm is None else norm,
        x if residual is None else residual,
        y,
        n,
        k // 4,
        weight.scales.shape[1] if weight.blocks else 0,
        eps,
        GATED=silu_mul,
        BIAS=bias is not None,
        NORM=norm is not None,
        RESIDUAL=residual is not None,
        BLOCKS=weight.blocks,
        BAND=chosen.rows,
        STEP=max(1, chosen.columns // 4),
        NATIVE=has_assembly(x.device),
        WHOLE=reads_whole(4, x, x if norm is None else norm),
        EARLY=early,
        num_warps=chosen.warps,
        # Four programs of 128 threads a multiprocessor: all 512 bands of 4,096 rows run at once on a Hopper.
        maxnreg=128 if chosen.warps >= 4 else None,
        launch_pdl=early,
    )
    return y


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
    by_blocks = weight.blocks or x_scales.shape[1] > 1
    chosen = chosen or band_tactic(rows, silu_mul, by_blocks, shared_memory(values.device))
    early = overlaps(values.device)
    bands_kernel[(cdiv(n, chosen.rows),)](
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
        cdiv(k, BLOCK),
        0 if residual is None else residual.stride(0),
        GATED=silu_mul,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        BLOCKS=weight.blocks,
        X_BLOCKS=by_blocks and not weight.blocks,
        EVEN_K=k % chosen.columns == 0,
        ROWS=_padded(rows),
        BAND=chosen.rows,
        STEP=chosen.columns,
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
        return _vector(x, weight, bias, silu_mul, norm, eps, residual)
    if norm is not None:
        x = rms_norm(x, norm, eps)
    if residual is not None and bias is None and not silu_mul:
        return torch.addmm(residual, x, weight.t())
    return finish(F.linear(x, weight, bias), None, silu_mul, residual)


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
    if rows == 1 and in_words(weight, silu_mul):
        return _fp8_vector(x, weight, bias, silu_mul, norm, eps, residual)
    if rows == 0:
        return x.new_empty((0, weight.shape[0] // 2 if silu_mul else weight.shape[0]))
    values, scales = quantize_rows(x, weight.blocks, norm, eps)
    return product_fp8(values, scales, weight, x.dtype, bias, silu_mul, residual)


def product_fp8(
    values: Tensor,
    scales: Tensor,
    weight: Fp8Weight,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """`fused_linear_fp8` of rows that are quantized: values [T, K], scales as of `quantize_rows` -> of `dtype`.

    Up to BAND_ROWS of them may have scales by 128 where the weight has none by blocks; more may not.
    """
    if values.shape[0] <= BAND_ROWS:
        return _bands(values, scales, weight, dtype, bias, silu_mul, residual)
    return finish(_tiles(values, scales, weight, dtype), bias, silu_mul, residual)


def linear_fp8(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    return fused_linear_fp8(x, weight, bias, silu_mul)


def finish(y: Tensor, bias: Tensor | None, silu_mul: bool, residual: Tensor | None) -> Tensor:
    """What comes behind a product y [T, N], each by itself."""
    if bias is not None:
        y = y + bias
    if silu_mul:
        y = _silu_mul(y)
    return y if residual is None else y + residual
