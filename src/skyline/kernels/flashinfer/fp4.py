"""Linear layers of NVFP4 weights times many rows in NVFP4, in CUTLASS's and cuDNN's products; few rows are Triton's.

Rows are quantized by our own kernel, to the words that weights lie in: both have their columns in the same order, so
that products do not have to know it. Scales of rows, which the library's products have no place for, come behind them.
"""

from __future__ import annotations

from typing import cast

import flashinfer.gemm
import torch
from torch import Tensor

from skyline.kernels.flashinfer import calls
from skyline.kernels.flashinfer.layouts import SwizzledFp4, swizzled_size
from skyline.kernels.flashinfer.trials import checked
from skyline.kernels.triton import nvfp4
from skyline.ops.fp4 import NVFP4_GROUP
from skyline.ops.nvfp4 import FEW_ROWS

_ALIGNED = 32  # rows of the weight that there are a multiple of


def fused_linear_nvfp4(
    x: Tensor,
    weight: SwizzledFp4,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    count, n = x.shape[0], weight.shape[0]
    if count <= FEW_ROWS or n % _ALIGNED or x.dtype != torch.bfloat16:
        return nvfp4.fused_linear_nvfp4(x, weight.words, bias, silu_mul, norm, eps, residual)
    words = weight.words.values

    def foreign() -> Tensor:
        size = swizzled_size(count, 8 * words.shape[1] // NVFP4_GROUP)
        rows = nvfp4.quantize_rows(x, norm, eps, swizzled=torch.empty(size, dtype=torch.uint8, device=x.device))
        out = x.new_empty((count, n))
        product = flashinfer.gemm.mm_fp4(**calls.fp4_of_fp4(rows.words, rows.scales, words, weight.swizzled, out))
        return nvfp4.finish(cast(Tensor, product), rows.row_scales, weight.row_scales, bias, silu_mul, residual)

    def ours() -> Tensor:
        return nvfp4.fused_linear_nvfp4(x, weight.words, bias, silu_mul, norm, eps, residual)

    return checked(("NVFP4 weights of", *weight.shape), foreign, ours)


def linear_nvfp4(x: Tensor, weight: SwizzledFp4, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    return fused_linear_nvfp4(x, weight, bias, silu_mul)
