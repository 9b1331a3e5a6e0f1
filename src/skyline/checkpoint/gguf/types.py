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
Floats = NDArray[np.float32]

_SUPER = 256  # values of a block of the K types


@dataclass(frozen=True, slots=True)
class GGMLType:
    """block_size: values of a block. block: its layout. values: blocks [n] to float32 [n, block_size].

    `block` and `values` are None for the plain types, F32, F16 and BF16.
    """

    name: str
    block_size: int
    block_bytes: int
    block: np.dtype[Any] | None = None
    values: Callable[[Blocks], Floats] | None = None

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.block_size * self.block_bytes

    def dequantize(self, rows: Bytes) -> Floats:
        """Rows as they are in the file [n, bytes of a row] to float32 [n, values of a row].

        A scale that is NaN or infinite gives values that are not finite.
        """
        assert self.block is not None and self.values is not None
        blocks = np.ascontiguousarray(rows).reshape(-1).view(self.block)
        with np.errstate(invalid="ignore", over="ignore"):
            return self.values(blocks).reshape(len(rows), -1)


def _scale(blocks: Blocks, field: str) -> Floats:
    """A float16 of each block as float32 [n, 1]."""
    return blocks[field].astype(np.float32)[:, None]


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


def _q4_0(blocks: Blocks) -> Floats:
    return _scale(blocks, "d") * (_nibbles(blocks["q"], 16).astype(np.float32) - 8)


def _q4_1(blocks: Blocks) -> Floats:
    return _scale(blocks, "d") * _nibbles(blocks["q"], 16).astype(np.float32) + _scale(blocks, "m")


def _q5_0(blocks: Blocks) -> Floats:
    levels = _nibbles(blocks["q"], 16) | _fifth_bits(blocks)
    return _scale(blocks, "d") * (levels.astype(np.float32) - 16)


def _q5_1(blocks: Blocks) -> Floats:
    levels = _nibbles(blocks["q"], 16) | _fifth_bits(blocks)
    return _scale(blocks, "d") * levels.astype(np.float32) + _scale(blocks, "m")


def _q8_0(blocks: Blocks) -> Floats:
    return _scale(blocks, "d") * blocks["q"].astype(np.float32)


def _q2_k(blocks: Blocks) -> Floats:
    scales = _scale(blocks, "d") * (blocks["scales"] & 15).astype(np.float32)
    minima = _scale(blocks, "dmin") * (blocks["scales"] >> 4).astype(np.float32)
    levels = _fields(blocks["q"], 2, 32).reshape(-1, 16, 16).astype(np.float32)
    return scales[:, :, None] * levels - minima[:, :, None]


def _q3_k(blocks: Blocks) -> Floats:
    lower, upper = _nibbles(blocks["scales"][:, :8], 8), _fields(blocks["scales"][:, 8:], 2, 4)
    scales = _scale(blocks, "d") * ((lower | upper << np.uint8(4)).astype(np.float32) - 32)
    # The third bit says "not minus four".
    levels = _fields(blocks["q"], 2, 32) | _fields(blocks["high"], 1, 32) << np.uint8(2)
    return scales[:, :, None] * (levels.reshape(-1, 16, 16).astype(np.float32) - 4)


def _k_scales(blocks: Blocks) -> tuple[Floats, Floats]:
    """The scales and minima of the eight groups of Q4_K and Q5_K, [n, 8, 1] each: 6 bits, packed in 12 bytes."""
    scales, minima, rest = np.split(blocks["scales"], 3, axis=1)
    scales = np.concatenate([scales & 63, rest & 15 | scales >> 6 << np.uint8(4)], axis=1)
    minima = np.concatenate([minima & 63, rest >> 4 | minima >> 6 << np.uint8(4)], axis=1)
    wide = _scale(blocks, "d") * scales.astype(np.float32), _scale(blocks, "dmin") * minima.astype(np.float32)
    return wide[0][:, :, None], wide[1][:, :, None]


def _q4_k(blocks: Blocks) -> Floats:
    scales, minima = _k_scales(blocks)
    return scales * _nibbles(blocks["q"], 32).reshape(-1, 8, 32).astype(np.float32) - minima


def _q5_k(blocks: Blocks) -> Floats:
    scales, minima = _k_scales(blocks)
    levels = _nibbles(blocks["q"], 32) | _fields(blocks["high"], 1, 32) << np.uint8(4)
    return scales * levels.reshape(-1, 8, 32).astype(np.float32) - minima


def _q6_k(blocks: Blocks) -> Floats:
    scales = _scale(blocks, "d") * blocks["scales"].astype(np.float32)
    levels = _nibbles(blocks["q"], 64) | _fields(blocks["high"], 2, 32) << np.uint8(4)
    return scales[:, :, None] * (levels.reshape(-1, 16, 16).astype(np.float32) - 32)


# The values of E2M1 (https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _mxfp4(blocks: Blocks) -> Floats:
    exponents = blocks["e"].astype(np.int32)
    scales = np.where(exponents == 255, np.float32(np.nan), np.ldexp(np.float32(1), exponents - 127))
    return scales[:, None].astype(np.float32) * _E2M1[_nibbles(blocks["q"], 16)]


def _type(name: str, size: int, values: Callable[[Blocks], Floats], *fields: tuple[str, str, int]) -> GGMLType:
    block = np.dtype([(field, dtype, (count,)) if count > 1 else (field, dtype) for field, dtype, count in fields])
    return GGMLType(name, size, block.itemsize, block, values)


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
    39: _type("MXFP4", 32, _mxfp4, ("e", "u1", 1), ("q", "u1", 16)),
}


def q4_0_levels(rows: Bytes) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Rows of Q4_0 as they are in the file to integers in -8..7 [n, k] and scales [n, k / 32]."""
    block = GGML_TYPES[2].block
    assert block is not None
    blocks = np.ascontiguousarray(rows).reshape(-1).view(block)
    levels = _nibbles(blocks["q"], 16).astype(np.int8) - np.int8(8)
    return levels.reshape(len(rows), -1), blocks["d"].reshape(len(rows), -1).astype(np.float16)


def mxfp4_codes(rows: Bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Rows of MXFP4 of a file to codes [n, k / 2], two a byte, the even one low, and scales [n, k / 32]."""
    block = GGML_TYPES[39].block
    assert block is not None
    blocks = np.ascontiguousarray(rows).reshape(-1).view(block)
    even, odd = blocks["q"][:, 0::2], blocks["q"][:, 1::2]  # of a block's first half in the low nibbles
    codes = np.concatenate(((even & 15) | (odd & 15) << 4, even >> 4 | odd & 0xF0), axis=1)
    return codes.reshape(len(rows), -1), blocks["e"].reshape(len(rows), -1)
