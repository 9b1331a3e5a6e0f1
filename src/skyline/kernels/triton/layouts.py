"""Layouts of quantized weights in a GPU's memory: quantized on the CPU, copied, and put in words on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.kernels.fp4_layout import FP4, fp4_group
from skyline.kernels.registry import CPU, Layout
from skyline.ops import Fp4Weight, QuantizedWeight
from skyline.ops.formats import DEFAULT_GROUP, IntegerFormat, integers_of
from skyline.ops.fp4 import MXFP4_GROUP, NVFP4_GROUP
from skyline.ops.fp8 import Fp8Rows
from skyline.quantization import GROUPS, quantize_int4, quantize_int8

SYMMETRIC_ZERO = 8  # of packed int4 without zero points: -8..7 are stored as 0..15

# Four-bit values lie in words of eight, int32: the even columns in the low nibbles 0 to 3, the odd ones in 4 to 7. So
# one shift and one mask put two neighbours into the two halves of a word, as bfloat16 wants them.
WORD = 8
_SHIFTS = [16 * (column % 2) + 4 * (column // 2) for column in range(WORD)]
# Rows begin at multiples of so many words, or scales: what Triton looks for, to read several at once.
_ALIGNED = 16

# A group's factor is its scale times 2^126, which makes numbers of codes that were moved to the lowest exponents of
# bfloat16 (skyline.kernels.triton.four_bits). What would be beyond bfloat16 of that, the row's scale makes up for.
_LARGEST_FACTOR = 254  # its exponent, of MXFP4
NVFP4_LESS = 10  # the factor of NVFP4 is its scale times 2^(126 - 10)


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """`QuantizedWeight` of int4 [.., N, K] in half a byte each: an element is (nibble - zero) * scale.

    values: int32 [.., N, ceil(K / 8) or more], words of eight nibbles 0..15. scales, zeros: float16
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


@dataclass(frozen=True, slots=True, eq=False)
class Fp4Words:
    """`Fp4Weight` [.., N, K] as kernels read it.

    values: int32 [.., N, ceil(K / 8) or more], words of eight codes. scales: uint8 [.., N, ceil(K / group) or more],
    what lies behind a row's own is 0; of MXFP4 the exponent of the group's factor (above), biased as in bfloat16, of
    NVFP4 its E4M3. row_scales: float32 [.., N], times what the factors lack.
    """

    values: Tensor
    scales: Tensor
    row_scales: Tensor
    group: int
    k: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.values.shape[:-1], self.k))

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + self.row_scales.nbytes

    def dequantize(self) -> Tensor:
        """float32, of `shape`."""
        return unpack_fp4(self).dequantize()


Words = Int4Weight | Fp4Words


