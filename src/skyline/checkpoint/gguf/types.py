"""GGML's tensor types, and the values of quantized ones.

Layouts: the structs block_* of https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. A row is a sequence of
blocks; a block holds scales and packed integers. Every product and sum is rounded to float32, as in ggml's
dequantize_row_* without fused multiply-add.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[Any]  # [n] of a block's structured dtype
Bytes = NDArray[np.uint8]
Halves = NDArray[np.float16]
Floats = NDArray[np.float32]

_SUPER = 256  # values of a block of the K types


@dataclass(frozen=True, slots=True)
class Levels:
    """Integers and what they stand for: of each row, level * (factor * scale) - offset * minimum, in float32.

    levels: int8 [n, k]. factors, and offsets or None: float16 [n, k / block]. scales int8, and minima uint8 or None:
    [n, k / group]; where a block is one group, there are neither, which is 1.
    """

    levels: NDArray[np.int8]
    factors: Halves
    offsets: Halves | None = None
    scales: NDArray[np.int8] | None = None
    minima: NDArray[np.uint8] | None = None

    def values(self) -> Floats:
        """float32 [n, k]."""
        scales = self.group_scales()
        grouped = self.levels.reshape(*scales.shape, -1).astype(np.float32)
        values, minima = scales[..., None] * grouped, self.group_minima()
        return (values if minima is None else values - minima[..., None]).reshape(self.levels.shape)

    def group_scales(self) -> Floats:
        """Of each group, exact: [n, k / group]."""
        return _scaled(self.factors, self.scales)

    def group_minima(self) -> Floats | None:
        return None if self.offsets is None else _scaled(self.offsets, self.minima)


def _scaled(factors: Halves, by: NDArray[Any] | None) -> Floats:
    wide = factors.astype(np.float32)
    if by is None:
        return wide
    grouped = by.reshape(*factors.shape, -1).astype(np.float32)
    return (wide[..., None] * grouped).reshape(by.shape)


@dataclass(frozen=True, slots=True)
class GGMLType:
    """block_size: values of a block. block: its layout. unpack: blocks [n] to rows of block_size.

    `block` is None for the plain types, F32, F16 and BF16, and `unpack` for those and for MXFP4, which holds floats.
    group: values that share a scale. offsets: whether there are.
    """

    name: str
    block_size: int
    block_bytes: int
    block: np.dtype[Any] | None = None
    unpack: Callable[[Blocks], Levels] | None = None
    group: int = 0
    offsets: bool = False

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.block_size * self.block_bytes

    def levels(self, rows: Bytes) -> Levels:
        """Rows as they are in the file [n, bytes of a row]."""
        assert self.unpack is not None
        found = self.unpack(self.blocks(rows))
        parts = (found.levels, found.factors, found.offsets, found.scales, found.minima)
        return Levels(*(None if part is None else part.reshape(len(rows), -1) for part in parts))  # type: ignore[arg-type]

    def dequantize(self, rows: Bytes) -> Floats:
        """Rows as they are in the file [n, bytes of a row] to float32 [n, values of a row].

        A scale that is NaN or infinite gives values that are not finite.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            if self.unpack is None:
                return _mxfp4(self.blocks(rows)).reshape(len(rows), -1)
            return self.levels(rows).values()

    def blocks(self, rows: Bytes) -> Blocks:
        """[n, bytes of a row] as blocks, one row's after the other's."""
        assert self.block is not None
        return np.ascontiguousarray(rows).reshape(-1).view(self.block)


def _half(blocks: Blocks, field: str) -> Halves:
    """A float16 of each block [n, 1]."""
    halves: Halves = blocks[field].astype(np.float16)[:, None]
    return halves


def _nibbles(packed: Bytes, run: int) -> Bytes:
    """[n, m] to [n, 2 m]: of each `run` bytes first all the lower halves, then all the upper ones."""
    halves = packed.reshape(len(packed), -1, 1, run)
    return np.concatenate([halves & 15, halves >> 4], axis=2).reshape(len(packed), -1)


