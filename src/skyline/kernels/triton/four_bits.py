"""Words of eight four-bit integers or floats (skyline.kernels.triton.layouts) as numbers that can be multiplied.

In a GPU's own instructions two neighbours are made at once, in the halves of a register, as triton_kernels of
github.com/triton-lang/triton does it for another order of nibbles. What Triton makes of the same in its own words takes
two to three times as many, and they, not memory, bound products of few rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skyline.kernels.triton.layouts import NVFP4_LESS, SYMMETRIC_ZERO

SYMMETRIC = tl.constexpr(128.0 + SYMMETRIC_ZERO)  # the zero point of `int4_numbers` without one of their own

# bfloat16 is a sign, 8 bits of exponent and 7 of mantissa; a code is a sign, 2 bits and 1. Moved to the lowest bits of
# the exponent and the highest of the mantissa it is the code's number times 2^-126, also where that is subnormal.
_PAIR = (
    "lop3.b32 rest, rest, 0x01C001C0, sign, 0xEA; fma.rn.bf16x2 rest, rest, factor, minus; mov.b32 {$%d, $%d}, rest;"
)
_FP4 = tl.constexpr(
    "{ .reg .b32 sign, rest, minus, factor; mov.b32 minus, 0x80008000; mov.b32 factor, {$9, $9};"
    + "shl.b32 sign, $8, 12; and.b32 sign, sign, minus; shl.b32 rest, $8, 6;"
    + _PAIR % (0, 1)
    + "shl.b32 sign, $8, 8; and.b32 sign, sign, minus; shl.b32 rest, $8, 2;"
    + _PAIR % (2, 3)
    + "shl.b32 sign, $8, 4; and.b32 sign, sign, minus; shr.u32 rest, $8, 2;"
    + _PAIR % (4, 5)
    + "and.b32 sign, $8, minus; shr.u32 rest, $8, 6;"
    + _PAIR % (6, 7)
    + "}"
)
_FP4_OPERANDS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,h")
# Below 2^8 the lowest bits of bfloat16's mantissa are the integer.
_INT4 = tl.constexpr(
    "{ .reg .b32 pair;"
    + "".join(
        f"shr.u32 pair, $8, {4 * j}; lop3.b32 pair, pair, 0x000F000F, 0x43004300, 0xEA;"
        f"mov.b32 {{${2 * j}, ${2 * j + 1}}}, pair;"
        for j in range(4)
    )
    + "}"
)
_INT4_OPERANDS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r")
_SCALE = tl.constexpr(2.0 ** (126 - NVFP4_LESS + 8))


@triton.jit
def fp4_factors(scales, GROUP: tl.constexpr):
    """uint8, of `Fp4Words` of MXFP4 or NVFP4, which the group tells -> float32."""
    if GROUP == 32:
        factors = (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    else:
        # E4M3 moved up is float16, whose exponents are biased by 8 more.
        bits = scales.to(tl.int16)
        moved = (((bits & 127) << 7) | ((bits & 128) << 8)).to(tl.float16, bitcast=True)
        factors = moved.to(tl.float32) * _SCALE
    return factors


@triton.jit
def _e2m1(codes):
    """0..15 -> float32, times 2^-14: moved up they are float16, whose exponents are biased by 14 more."""
    bits = codes.to(tl.int16)
    return (((bits & 7) << 9) | ((bits & 8) << 12)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _biased(nibbles):
    """Integers 0..15 -> 128 more, in bfloat16."""
    return (nibbles.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)


@triton.jit
def _nibble(words, column: tl.constexpr):
    return (words >> (16 * (column % 2) + 4 * (column // 2))) & 15


@triton.jit
def _row(c0, c1, c2, c3, c4, c5, c6, c7):
    """Each word's columns, each [.., N, words] -> rows, [.., N, 8 words]."""
    evens = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    odds = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    if len(c0.shape) == 3:
        rows = tl.reshape(tl.join(evens, odds), (c0.shape[0], c0.shape[1], 8 * c0.shape[2]))
    else:
        rows = tl.reshape(tl.join(evens, odds), (c0.shape[0], 8 * c0.shape[1]))
    return rows


@triton.jit
def _spread(factors, words):
    """[.., N, parts] -> as `words`, [.., N, words], of which each part has as many."""
    EACH: tl.constexpr = words.shape[-1] // factors.shape[-1]
    if len(words.shape) == 3:
        shape: tl.constexpr = (factors.shape[0], factors.shape[1], factors.shape[2], EACH)
        wide = tl.broadcast_to(factors[:, :, :, None], shape)
    else:
        wide = tl.broadcast_to(factors[:, :, None], (factors.shape[0], factors.shape[1], EACH))
    return tl.reshape(wide, words.shape)


@triton.jit
def fp4_numbers(words, factors, NATIVE: tl.constexpr, TYPE: tl.constexpr):
    """words [.., N, words], factors [.., N, parts of a row], as of `fp4_factors` -> [.., N, columns] of TYPE.

    NATIVE: by the GPU's own instructions, in bfloat16.
    """
    each = _spread(factors, words)
    if NATIVE:
        c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
            _FP4,
            _FP4_OPERANDS,
            [words, each.to(tl.bfloat16)],
            dtype=(
                tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
            ),
            is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        factor = each * 1.925929944387236e-34  # 2^-112
        c0 = (_e2m1(_nibble(words, 0)) * factor).to(TYPE)
        c1 = (_e2m1(_nibble(words, 1)) * factor).to(TYPE)
        c2 = (_e2m1(_nibble(words, 2)) * factor).to(TYPE)
        c3 = (_e2m1(_nibble(words, 3)) * factor).to(TYPE)
        c4 = (_e2m1(_nibble(words, 4)) * factor).to(TYPE)
        c5 = (_e2m1(_nibble(words, 5)) * factor).to(TYPE)
        c6 = (_e2m1(_nibble(words, 6)) * factor).to(TYPE)
        c7 = (_e2m1(_nibble(words, 7)) * factor).to(TYPE)
    return _row(c0, c1, c2, c3, c4, c5, c6, c7)


@triton.jit
def a_byte(weight, N: tl.constexpr, NATIVE: tl.constexpr):
    """[N] uint8, of `weight`: for `int4_numbers`, which does not use it.

    Triton holds an operand of the matrix unit as it was read if its numbers come of a load of bytes, and carries it
    through shared memory if they come of words. Those of FP4 have bytes for scales.
    """
    return tl.load(weight.to(tl.pointer_type(tl.uint8)) + tl.arange(0, N) // N) if NATIVE else 0


@triton.jit
def int4_numbers(words, byte, NATIVE: tl.constexpr):
    """[.., N, words] -> [.., N, columns] bfloat16: 128 more than the integers 0..15, which are exact so."""
    if NATIVE:
        nothing = byte.to(tl.int32) >> 8
        words = words | (nothing[None, :, None] if len(words.shape) == 3 else nothing[:, None])
        c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
            _INT4,
            _INT4_OPERANDS,
            [words],
            dtype=(
                tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
            ),
            is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        c0, c1 = _biased(_nibble(words, 0)), _biased(_nibble(words, 1))
        c2, c3 = _biased(_nibble(words, 2)), _biased(_nibble(words, 3))
        c4, c5 = _biased(_nibble(words, 4)), _biased(_nibble(words, 5))
        c6, c7 = _biased(_nibble(words, 6)), _biased(_nibble(words, 7))
    return _row(c0, c1, c2, c3, c4, c5, c6, c7)