class Operands(NamedTuple):
    """What kernels are given of words [.., N, K]; what a format has not is another of its tensors, and unused."""

    values: Tensor
    scales: Tensor
    zeros: Tensor
    row_scales: Tensor
    groups: int  # of a row
    weight_stride: int
    scale_stride: int  # of FP4
    fp4: bool
    has_zeros: bool

    @classmethod
    def of(cls, weight: Words) -> Operands:
        scales, groups, stride = weight.scales, -(-weight.k // weight.group), weight.values.stride(-2)
        if isinstance(weight, Fp4Words):
            return cls(weight.values, scales, scales, weight.row_scales, groups, stride, scales.stride(-2), True, False)
        zeros = scales if weight.zeros is None else weight.zeros
        return cls(weight.values, scales, zeros, scales, groups, stride, 0, False, weight.zeros is not None)


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
        values = torch.empty((*lead, n, row_words(k)), dtype=torch.int32, device=device)
        scales = torch.empty((*lead, -(-k // self.group), n), dtype=torch.float16, device=device)
        return Int4Weight(values, scales, torch.empty_like(scales) if self.zeros else None, self.group, k)

    def write(self, target: Int4Weight, first_row: int, rows: Tensor | QuantizedWeight) -> None:
        """Raises ValueError if a value is NaN, infinite, or so large that its scale is beyond float16."""
        ready = rows if isinstance(rows, QuantizedWeight) else quantize_int4(rows, self.group, not self.zeros)
        count, n = ready.shape[0], target.shape[-2]
        values = ready.values.to(target.values.device)
        words = pack_words(values if self.zeros else values + SYMMETRIC_ZERO)
        target.values.view(-1, words.shape[1])[first_row : first_row + count] = words
        for whole, part in ((target.scales, ready.scales), (target.zeros, ready.zeros)):
            if whole is None or part is None:
                continue
            matrices, turned, done = whole.view(-1, *whole.shape[-2:]), part.t().to(whole.device), 0
            while done < count:
                expert, row = divmod(first_row + done, n)
                stop = min(count, done + n - row)
                matrices[expert, :, row : row + stop - done] = turned[:, done:stop]
                done = stop


class Fp4WordsLayout:
    """`Fp4Words`, of what skyline.kernels.fp4_layout makes of rows."""

    def __init__(self, group: int) -> None:
        self.name = f"{FP4[group].name} in words"
        self.group = group

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> Fp4Words:
        *lead, n, k = shape
        values = torch.empty((*lead, n, row_words(k)), dtype=torch.int32, device=device)
        scales = torch.empty((*lead, n, row_scales_of(k, self.group)), dtype=torch.uint8, device=device)
        return Fp4Words(values, scales, torch.empty((*lead, n), device=device), self.group, k)

    def write(self, target: Fp4Words, first_row: int, rows: Tensor | QuantizedWeight | Fp8Rows | Fp4Weight) -> None:
        """Raises what `Fp4Layout.rows_of` does."""
        device = target.values.device
        ready = FP4[self.group].rows_of(rows, device)
        values, scales, row_scales = (part.to(device) for part in (ready.values, ready.scales, ready.row_scales))
        packed = pack_fp4(Fp4Weight(values, scales, row_scales, self.group))
        place = slice(first_row, first_row + rows.shape[0])
        for whole, part in ((target.values, packed.values), (target.scales, packed.scales)):
            whole.view(-1, whole.shape[-1])[place] = part
        target.row_scales.view(-1)[place] = packed.row_scales


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED


def row_words(k: int) -> int:
    """That a row of k columns has in memory."""
    return _aligned(-(-k // WORD))


def row_scales_of(k: int, group: int) -> int:
    """Of `Fp4Words`, likewise."""
    return _aligned(-(-k // group))


def pack_words(nibbles: Tensor) -> Tensor:
    """int8 or uint8 [.., K] of 0..15 -> int32 [.., words of a row], the last ones filled up with 0."""
    k = nibbles.shape[-1]
    padded = F.pad(nibbles, (0, row_words(k) * WORD - k)).unflatten(-1, (-1, WORD))
    words = torch.zeros(padded.shape[:-1], dtype=torch.int32, device=nibbles.device)
    for column, shift in enumerate(_SHIFTS):
        words |= padded[..., column].int() << shift
    return words


def unpack_words(words: Tensor, k: int) -> Tensor:
    """What `pack_words` was given, uint8."""
    nibbles = torch.stack([(words >> shift) & 15 for shift in _SHIFTS], -1).flatten(-2)
    return nibbles[..., :k].to(torch.uint8)


def pack_int4(weight: QuantizedWeight) -> Int4Weight:
    """The same integers [.., N, K], on the same device."""
    assert weight.group is not None
    zeros = weight.zeros is not None
    values = pack_words(weight.values if zeros else weight.values + SYMMETRIC_ZERO)
    turned = [None if part is None else part.mT.contiguous() for part in (weight.scales, weight.zeros)]
    assert turned[0] is not None
    return Int4Weight(values, turned[0], turned[1], weight.group, weight.shape[-1])


def unpack_int4(weight: Int4Weight) -> QuantizedWeight:
    """The same integers as the ops' references take them."""
    values = unpack_words(weight.values, weight.k).to(torch.int8)
    if weight.zeros is None:
        values -= SYMMETRIC_ZERO
    zeros = None if weight.zeros is None else weight.zeros.mT
    return QuantizedWeight(values, weight.scales.mT, zeros, weight.group)


def pack_fp4(weight: Fp4Weight) -> Fp4Words:
    """The same numbers [.., N, K], on the same device."""
    # Of a word's four bytes, the even columns of the first two, those of the last two, and then the odd ones.
    padded = F.pad(weight.values, (0, 4 * row_words(weight.shape[-1]) - weight.values.shape[-1]))
    first, second = padded.unflatten(-1, (-1, 2, 2)).unbind(-1)
    octets = torch.stack(((first & 15) | (second << 4), (first >> 4) | (second & 240)), -2)
    values = octets.flatten(-3).view(torch.int32)
    codes, rows = weight.scales.view(torch.uint8), weight.row_scales
    if weight.group == MXFP4_GROUP:
        exponents = codes.int() + 126
        over = (exponents.amax(-1, keepdim=True) - _LARGEST_FACTOR).clamp(min=0)
        codes, rows = (exponents - over).clamp(min=0).to(torch.uint8), torch.ldexp(rows, over.squeeze(-1))
    else:
        rows = rows * 2.0**NVFP4_LESS
    scales = F.pad(codes, (0, _aligned(codes.shape[-1]) - codes.shape[-1]))
    return Fp4Words(values, scales, rows, weight.group, weight.shape[-1])


def unpack_fp4(weight: Fp4Words) -> Fp4Weight:
    """The same numbers as the ops' references take them; every row's scale of MXFP4 is 1, as checkpoints have it."""
    nibbles = unpack_words(weight.values, weight.k)
    values = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    codes, rows = weight.scales[..., : -(-weight.k // weight.group)], weight.row_scales
    if weight.group == NVFP4_GROUP:
        return Fp4Weight(values, codes.contiguous().view(torch.float8_e4m3fn), rows / 2.0**NVFP4_LESS, weight.group)
    codes = (codes.int() - 126 + torch.log2(rows).int().unsqueeze(-1)).clamp(min=0).to(torch.uint8)
    return Fp4Weight(values, codes, torch.ones_like(rows), weight.group)


def int4_words(weight: QuantizedWeight | Int4Weight) -> Int4Weight:
    return pack_int4(weight) if isinstance(weight, QuantizedWeight) else weight


def fp4_words(weight: Fp4Weight | Fp4Words) -> Fp4Words:
    return pack_fp4(weight) if isinstance(weight, Fp4Weight) else weight


INT8 = Int8Layout()
FP4_WORDS = {group: Fp4WordsLayout(group) for group in (MXFP4_GROUP, NVFP4_GROUP)}
INT4 = {(group, zeros): Int4Layout(group, zeros) for group in GROUPS for zeros in (False, True)}


def int4_layout(index: int) -> Callable[[tuple[Any, ...]], Layout]:
    """Of the weight among a call's arguments, with the group and zero points that were decided for it."""

    def choose(arguments: tuple[Any, ...]) -> Layout:
        decided = integers_of(arguments[index]) or IntegerFormat(4, DEFAULT_GROUP)
        return INT4[decided.group or DEFAULT_GROUP, decided.zeros]

    return choose


def fp4_words_layout(index: int) -> Callable[[tuple[Any, ...]], Layout]:
    """Of the weight among a call's arguments, with the group that was decided for it."""
    return lambda arguments: FP4_WORDS[fp4_group(arguments[index])]
