"""A linear layer with what stands before and behind it: the norm of its input, and the residual stream it adds to.

For GPUs, where each launch that is saved counts, and a product of few rows reads its input often enough to norm it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from skyline.ops import dense, fp8
from skyline.ops.contract import DEFAULT_TOLERANCE, Case, Cost, Op, nbytes, randn, register
from skyline.ops.fp8 import Fp8Weight


def _fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """linear(rms_norm(x, norm, eps), weight, bias, silu_mul) + residual; norm [K] and residual [T, N] may be None."""
    return _fused(dense.linear, x, weight, bias, silu_mul, norm, eps, residual)


def _fused_linear_fp8(
    x: Tensor,
    weight: Fp8Weight,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """`fused_linear` by means of `linear_fp8`."""
    return _fused(fp8.linear_fp8, x, weight, bias, silu_mul, norm, eps, residual)


def _fused(
    linear: Op,
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    silu_mul: bool,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor:
    if norm is not None:
        x = dense.rms_norm.reference(x, norm, eps)
    y: Tensor = linear.reference(x, weight, bias, silu_mul)
    return y if residual is None else y + residual


def _cost(linear: Op, arguments: tuple[Any, ...]) -> Cost:
    x, weight, bias, silu_mul, norm, _, residual = arguments
    plain: Cost = linear.cost(x, weight, bias, silu_mul)
    extra = nbytes(norm, residual)
    return plain + Cost(extra, (0 if norm is None else 4 * x.numel()) + (0 if residual is None else residual.numel()))


def _cases(quantized: bool, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in (1, 3, 17, 70):
        for n, k in ((48, 64), (34, 72)):
            x = randn((rows, k), dtype, generator, 2.0)
            weight: Any = randn((n, k), dtype, generator, k**-0.5)
            if quantized:
                weight = fp8.fp8_case_weight(n, k, rows == 3, generator)
            norm = 1 + randn((k,), dtype, generator, 0.1)
            name = f"T={rows} N={n} K={k}"
            yield Case(f"{name} norm", (x, weight, None, False, norm, 1e-6, None))
            yield Case(f"{name} norm silu_mul", (x, weight, None, True, norm, 0.5, None))
            residual = randn((rows, n), dtype, generator)
            yield Case(f"{name} residual", (x * 0.5, weight, None, False, None, 0.0, residual))
            bias = randn((n,), dtype, generator)
            yield Case(f"{name} all", (x, weight, bias, False, norm, 1e-6, residual))


def _meta(x: Tensor, weight: Any, bias: Tensor | None, silu_mul: bool, *_: object) -> Tensor:
    return dense.linear_meta(x, weight, bias, silu_mul)


fused_linear = register(
    Op(
        "fused_linear",
        _fused_linear,
        cost=lambda *arguments: _cost(dense.linear, arguments),
        cases=lambda dtype, generator: _cases(False, dtype, generator),
        meta=_meta,
        # A kernel may round x times norm where the reference rounds x over its root mean square first.
        tolerance={**DEFAULT_TOLERANCE, torch.bfloat16: (2e-2, 3e-2)},
    )
)
fused_linear_fp8 = register(
    Op(
        "fused_linear_fp8",
        _fused_linear_fp8,
        cost=lambda *arguments: _cost(fp8.linear_fp8, arguments),
        cases=lambda dtype, generator: _cases(True, dtype, generator),
        meta=_meta,
        tolerance=fp8.FP8_TOLERANCE,
    )
)
