"""FP8 linears of many rows, of weights with a scale for each block; those of few rows are Triton's.

On Hopper DeepGEMM's kernels quantize rows of bfloat16 themselves; on Blackwell CUTLASS's take them in FP8, with a scale
for each 128 numbers of a row. Both take the weight as it lies.
"""

from __future__ import annotations

from typing import cast

import flashinfer.gemm
import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.kernels.flashinfer import calls
from skyline.kernels.flashinfer.trials import checked
from skyline.kernels.triton import fused_fp8
from skyline.kernels.triton import linear as triton
from skyline.kernels.triton.activations import silu_mul as _silu_mul
from skyline.kernels.triton.device import capability
from skyline.kernels.triton.norms import rms_norm
from skyline.kernels.triton.thresholds import BAND_ROWS
from skyline.ops.fp8 import BLOCK, FP8, Fp8Weight

_PADDED = 4  # rows that Blackwell's kernels take a multiple of


def serves(x: Tensor, weight: Fp8Weight, major: int) -> bool:
    """Whether the kernels of this generation of GPUs are made for rows x and this weight."""
    n, k = weight.shape
    even = k % BLOCK == 0 and n % (64 if major == 9 else BLOCK) == 0
    return weight.blocks and x.shape[0] > BAND_ROWS and even and x.dtype == torch.bfloat16 and major in (9, 10, 12)


def product(x: Tensor, weight: Fp8Weight, norm: Tensor | None = None, eps: float = 0.0, gated: bool = False) -> Tensor:
    """x [T, K], normed or gated as in `quantize_rows`, times weight [N, K] -> [T, N] in bfloat16."""
    major = capability(x.device)[0]

    def ours() -> Tensor:
        values, scales = triton.quantize_rows(x, True, norm, eps, gated)
        return triton.product_fp8(values, scales, weight, x.dtype)

    def hopper() -> Tensor:
        rows = _silu_mul(x) if gated else x.contiguous() if norm is None else rms_norm(x, norm, eps)
        out = rows.new_empty((rows.shape[0], weight.shape[0]))
        return cast(Tensor, flashinfer.gemm.fp8_blockscale_gemm_sm90(**calls.fp8_of_bfloat16(rows, weight, out)))

    def blackwell() -> Tensor:
        values, scales = triton.quantize_rows(x, True, norm, eps, gated)
        rows, missing = x.shape[0], -x.shape[0] % _PADDED
        if missing:
            values = F.pad(values.view(torch.uint8), (0, 0, 0, missing)).view(FP8)
            scales = F.pad(scales, (0, 0, 0, missing))
        out = x.new_empty((rows + missing, weight.shape[0]))
        found = flashinfer.gemm.gemm_fp8_nt_groupwise(**calls.fp8_of_fp8(values, scales, weight, out))
        return cast(Tensor, found[:rows])

    return checked(("FP8 weights of", *weight.shape), hopper if major == 9 else blackwell, ours)


def fused_linear_fp8(
    x: Tensor,
    weight: Fp8Weight,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    if not serves(x, weight, capability(x.device)[0]):
        return triton.fused_linear_fp8(x, weight, bias, silu_mul, norm, eps, residual)
    return triton.finish(product(x, weight, norm, eps), bias, silu_mul, residual)


def linear_fp8(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    return fused_linear_fp8(x, weight, bias, silu_mul)


def gated_mlp_fp8(
    x: Tensor,
    gate_up: Fp8Weight,
    down: Fp8Weight,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    major = capability(x.device)[0]
    if not (serves(x, gate_up, major) and serves(x, down, major)):
        return fused_fp8.gated_mlp_fp8(x, gate_up, down, norm, eps, residual)
    return triton.finish(product(product(x, gate_up, norm, eps), down, gated=True), None, False, residual)