def _fields(packed: Bytes, bits: int, run: int) -> Bytes:
    """The same for fields of `bits` bits, from the lowest on: [n, m] to [n, m * 8 / bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = packed.reshape(len(packed), -1, 1, run) >> shifts & np.uint8((1 << bits) - 1)
    return fields.reshape(len(packed), -1)


def _fifth_bits(blocks: Blocks) -> Bytes:
    """16 where the bit of a value is set in "high", else 0: [n, 32]."""
    return np.unpackbits(blocks["high"], axis=1, bitorder="little") << np.uint8(4)


def _signed(levels: Bytes, zero: int = 0) -> NDArray[np.int8]:
    return levels.astype(np.int8) - np.int8(zero)


def _q4_0(blocks: Blocks) -> Levels:
    return Levels(_signed(_nibbles(blocks["q"], 16), 8), _half(blocks, "d"))


def _q4_1(blocks: Blocks) -> Levels:
    return Levels(_signed(_nibbles(blocks["q"], 16)), _half(blocks, "d"), -_half(blocks, "m"))


def _q5_0(blocks: Blocks) -> Levels:
    return Levels(_signed(_nibbles(blocks["q"], 16) | _fifth_bits(blocks), 16), _half(blocks, "d"))


def _q5_1(blocks: Blocks) -> Levels:
    return Levels(_signed(_nibbles(blocks["q"], 16) | _fifth_bits(blocks)), _half(blocks, "d"), -_half(blocks, "m"))


def _q8_0(blocks: Blocks) -> Levels:
    return Levels(blocks["q"], _half(blocks, "d"))


def _q2_k(blocks: Blocks) -> Levels:
    scales: Bytes = blocks["scales"]
    minima = scales >> np.uint8(4)
    return Levels(
        _signed(_fields(blocks["q"], 2, 32)),
        _half(blocks, "d"),
        _half(blocks, "dmin"),
        _signed(scales & np.uint8(15)),
        minima,
    )


def _q3_k(blocks: Blocks) -> Levels:
    lower, upper = _nibbles(blocks["scales"][:, :8], 8), _fields(blocks["scales"][:, 8:], 2, 4)
    # The third bit says "not minus four".
    levels = _fields(blocks["q"], 2, 32) | _fields(blocks["high"], 1, 32) << np.uint8(2)
    return Levels(_signed(levels, 4), _half(blocks, "d"), None, _signed(lower | upper << np.uint8(4), 32))


def _with_k_scales(levels: Bytes, blocks: Blocks) -> Levels:
    """Of Q4_K and Q5_K: the scales and minima of eight groups, 6 bits each, are packed in 12 bytes."""
    scales, minima, rest = np.split(blocks["scales"], 3, axis=1)
    scales = np.concatenate([scales & 63, rest & 15 | scales >> 6 << np.uint8(4)], axis=1)
    minima = np.concatenate([minima & 63, rest >> 4 | minima >> 6 << np.uint8(4)], axis=1)
    return Levels(_signed(levels), _half(blocks, "d"), _half(blocks, "dmin"), _signed(scales), minima)


def _q4_k(blocks: Blocks) -> Levels:
    return _with_k_scales(_nibbles(blocks["q"], 32), blocks)


def _q5_k(blocks: Blocks) -> Levels:
    return _with_k_scales(_nibbles(blocks["q"], 32) | _fields(blocks["high"], 1, 32) << np.uint8(4), blocks)


def _q6_k(blocks: Blocks) -> Levels:
    levels = _nibbles(blocks["q"], 64) | _fields(blocks["high"], 2, 32) << np.uint8(4)
    return Levels(_signed(levels, 32), _half(blocks, "d"), None, blocks["scales"])


# The values of E2M1 (https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _mxfp4(blocks: Blocks) -> Floats:
    exponents = blocks["e"].astype(np.int32)
    scales = np.where(exponents == 255, np.float32(np.nan), np.ldexp(np.float32(1), exponents - 127))
    return scales[:, None].astype(np.float32) * _E2M1[_nibbles(blocks["q"], 16)]


def _block(*fields: tuple[str, str, int]) -> np.dtype[Any]:
    return np.dtype([(field, dtype, (count,)) if count > 1 else (field, dtype) for field, dtype, count in fields])


def _type(name: str, size: int, unpack: Callable[[Blocks], Levels], *fields: tuple[str, str, int]) -> GGMLType:
    block = _block(*fields)
    made = unpack(np.zeros(1, block))
    group = size if made.scales is None else size // made.scales.shape[1]
    return GGMLType(name, size, block.itemsize, block, unpack, group, made.offsets is not None)


_D, _M, _DMIN = ("d", "<f2", 1), ("m", "<f2", 1), ("dmin", "<f2", 1)

# By their numbers in a file (enum ggml_type).
GGML_TYPES: dict[int, GGMLType] = {
    0: GGMLType("F32", 1, 4),
    1: GGMLType("F16", 1, 2),
    2: _type("Q4_0", 32, _q4_0, _D, ("q", "u1", 16)),
    3: _type("Q4_1", 32, _q4_1, _D, _M, ("q", "u1", 16)),
    6: _type("Q5_0", 32, _q5_0, _D, ("high", "u1", 4), ("q", "u1", 16)),
    7: _type("Q5_1", 32, _q5_1, _D, _M, ("high", "u1", 4), ("q", "u1", 16)),
    8: _type("Q8_0", 32, _q8_0, _D, ("q", "i1", 32)),
    10: _type("Q2_K", _SUPER, _q2_k, ("scales", "u1", 16), ("q", "u1", 64), _D, _DMIN),
    11: _type("Q3_K", _SUPER, _q3_k, ("high", "u1", 32), ("q", "u1", 64), ("scales", "u1", 12), _D),
    12: _type("Q4_K", _SUPER, _q4_k, _D, _DMIN, ("scales", "u1", 12), ("q", "u1", 128)),
    13: _type("Q5_K", _SUPER, _q5_k, _D, _DMIN, ("scales", "u1", 12), ("high", "u1", 32), ("q", "u1", 128)),
    14: _type("Q6_K", _SUPER, _q6_k, ("q", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), _D),
    30: GGMLType("BF16", 1, 2),
    39: GGMLType("MXFP4", 32, 17, _block(("e", "u1", 1), ("q", "u1", 16))),
}


def mxfp4_codes(rows: Bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Rows of MXFP4 of a file to codes [n, k / 2], two a byte, the even one low, and scales [n, k / 32]."""
    blocks = GGML_TYPES[39].blocks(rows)
    even, odd = blocks["q"][:, 0::2], blocks["q"][:, 1::2]  # of a block's first half in the low nibbles
    codes = np.concatenate(((even & 15) | (odd & 15) << 4, even >> 4 | odd & 0xF0), axis=1)
    return codes.reshape(len(rows), -1), blocks["e"].reshape(len(rows), -1)
