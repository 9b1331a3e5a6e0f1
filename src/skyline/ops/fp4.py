"""Linear layers with weights of four-bit floats in groups, MXFP4 and NVFP4, in the signature of `linear`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from skyline.ops import dense
from skyline.ops.contract import Case, Cost, Op, randn, register
from skyline.ops.formats import integers_of

MXFP4_GROUP, NVFP4_GROUP = 32, 16

# E2M1: a sign, two bits of exponent and one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _pairs(low_first: Tensor) -> Tensor:
    """The two values of each byte, [16] -> [256] int64, each the bits of two float32, the low nibble's first."""
    byte = torch.arange(256)
    return torch.stack((low_first[byte & 15], low_first[byte >> 4]), -1).view(torch.int64).flatten()


_E2M1_PAIRS = _pairs(torch.tensor(E2M1 + tuple(-value for value in E2M1)))


def unpack_e2m1(packed: Tensor) -> Tensor:
    """uint8 [.., K / 2], the low nibble first -> float32 [.., K]."""
    table = _E2M1_PAIRS.to(packed.device)
    values = table.index_select(0, packed.flatten().int()).view(torch.float32)
    return values.view(*packed.shape[:-1], 2 * packed.shape[-1])


@dataclass(frozen=True, slots=True, eq=False)
class Fp4Weight:
    """A weight [.., N, K] as checkpoints hold it: an element is (its E2M1) * (its group's scale) * (its row's scale).

    values: uint8 [.., N, K / 2], two a byte, the even column in the low nibble.
    scales: [.., N, ceil(K / group)]. MXFP4, group 32: uint8, an exponent of two plus 127 (E8M0). NVFP4, group 16:
    float8_e4m3fn. None is NaN.
    row_scales: float32 [.., N]. NVFP4's scale of a whole tensor, of which a fused weight has several parts; MXFP4: 1.
    """

    values: Tensor
    scales: Tensor
    row_scales: Tensor
    group: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.values.shape[:-1], 2 * self.values.shape[-1]))

    @property
    def nbytes(self) -> int:
        return self.values.numel() + self.scales.numel() + 4 * self.row_scales.numel()

    def rows_at(self, indices: Tensor) -> Fp4Weight:
        """Of a matrix [N, K], in the order of `indices`."""
        scales = self.scales.view(torch.uint8)[indices].view(self.scales.dtype)
        return Fp4Weight(self.values[indices], scales, self.row_scales[indices], self.group)

    def dequantize(self) -> Tensor:
        """float32, of `shape`."""
        is_e8m0 = self.scales.dtype == torch.uint8
        scales = (self.scales.view(torch.float8_e8m0fnu) if is_e8m0 else self.scales).float()
        spread = scales.repeat_interleave(self.group, -1)[..., : self.shape[-1]]
        # Elements times scales are exact in float32; a row's scale is rounded with them, once.
        return unpack_e2m1(self.values) * spread * self.row_scales.unsqueeze(-1)


def _linear_fp4(x: Tensor, weight: Fp4Weight, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    """x [T, K], weight [N, K] in FP4, bias [N] -> x @ weight.T + bias, [T, N] in x's dtype, in float32, rounded once.

    x is not quantized. `silu_mul` as in `linear`.
    """
    y = dense.linear.reference(x.float(), weight.dequantize(), None if bias is None else bias.float())
    activated: Tensor = dense.silu_mul.reference(y) if silu_mul else y
    return activated.to(x.dtype)


def fp4_bytes(n: int, k: int, group: int) -> int:
    """Of a matrix [n, k]: half a byte each, a byte a group, four a row."""
    return n * (-(-k // 2) + -(-k // group) + 4)


def fp4_weight_bytes(weight: Tensor | Fp4Weight) -> int:
    """Of [.., N, K], in whatever layout. A plain tensor stands for a weight yet to be read, and counts as MXFP4 if
    nothing is decided."""
    if not isinstance(weight, Tensor):
        return weight.nbytes
    decided = integers_of(weight)
    group = MXFP4_GROUP if decided is None or decided.group is None else decided.group
    return fp4_bytes(weight.numel() // weight.shape[-1], weight.shape[-1], group)


class _Described(NamedTuple):
    shape: tuple[int, ...]
    nbytes: int


def linear_fp4_cost(x: Tensor, weight: Tensor | Fp4Weight, bias: Tensor | None = None, silu_mul: bool = False) -> Cost:
    return dense.linear_cost(x, _Described(tuple(weight.shape), fp4_weight_bytes(weight)), bias, silu_mul)


def fp4_case_weight(n: int, k: int, group: int, generator: torch.Generator) -> Fp4Weight:
    """Values of size k^-0.5, of all codes; scales over several powers of two."""
    values = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    shape, size = (n, -(-k // group)), k**-0.5 / 3  # 3: the standard deviation of the sixteen numbers, about
    if group == MXFP4_GROUP:
        middle = round(torch.log2(torch.tensor(size)).item()) + 127
        scales = torch.randint(middle - 2, middle + 2, shape, generator=generator).to(torch.uint8)
        return Fp4Weight(values, scales, torch.ones(n), group)
    # The largest is 448, and some are below E4M3's smallest normal number, 2^-6.
    wide = torch.rand(shape, generator=generator) * 448
    tiny = torch.rand(shape, generator=generator) < 0.1
    scales = torch.where(tiny, wide * 2.0**-15, wide).to(torch.float8_e4m3fn)
    return Fp4Weight(values, scales, torch.where(torch.arange(n) < n // 3, size / 260, size / 200), group)


def _linear_fp4_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in (1, 3, 17, 70):
        for n, k in ((40, 64), (34, 72), (130, 200)):
            for group in (MXFP4_GROUP, NVFP4_GROUP):
                x, weight = randn((rows, k), dtype, generator), fp4_case_weight(n, k, group, generator)
                name = f"T={rows} N={n} K={k} group={group}"
                yield Case(name, (x, weight))
                yield Case(f"{name} bias", (x, weight, randn((n,), dtype, generator)))
                yield Case(f"{name} silu_mul", (x, weight, None, True))


# The default tolerance: a number of FP4 times its group's scale has at most six significant bits, so that a kernel that
# multiplies in bfloat16 loses nothing.
linear_fp4 = register(
    Op("linear_fp4", _linear_fp4, cost=linear_fp4_cost, cases=_linear_fp4_cases, meta=dense.linear_meta),
)
