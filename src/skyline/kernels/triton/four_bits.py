"""Words of eight four-bit integers or floats (skyline.kernels.triton.layouts) as numbers that can be multiplied.

In a GPU's own instructions two neighbours are made at once, in the halves of a register, as triton_kernels of
github.com/triton-lang/triton does it for another order of nibbles. What Triton makes of the same in its own words takes
two to three times as many, and they, not memory, bound products of few rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skyline.kernels.triton.layouts import NVFP4_LESS, SYMMETRIC_ZERO

SYMMETRIC = tl.constexpr(float(SYMMETRIC_ZERO))  # the zero point of int4 without one of their own
KIND_FP4, KIND_INT4 = (tl.constexpr(kind) for kind in range(2))

# bfloat16 is a sign, 8 bits of exponent and 7 of mantissa; a code is a sign, 2 bits and 1. Moved to the lowest bits of
# the exponent and the highest of the mantissa it is the code's number times 2^-126, also where that is subnormal.
_PAIR = (
    "lop3.b32 rest, rest, 0x01C001C0, sign, 0xEA; fma.rn.bf16x2 rest, rest, factor, minus; mov.b32 {$%d, $%d}, rest;"
)
_FP4_PTX = tl.constexpr(
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
# Below 2^8 the lowest bits of bfloat16's mantissa are the integer, 128 more than it, exactly; below 2^11 those of
# float16's, 1024 more. That, and the zero point but for its fraction, is taken off before the scale is multiplied:
# times the scale it would be rounded.
_INT4_PAIR = "shr.u32 pair, $%d, %d; lop3.b32 pair, pair, 0x000F000F, %s, 0xEA;"
_BIASED, _HALF_BIASED = "0x43004300", "0x64006400"


def _int4_ptx(type: str, one: str, biased: str) -> tl.constexpr:
    return tl.constexpr(
        f"{{ .reg .b32 pair, one, less, scale, rest; mov.b32 one, {one};"
        "mov.b32 scale, {$9, $9}; mov.b32 less, {$10, $10}; mov.b32 rest, {$11, $11};"
        + "".join(
            _INT4_PAIR
            % (8, 4 * j, biased)
            + f"fma.rn.{type} pair, pair, one, less; fma.rn.{type} pair, pair, scale, rest;"
            f"mov.b32 {{${2 * j}, ${2 * j + 1}}}, pair;"
            for j in range(4)
        )
        + "}"
    )


_INT4_PTX = _int4_ptx("bf16x2", "0x3F803F80", _BIASED)
_INT4_HALF_PTX = _int4_ptx("f16x2", "0x3C003C00", _HALF_BIASED)
_INT4_OPERANDS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,h,h,h")

# A word's eight numbers times as many of x, in float32: two neighbours lie in the halves of a register as above, each
# of which is the upper half of a float32. FP4 come out 2^126 too small, which x makes up for.
_SUM = (
    "shl.b32 low, pair, 16; and.b32 high, pair, 0xFFFF0000; mov.b32 a, low; mov.b32 b, high;"
    "fma.rn.f32 $0, a, $%d, $0; fma.rn.f32 $0, b, $%d, $0;"
)
_FP4_SHIFTS = ((12, "shl.b32", 6), (8, "shl.b32", 2), (4, "shr.u32", 2), (0, "shr.u32", 6))
_TIMES_FP4 = tl.constexpr(
    "{ .reg .b32 sign, pair, low, high; .reg .f32 a, b; mov.f32 $0, 0f00000000;"
    + "".join(
        f"shl.b32 sign, $1, {up}; and.b32 sign, sign, 0x80008000; {shift} pair, $1, {by};"
        "lop3.b32 pair, pair, 0x01C001C0, sign, 0xEA;" + _SUM % (2 * j + 2, 2 * j + 3)
        for j, (up, shift, by) in enumerate(_FP4_SHIFTS)
    )
    + "}"
)
_TIMES_INT4 = tl.constexpr(
    "{ .reg .b32 pair, low, high; .reg .f32 a, b; mov.f32 $0, 0f00000000;"
    + "".join(_INT4_PAIR % (1, 4 * j, _BIASED) + _SUM % (2 * j + 2, 2 * j + 3) for j in range(4))
    + "}"
)
_TIMES_OPERANDS = tl.constexpr("=&f,r,f,f,f,f,f,f,f,f")
# Of x, so that neither the products nor a group's scale times them leave float32, whose exponents x may have but for
# the 63 largest.
_RAISED = tl.constexpr(2.0**63)
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
            _FP4_PTX,
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
def int4_scales(scales, zeros, at, known, ZEROS: tl.constexpr):
    """Scales and zero points at `at`, float32; where nothing is `known` the scale is 0."""
    scale = tl.load(scales + at, mask=known, other=0.0).to(tl.float32)
    zero = tl.full(scale.shape, SYMMETRIC, tl.float32)
    if ZEROS:
        zero = tl.load(zeros + at, mask=known, other=0.0).to(tl.float32)
    return scale, zero


@triton.jit
def _less(nibbles, zero, scale, TYPE: tl.constexpr):
    return ((nibbles.to(tl.float32) - zero) * scale).to(TYPE)


@triton.jit
def int4_numbers(words, byte, scales, zeros, NATIVE: tl.constexpr, dtype: tl.constexpr):
    """words [.., N, words]; scales, zeros float32 [.., N, parts of a row] -> [.., N, columns] of dtype.

    NATIVE: by the GPU's own instructions where dtype is bfloat16 or float16, to which scales, too, are rounded then.
    """
    scale = _spread(scales, words)
    if NATIVE and (dtype == tl.bfloat16 or dtype == tl.float16):
        BIAS: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
        less = (-BIAS - tl.floor(zeros + 0.5)).to(dtype)
        rest = ((-BIAS - less.to(tl.float32) - zeros) * scales).to(dtype)
        nothing = byte.to(tl.int32) >> 8
        words = words | (nothing[None, :, None] if len(words.shape) == 3 else nothing[:, None])
        operands = words, scale.to(dtype), _spread(less, words), _spread(rest, words)
        if dtype == tl.bfloat16:
            c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
                _INT4_PTX,
                _INT4_OPERANDS,
                operands,
                dtype=(
                    tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
                    tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
                ),
                is_pure=True,
                pack=1,
            )  # fmt: skip
        else:
            c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
                _INT4_HALF_PTX,
                _INT4_OPERANDS,
                operands,
                dtype=(
                    tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16,
                ),
                is_pure=True,
                pack=1,
            )  # fmt: skip
    else:
        zero = _spread(zeros, words)
        c0, c1 = _less(_nibble(words, 0), zero, scale, dtype), _less(_nibble(words, 1), zero, scale, dtype)
        c2, c3 = _less(_nibble(words, 2), zero, scale, dtype), _less(_nibble(words, 3), zero, scale, dtype)
        c4, c5 = _less(_nibble(words, 4), zero, scale, dtype), _less(_nibble(words, 5), zero, scale, dtype)
        c6, c7 = _less(_nibble(words, 6), zero, scale, dtype), _less(_nibble(words, 7), zero, scale, dtype)
    return _row(c0, c1, c2, c3, c4, c5, c6, c7)


@triton.jit
def _halves(pairs):
    """int32 of two bfloat16 -> float32, the lower and the upper one."""
    return (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _eighth(at, word, k, PLACE: tl.constexpr):
    column = 8 * word + PLACE
    return tl.load(at + column, mask=column < k, other=0.0).to(tl.float32)


@triton.jit
def eights(at, first, k, STEP: tl.constexpr, WHOLE: tl.constexpr):
    """Numbers [K] at `at`, STEP words of eight from word `first` on, float32: each word's first to eighth [STEP].

    Behind the last they are zeros. WHOLE: they are bfloat16, as skyline.kernels.triton.device.reads_whole has it of 8.
    """
    word = first + tl.arange(0, STEP)
    if WHOLE:
        # Each thread loads what it multiplies: a tile that Triton loads, and splits, goes through shared memory.
        inside = 8 * word < k
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [at.to(tl.int64) + 16 * tl.where(inside, word, 0).to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,  # it may not move ahead of a wait
            pack=1,
        )
        x0, x1 = _halves(tl.where(inside, p0, 0))
        x2, x3 = _halves(tl.where(inside, p1, 0))
        x4, x5 = _halves(tl.where(inside, p2, 0))
        x6, x7 = _halves(tl.where(inside, p3, 0))
    else:
        x0, x1, x2 = _eighth(at, word, k, 0), _eighth(at, word, k, 1), _eighth(at, word, k, 2)
        x3, x4, x5 = _eighth(at, word, k, 3), _eighth(at, word, k, 4), _eighth(at, word, k, 5)
        x6, x7 = _eighth(at, word, k, 6), _eighth(at, word, k, 7)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _scale_bits(at, SIZE: tl.constexpr, NATIVE: tl.constexpr):
    """What is at these addresses: uint8 as int32, or float16. Loaded by the threads that use it, as in `eights`."""
    if not NATIVE:
        bits = tl.load(at)
    elif SIZE == 1:
        bits = tl.inline_asm_elementwise(
            "ld.global.u8 $0, [$1];", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        bits = tl.inline_asm_elementwise(
            "ld.global.u16 $0, [$1];", "=h,l", [at.to(tl.int64)], dtype=tl.int16, is_pure=True, pack=1
        ).to(tl.float16, bitcast=True)
    return bits


@triton.jit
def times_words(
    words, x0, x1, x2, x3, x4, x5, x6, x7, scale_at, zero_at, group, groups, stride,
    KIND: tl.constexpr, ZEROS: tl.constexpr, GROUP: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Each of words [N, STEP] as eight numbers, times eight of x, each [1, STEP], summed up: float32 [N, STEP].

    scale_at, zero_at: addresses [N] of each row's first scale, and zero point with ZEROS; its others lie `stride` on
    from each other. Of its `groups`, those from `group` on belong to its words. Scales are float16 of int4, uint8 of
    FP4, as in skyline.kernels.triton.layouts. What comes out of FP4 is too large, until `lowered`.
    """
    PARTS: tl.constexpr = words.shape[1] * 8 // GROUP
    part = tl.minimum(group + tl.arange(0, PARTS), groups - 1).to(tl.int64) * stride  # what lies behind is times 0
    if KIND == KIND_FP4:
        factors = fp4_factors(_scale_bits(scale_at[:, None] + part[None, :], 1, NATIVE), GROUP)
        if NATIVE:
            sums = tl.inline_asm_elementwise(
                _TIMES_FP4,
                _TIMES_OPERANDS,
                [
                    words, x0 * _RAISED, x1 * _RAISED, x2 * _RAISED, x3 * _RAISED,
                    x4 * _RAISED, x5 * _RAISED, x6 * _RAISED, x7 * _RAISED,
                ],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )  # fmt: skip
        else:
            factors *= 1.925929944387236e-34  # 2^-112
            sums = _e2m1(_nibble(words, 0)) * x0 + _e2m1(_nibble(words, 1)) * x1
            sums += _e2m1(_nibble(words, 2)) * x2 + _e2m1(_nibble(words, 3)) * x3
            sums += _e2m1(_nibble(words, 4)) * x4 + _e2m1(_nibble(words, 5)) * x5
            sums += _e2m1(_nibble(words, 6)) * x6 + _e2m1(_nibble(words, 7)) * x7
    else:
        factors = _scale_bits(scale_at[:, None] + part[None, :], 2, NATIVE).to(tl.float32)
        zero = SYMMETRIC
        if ZEROS:
            zero = _spread(_scale_bits(zero_at[:, None] + part[None, :], 2, NATIVE).to(tl.float32), words)
        of_x = ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))
        if NATIVE:
            sums = tl.inline_asm_elementwise(
                _TIMES_INT4,
                _TIMES_OPERANDS,
                [words, x0, x1, x2, x3, x4, x5, x6, x7],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
            sums -= of_x * (zero + 128.0)
        else:
            sums = _nibble(words, 0) * x0 + _nibble(words, 1) * x1 + _nibble(words, 2) * x2 + _nibble(words, 3) * x3
            sums += _nibble(words, 4) * x4 + _nibble(words, 5) * x5 + _nibble(words, 6) * x6 + _nibble(words, 7) * x7
            sums -= of_x * zero
    return sums * _spread(factors, words)


@triton.jit
def lowered(sums, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Sums of `times_words` as they should be."""
    return sums * 1.0842021724855044e-19 if KIND == KIND_FP4 and NATIVE else sums  # 2^-63
