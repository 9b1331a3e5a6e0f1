"""Layouts of quantized weights in a GPU's memory. They are quantized and packed on the CPU, and then copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.kernels.registry import CPU, Layout
from skyline.ops import QuantizedWeight
from skyline.ops.formats import DEFAULT_GROUP, IntegerFormat, integers_of
from skyline.quantization import GROUPS, quantize_int4, quantize_int8

SYMMETRIC_ZERO = 8  # of packed int4 without zero points: -8..7 are stored as 0..15


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """`QuantizedWeight` of int4 [.., N, K] in half a byte each: an element is (nibble - zero) * scale.

    values: uint8 [.., N, ceil(K / 2)], the even column in the low nibble, all 0..15. scales, zeros: float16
    [.., ceil(K / group), N], so that neighbouring rows, which a program reads together, lie together; without `zeros`
    they are 8.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int
    k: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.values.shape[:-1], self.k))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.values, self.scales, self.zeros) if part is not None)


class Int8Layout:
    """`QuantizedWeight` of int8, as skyline.quantization.quantize_int8 makes it."""

    name = "int8"

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> QuantizedWeight:
        values = torch.empty(shape, dtype=torch.int8, device=device)
        return QuantizedWeight(values, torch.empty(shape[:-1], device=device))

    def write(self, target: QuantizedWeight, first_row: int, rows: Tensor | QuantizedWeight) -> None:
        """Raises ValueError if a value is NaN or infinite."""
        ready = rows if isinstance(rows, QuantizedWeight) else quantize_int8(rows)
        place = slice(first_row, first_row + ready.shape[0])
        target.values.view(-1, target.shape[-1])[place] = ready.values.to(target.values.device)
        target.scales.view(-1)[place] = ready.scales.to(target.scales.device)


class Int4Layout:
    """`Int4Weight`, as skyline.quantization.quantize_int4 makes it."""

    def __init__(self, group: int, zeros: bool) -> None:
        self.name = f"packed int4 in groups of {group}" + (" with zero points" if zeros else "")
        self.group = group
        self.zeros = zeros

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> Int4Weight:
        *lead, n, k = shape
        values = torch.empty((*lead, n, -(-k // 2)), dtype=torch.uint8, device=device)
        scales = torch.empty((*lead, -(-k // self.group), n), dtype=torch.float16, device=device)
        return Int4Weight(values, scales, torch.empty_like(scales) if self.zeros else None, self.group, k)

    def write(self, target: Int4Weight, first_row: int, rows: Tensor | QuantizedWeight) -> None:
        """Raises ValueError if a value is NaN, infinite, or so large that its scale is beyond float16."""
        ready = rows if isinstance(rows, QuantizedWeight) else quantize_int4(rows, self.group, not self.zeros)
        count, n = ready.shape[0], target.shape[-2]
        octets = pack_nibbles(ready.values if self.zeros else ready.values + SYMMETRIC_ZERO)
        target.values.view(-1, octets.shape[1])[first_row : first_row + count] = octets.to(target.values.device)
        for whole, part in ((target.scales, ready.scales), (target.zeros, ready.zeros)):
            if whole is None or part is None:
                continue
            matrices, turned, done = whole.view(-1, *whole.shape[-2:]), part.t().to(whole.device), 0
            while done < count:
                expert, row = divmod(first_row + done, n)
                stop = min(count, done + n - row)
                matrices[expert, :, row : row + stop - done] = turned[:, done:stop]
                done = stop


def pack_nibbles(levels: Tensor) -> Tensor:
    """int8 [.., K] of 0..15 -> uint8 [.., ceil(K / 2)], the even column in the low nibble."""
    padded = F.pad(levels, (0, levels.shape[-1] % 2)).to(torch.uint8)
    return padded[..., 0::2] | (padded[..., 1::2] << 4)


def pack_int4(weight: QuantizedWeight) -> Int4Weight:
    """The same integers [.., N, K], on the same device."""
    assert weight.group is not None
    zeros = weight.zeros is not None
    values = pack_nibbles(weight.values if zeros else weight.values + SYMMETRIC_ZERO)
    turned = [None if part is None else part.mT.contiguous() for part in (weight.scales, weight.zeros)]
    assert turned[0] is not None
    return Int4Weight(values, turned[0], turned[1], weight.group, weight.shape[-1])


def unpack_int4(weight: Int4Weight) -> QuantizedWeight:
    """The same integers as the ops' references take them."""
    octets = weight.values.unsqueeze(-1)
    values = torch.cat((octets & 15, octets >> 4), -1).flatten(-2)[..., : weight.k].to(torch.int8)
    if weight.zeros is None:
        values -= SYMMETRIC_ZERO
    zeros = None if weight.zeros is None else weight.zeros.mT
    return QuantizedWeight(values, weight.scales.mT, zeros, weight.group)


INT8 = Int8Layout()
INT4 = {(group, zeros): Int4Layout(group, zeros) for group in GROUPS for zeros in (False, True)}


def int4_layout(index: int) -> Callable[[tuple[Any, ...]], Layout]:
    """Of the weight among a call's arguments, with the group and zero points that were decided for it."""

    def choose(arguments: tuple[Any, ...]) -> Layout:
        decided = integers_of(arguments[index]) or IntegerFormat(4, DEFAULT_GROUP)
        return INT4[decided.group or DEFAULT_GROUP, decided.zeros]

    return choose
