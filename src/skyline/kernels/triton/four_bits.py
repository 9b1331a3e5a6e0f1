"""Four-bit integers, and floats and their scales (skyline.ops.fp4), as numbers that can be multiplied."""

from __future__ import annotations

import triton
import triton.language as tl

from skyline.kernels.triton.layouts import SYMMETRIC_ZERO

SYMMETRIC = tl.constexpr(128.0 + SYMMETRIC_ZERO)  # the zero point of `biased` integers without one of their own


@triton.jit
def e2m1(codes):
    """Codes 0..15 -> float32, times 2^-14: moved up they are float16, whose exponents are biased by 14 more."""
    bits = codes.to(tl.int16)
    return (((bits & 7) << 9) | ((bits & 8) << 12)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def fp4_scales(codes, GROUP: tl.constexpr):
    """uint8, of MXFP4 or NVFP4, which the group tells -> float32, times 2^14."""
    if GROUP == 32:
        scales = ((codes.to(tl.int32) + 14) << 23).to(tl.float32, bitcast=True)
    else:
        # E4M3 moved up is float16, whose exponents are biased by 8 more.
        bits = codes.to(tl.int16)
        moved = (((bits & 127) << 7) | ((bits & 128) << 8)).to(tl.float16, bitcast=True)
        scales = moved.to(tl.float32) * 4194304.0
    return scales


@triton.jit
def scaled(values, scales, SPLIT: tl.constexpr, BAND: tl.constexpr, HALF: tl.constexpr, EACH: tl.constexpr):
    """values [.., BAND, HALF] times scales [.., BAND, HALF / EACH], each for EACH neighbours."""
    if SPLIT > 1:
        grouped = tl.reshape(values, (SPLIT, BAND, HALF // EACH, EACH)) * scales[:, :, :, None]
        result = tl.reshape(grouped, (SPLIT, BAND, HALF))
    else:
        result = tl.reshape(tl.reshape(values, (BAND, HALF // EACH, EACH)) * scales[:, :, None], (BAND, HALF))
    return result


@triton.jit
def biased(nibbles):
    """Integers 0..15 -> 128 more, in bfloat16: below 2^8 the lowest bits of its mantissa are the integer."""
    return (nibbles.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)
