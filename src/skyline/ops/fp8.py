"""Linear layers with weights in FP8 (float8_e4m3fn, arXiv:2209.05433), in the signature of `linear`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skyline.ops import dense
from skyline.ops.attention import FP8_MAX
from skyline.ops.contract import Case, Cost, Op, Tolerance, randn, register

FP8 = torch.float8_e4m3fn
BLOCK = 128  # rows and columns of a weight that share a scale, in DeepSeek-V3's form


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """values [.., N, K] float8_e4m3fn; an element is value * scale.

    scales float32: [.., N], one a row, or [.., ceil(N / 128), ceil(K / 128)], one a block (arXiv:2412.19437, 3.3.2).
    """

    values: Tensor
    scales: Tensor

    @property
    def blocks(self) -> bool:
        return self.scales.dim() == self.values.dim()

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.numel() + 4 * self.scales.numel()

    def dequantize(self) -> Tensor:
        """float32, of `shape`."""
        wide = self.values.float()
        if not self.blocks:
            return wide * self.scales.unsqueeze(-1)
        n, k = self.shape[-2:]
        spread = self.scales.repeat_interleave(BLOCK, -2)[..., :n, :].repeat_interleave(BLOCK, -1)[..., :k]
        return wide * spread


class Fp8Rows(NamedTuple):
    """Rows of a weight on their way into memory: values [n, K] FP8, scales [n, 1] or [n, ceil(K / 128)] of each row."""

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def dequantize(self) -> Tensor:
        """float32, of `shape`."""
        width = self.shape[1] if self.scales.shape[1] == 1 else BLOCK
        return self.values.float() * self.scales.repeat_interleave(width, 1)[:, : self.shape[1]]


def quantize_fp8(weight: Tensor) -> Fp8Weight:
    """Rows [.., N, K] to the nearest of FP8, each row's largest magnitude to 448; of zeros the scale is 1.

    Raises ValueError if a value is NaN or infinite.
    """
    wide = weight.float()
    if not bool(wide.isfinite().all()):
        raise ValueError("a weight holds NaN or infinity, which cannot be quantized")
    largest = wide.abs().amax(-1)
    scales = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    return Fp8Weight((wide / scales.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(FP8), scales)


def _linear_fp8(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    """x [T, K], weight [N, K] in FP8, bias [N] -> x @ weight.T + bias, [T, N] in x's dtype, in float32, rounded once.

    A kernel may round x to FP8 as well, with a scale for each row or for each 128 neighbours of one: its products are
    then off by up to 2^-4 each, which the tolerance allows for. `silu_mul` as in `linear`.
    """
    y = dense.linear.reference(x.float(), weight.dequantize(), None if bias is None else bias.float())
    activated: Tensor = dense.silu_mul.reference(y) if silu_mul else y
    return activated.to(x.dtype)


def fp8_bytes(weight: Any) -> int:
    """Of a weight [.., N, K]. A plain tensor stands for one yet to be quantized by rows."""
    if isinstance(weight, Fp8Weight):
        return weight.nbytes
    return int(weight.numel() + 4 * weight.numel() // weight.shape[-1])


class _Described:
    def __init__(self, weight: Any) -> None:
        self.shape, self.nbytes = weight.shape, fp8_bytes(weight)


def linear_fp8_cost(x: Tensor, weight: Any, bias: Tensor | None = None, silu_mul: bool = False) -> Cost:
    return dense.linear_cost(x, _Described(weight), bias, silu_mul)


def fp8_case_weight(n: int, k: int, blocks: bool, generator: torch.Generator) -> Fp8Weight:
    values = (torch.randn((n, k), generator=generator) * 60).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    shape = (-(-n // BLOCK), -(-k // BLOCK)) if blocks else (n,)
    return Fp8Weight(values, (0.5 + torch.rand(shape, generator=generator)) * k**-0.5 / 60)


def _linear_fp8_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in (1, 3, 17, 70):
        for n, k in ((48, 64), (34, 72), (144, 272)):
            for blocks in (False, True):
                x, weight = randn((rows, k), dtype, generator), fp8_case_weight(n, k, blocks, generator)
                name = f"T={rows} N={n} K={k} blocks={blocks}"
                yield Case(name, (x, weight))
                yield Case(f"{name} bias", (x, weight, randn((n,), dtype, generator)))
                yield Case(f"{name} silu_mul", (x, weight, None, True))


# Results are of size 1: a sum of K products, each off by up to 2^-4 of itself, is off by about 2^-4 / sqrt(3).
FP8_TOLERANCE: Tolerance = {dtype: (0.1, 0.25) for dtype in (torch.float32, torch.bfloat16, torch.float16)}

linear_fp8 = register(
    Op(
        "linear_fp8",
        _linear_fp8,
        cost=linear_fp8_cost,
        cases=_linear_fp8_cases,
        meta=dense.linear_meta,
        tolerance=FP8_TOLERANCE,
    )
)
