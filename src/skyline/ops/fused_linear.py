"""A linear layer with what stands before and behind it: the norm of its input, and the residual stream it adds to.

For GPUs, where each launch that is saved counts, and a product of few rows reads its input often enough to norm it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from skyline.ops import dense, fp4, fp8, nvfp4, quantized
from skyline.ops.contract import DEFAULT_TOLERANCE, Case, Cost, Op, Tolerance, nbytes, randn, register
from skyline.ops.fp4 import Fp4Weight
from skyline.ops.fp8 import Fp8Weight
from skyline.ops.quantized import QuantizedWeight


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


def _fused_linear_fp4(
    x: Tensor,
    weight: Fp4Weight,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """`fused_linear` by means of `linear_fp4`."""
    return _fused(fp4.linear_fp4, x, weight, bias, silu_mul, norm, eps, residual)


def _fused_linear_nvfp4(
    x: Tensor,
    weight: Fp4Weight,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """`fused_linear` by means of `linear_nvfp4`."""
    return _fused(nvfp4.linear_nvfp4, x, weight, bias, silu_mul, norm, eps, residual)


def _fused_linear_int4(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """`fused_linear` by means of `linear_int4_weight_only`."""
    return _fused(quantized.linear_int4_weight_only, x, weight, bias, silu_mul, norm, eps, residual)


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


# Rows of x, and what randn takes of a matrix [N, K] -> the weight of a case, of which different rows may have others.
_MakeWeight = Callable[[int, int, int, torch.dtype, torch.Generator], Any]


def _cost(linear: Op, arguments: tuple[Any, ...]) -> Cost:
    x, weight, bias, silu_mul, norm, _, residual = arguments
    plain: Cost = linear.cost(x, weight, bias, silu_mul)
    extra = nbytes(norm, residual)
    return plain + Cost(extra, (0 if norm is None else 4 * x.numel()) + (0 if residual is None else residual.numel()))


def _cases(make: _MakeWeight, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in (1, 3, 17, 70):
        for n, k in ((48, 64), (34, 72)):
            x = randn((rows, k), dtype, generator, 2.0)
            weight = make(rows, n, k, dtype, generator)
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


def _register(
    linear: Op,
    reference: Callable[..., Tensor],
    make: _MakeWeight,
    tolerance: Tolerance,
    rounds: bool = False,
) -> Op:
    return register(
        Op(
            reference.__name__.removeprefix("_"),
            reference,
            cost=lambda *arguments: _cost(linear, arguments),
            cases=lambda dtype, generator: _cases(make, dtype, generator),
            meta=_meta,
            tolerance=tolerance,
            rounds=rounds,
        )
    )


# A kernel may round x times norm where the reference rounds x over its root mean square first.
_TOLERANCE: Tolerance = {**DEFAULT_TOLERANCE, torch.bfloat16: (2e-2, 3e-2)}

fused_linear = _register(
    dense.linear,
    _fused_linear,
    lambda rows, n, k, dtype, generator: randn((n, k), dtype, generator, k**-0.5),
    _TOLERANCE,
)
fused_linear_fp8 = _register(
    fp8.linear_fp8,
    _fused_linear_fp8,
    lambda rows, n, k, dtype, generator: fp8.fp8_case_weight(n, k, rows == 3, generator),
    fp8.FP8_TOLERANCE,
)
fused_linear_fp4 = _register(
    fp4.linear_fp4,
    _fused_linear_fp4,
    lambda rows, n, k, dtype, generator: fp4.fp4_case_weight(n, k, 32 if rows % 3 else 16, generator),
    _TOLERANCE,
)
fused_linear_nvfp4 = _register(
    nvfp4.linear_nvfp4,
    _fused_linear_nvfp4,
    lambda rows, n, k, dtype, generator: fp4.fp4_case_weight(n, k, fp4.NVFP4_GROUP, generator),
    nvfp4.NVFP4_TOLERANCE,
    rounds=True,
)
fused_linear_int4 = _register(
    quantized.linear_int4_weight_only,
    _fused_linear_int4,
    lambda rows, n, k, dtype, generator: quantized.int4_case_weight(n, k, 32, k == 72, generator),
    # Scales are rounded to bfloat16 as well.
    {**_TOLERANCE, torch.bfloat16: (2e-2, 6e-2)},
)
