"""Triton kernels of linear layers: of one row of x, of a few in FP8, and of many in FP8 with scales by block.

linear.py says when each is launched.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def tile_and_band(tiles, bands, TOGETHER: tl.constexpr):
    """A program's tile of rows and band of the weight: TOGETHER tiles go by before the next band is read."""
    program = tl.program_id(0)
    first = program // (TOGETHER * bands) * TOGETHER
    height = tl.minimum(tiles - first, TOGETHER)
    rest = program % (TOGETHER * bands)
    return first + rest % height, rest // height


@triton.jit
def _finish(
    result, second, bias, residual, y, own, safe, n, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr
):  # fmt: skip
    """What comes behind the products of one row, and where it goes: own, of which those below n are there, as safe."""
    if BIAS:
        result += tl.load(bias + safe).to(tl.float32)
        if GATED:
            second += tl.load(bias + n + safe).to(tl.float32)
    if GATED:
        result = result * tl.sigmoid(result) * second
    if RESIDUAL:
        result += tl.load(residual + safe).to(tl.float32)
    tl.store(y + own, result.to(y.dtype.element_ty), mask=own < n)


@triton.jit
def vector_kernel(
    x,  # [K]
    weight,  # [N, K]
    bias,  # [N]
    norm,  # [K]
    residual,  # [columns of y]
    y,  # [N], or [N / 2]
    n,  # columns of y
    k,
    weight_stride,
    eps,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BAND: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
):
    own = tl.program_id(0) * BAND + tl.arange(0, BAND)
    inside = own < n
    safe = tl.where(inside, own, 0)
    steps = tl.arange(0, STEP)
    gate_at = weight + safe.to(tl.int64)[:, None] * weight_stride + steps[None, :]
    up_at = gate_at + n * weight_stride.to(tl.int64) if GATED else gate_at
    gate = tl.zeros((BAND, STEP), tl.float32)
    up = tl.zeros((BAND, STEP), tl.float32)
    squares = tl.zeros((STEP,), tl.float32)
    # Of all inputs the weight alone is there before the launch before this one has ended: begin with it.
    left = (steps < k)[None, :]
    part = tl.load(gate_at, mask=left, other=0.0)
    other = tl.load(up_at, mask=left, other=0.0) if GATED else part
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    for first in range(0, k, STEP):
        there = first + steps < k
        values = tl.load(x + first + steps, mask=there, other=0.0).to(tl.float32)
        if NORM:
            squares += values * values
            values *= tl.load(norm + first + steps, mask=there, other=0.0).to(tl.float32)
        mine, theirs = part.to(tl.float32), other.to(tl.float32)
        left = (first + STEP + steps < k)[None, :]
        part = tl.load(gate_at + first + STEP, mask=left, other=0.0)
        if GATED:
            other = tl.load(up_at + first + STEP, mask=left, other=0.0)
        gate += mine * values[None, :]
        if GATED:
            up += theirs * values[None, :]
    result, second = tl.sum(gate, 1), tl.sum(up, 1)
    if NORM:
        root = tl.rsqrt(tl.sum(squares, 0) / k + eps)
        result *= root
        second *= root
    _finish(result, second, bias, residual, y, own, safe, n, GATED, BIAS, RESIDUAL)


@triton.jit
def times_word(word, x0, x1, x2, x3, total, NATIVE: tl.constexpr):
    """total + the product of the four FP8 numbers in each word, first in its lowest byte, and four numbers of x."""
    if NATIVE:  # what a compiler makes of bytes takes twice as many instructions, and they are what bounds this
        return tl.inline_asm_elementwise(
            """
            { .reg .b16 low, high, first, second; .reg .b32 pair; .reg .f32 a, b, sum;
            mov.b32 {low, high}, $1;
            cvt.rn.f16x2.e4m3x2 pair, low; mov.b32 {first, second}, pair;
            cvt.f32.f16 a, first; cvt.f32.f16 b, second;
            fma.rn.f32 sum, a, $2, $6; fma.rn.f32 sum, b, $3, sum;
            cvt.rn.f16x2.e4m3x2 pair, high; mov.b32 {first, second}, pair;
            cvt.f32.f16 a, first; cvt.f32.f16 b, second;
            fma.rn.f32 sum, a, $4, sum; fma.rn.f32 $0, b, $5, sum; }
            """,
            "=f,r,f,f,f,f,f",
            [word, x0, x1, x2, x3, total],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    total += (word & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32) * x0
    total += ((word >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32) * x1
    total += ((word >> 16) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32) * x2
    total += ((word >> 24) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32) * x3
    return total


@triton.jit
def fours(at, first, words, STEP: tl.constexpr, WHOLE: tl.constexpr):
    """4 * STEP numbers from `first` words of four on, float32: each word's first, second, third and fourth [STEP].

    Behind the last of `words` they are zeros, or those of the last word again. WHOLE: they are bfloat16, as
    skyline.kernels.triton.device.reads_whole has it of 4.
    """
    if WHOLE:
        # Each thread loads what it multiplies: a tile that Triton loads, and splits, goes through shared memory.
        word = first + tl.arange(0, STEP)
        low, high = tl.inline_asm_elementwise(
            "ld.global.v2.b32 {$0, $1}, [$2];",
            "=r,=r,l",
            [at.to(tl.int64) + 8 * tl.minimum(word, words - 1).to(tl.int64)],
            dtype=(tl.int32, tl.int32),
            is_pure=False,  # it may not move ahead of a wait
            pack=1,
        )
        x0, x1 = (low << 16).to(tl.float32, bitcast=True), (low & -65536).to(tl.float32, bitcast=True)
        x2, x3 = (high << 16).to(tl.float32, bitcast=True), (high & -65536).to(tl.float32, bitcast=True)
    else:
        numbers = 4 * first + tl.arange(0, 4 * STEP)
        values = tl.load(at + numbers, mask=numbers < 4 * words, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(values, (STEP, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def fp8_vector_kernel(
    x,  # [K]
    weight,  # [N, K / 4] int32, of float8_e4m3fn
    scales,  # [N], or [ceil(N / 128), ceil(K / 128)]
    bias,  # [N]
    norm,  # [K]
    residual,  # [columns of y]
    y,  # [N], or [N / 2]
    n,  # columns of y
    words,  # K / 4
    scale_columns,
    eps,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCKS: tl.constexpr,
    BAND: tl.constexpr,  # divides 128; with blocks and GATED also n
    STEP: tl.constexpr,  # words
    NATIVE: tl.constexpr,
    WHOLE: tl.constexpr,  # of x and norm, as in `fours`
    EARLY: tl.constexpr,
):
    own = tl.program_id(0) * BAND + tl.arange(0, BAND)
    inside = own < n
    safe = tl.where(inside, own, 0)
    steps = tl.arange(0, STEP)
    gate_at = weight + safe.to(tl.int64)[:, None] * words + steps[None, :]
    up_at = gate_at + n.to(tl.int64) * words if GATED else gate_at
    gate = tl.zeros((BAND, STEP), tl.float32)
    up = tl.zeros((BAND, STEP), tl.float32)
    nothing = tl.zeros((BAND, STEP), tl.float32)
    squares = tl.zeros((STEP,), tl.float32)
    left = (steps < words)[None, :]
    part = tl.load(gate_at, mask=left, other=0)  # ahead of the wait, as in vector_kernel
    other = tl.load(up_at, mask=left, other=0) if GATED else part
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    for first in range(0, words, STEP):
        x0, x1, x2, x3 = fours(x, first, words, STEP, WHOLE)
        if NORM:
            squares += tl.where(first + steps < words, x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3, 0.0)
            w0, w1, w2, w3 = fours(norm, first, words, STEP, WHOLE)
            x0, x1, x2, x3 = x0 * w0, x1 * w1, x2 * w2, x3 * w3
        x0, x1, x2, x3 = x0[None, :], x1[None, :], x2[None, :], x3[None, :]
        left = (first + STEP + steps < words)[None, :]
        if BLOCKS:
            block = (first + steps) // 32  # of 128 columns
            block_row = scales + tl.program_id(0) * BAND // 128 * scale_columns
            scale = tl.load(block_row + block, mask=first + steps < words, other=0.0)
            gate += times_word(part, x0, x1, x2, x3, nothing, NATIVE) * scale[None, :]
        else:
            gate = times_word(part, x0, x1, x2, x3, gate, NATIVE)
        part = tl.load(gate_at + first + STEP, mask=left, other=0)
        if GATED:
            if BLOCKS:
                block_row = scales + (n + tl.program_id(0) * BAND) // 128 * scale_columns
                scale = tl.load(block_row + block, mask=first + steps < words, other=0.0)
                up += times_word(other, x0, x1, x2, x3, nothing, NATIVE) * scale[None, :]
            else:
                up = times_word(other, x0, x1, x2, x3, up, NATIVE)
            other = tl.load(up_at + first + STEP, mask=left, other=0)
    result, second = tl.sum(gate, 1), tl.sum(up, 1)
    if NORM:
        root = tl.rsqrt(tl.sum(squares, 0) / (4 * words) + eps)
        result *= root
        second *= root
    if not BLOCKS:
        result *= tl.load(scales + safe)
        if GATED:
            second *= tl.load(scales + n + safe)
    _finish(result, second, bias, residual, y, own, safe, n, GATED, BIAS, RESIDUAL)


@triton.jit(do_not_specialize=["rows"])
def bands_kernel(
    x,  # [T, K] float8_e4m3fn
    x_scales,  # [T, 1], or [T, ceil(K / 128)] if BLOCKS or X_BLOCKS
    weight,  # [N, K] float8_e4m3fn
    scales,  # [N], or [ceil(N / 128), ceil(K / 128)] if BLOCKS
    bias,  # [N]
    residual,  # [T, columns of y]
    y,  # [T, N], or [T, N / 2]
    rows,
    n,  # columns of y
    k,
    groups,  # ceil(K / 128)
    residual_stride,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCKS: tl.constexpr,
    X_BLOCKS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,  # of x, padded
    BAND: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
):
    # The weight's rows are those of the product: its matrix units take 64 of them at least, and x may have few.
    own = tl.program_id(0) * BAND + tl.arange(0, BAND)
    inside = own < n
    safe = tl.where(inside, own, 0)
    row = tl.arange(0, ROWS)
    safe_row = tl.where(row < rows, row, 0)
    steps = tl.arange(0, STEP)
    x_at = x + safe_row[None, :] * k + steps[:, None]
    gate_at = weight + safe.to(tl.int64)[:, None] * k + steps[None, :]
    up_at = gate_at + n.to(tl.int64) * k if GATED else gate_at
    gate = tl.zeros((BAND, ROWS), tl.float32)
    up = tl.zeros((BAND, ROWS), tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    for first in range(0, k, STEP):
        if EVEN_K:
            values, part = tl.load(x_at + first), tl.load(gate_at + first)
            other = tl.load(up_at + first) if GATED else part
        else:
            left = first + steps < k
            values = tl.load(x_at + first, mask=left[:, None], other=0.0)
            part = tl.load(gate_at + first, mask=left[None, :], other=0.0)
            other = tl.load(up_at + first, mask=left[None, :], other=0.0) if GATED else part
        if BLOCKS:
            at = first // 128
            theirs = tl.load(x_scales + safe_row * groups + at)[None, :]
            mine = tl.load(scales + (safe // 128) * groups + at)[:, None]
            gate += tl.dot(part, values) * (mine * theirs)
            if GATED:
                mine = tl.load(scales + ((safe + n) // 128) * groups + at)[:, None]
                up += tl.dot(other, values) * (mine * theirs)
        elif X_BLOCKS:
            theirs = tl.load(x_scales + safe_row * groups + first // 128)[None, :]
            gate += tl.dot(part, values) * theirs
            if GATED:
                up += tl.dot(other, values) * theirs
        else:
            gate = tl.dot(part, values, gate)
            if GATED:
                up = tl.dot(other, values, up)
    if not BLOCKS:
        gate *= tl.load(scales + safe)[:, None]
        if GATED:
            up *= tl.load(scales + n + safe)[:, None]
        if not X_BLOCKS:
            theirs = tl.load(x_scales + safe_row)[None, :]
            gate *= theirs
            up *= theirs
    if BIAS:
        gate += tl.load(bias + safe).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(bias + n + safe).to(tl.float32)[:, None]
    if GATED:
        gate = gate * tl.sigmoid(gate) * up
    writes = inside[:, None] & (row < rows)[None, :]
    if RESIDUAL:
        at = safe_row.to(tl.int64)[None, :] * residual_stride + own[:, None]
        gate += tl.load(residual + at, mask=writes, other=0.0).to(tl.float32)
    tl.store(y + row.to(tl.int64)[None, :] * n + own[:, None], gate.to(y.dtype.element_ty), mask=writes)


@triton.jit
def quantize_kernel(
    x,  # [T, K], or [T, 2 K] if GATED
    norm,  # [K]
    values,  # [T, K] float8_e4m3fn
    scales,  # [T, 1], or [T, ceil(K / 128)]
    k,
    x_stride,
    groups,
    eps,
    MAX: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    GROUPS: tl.constexpr,  # of 128 that a row has, a power of two; 1 and all of K without blocks
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    columns = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    left = columns < k
    wide = tl.load(x + row * x_stride + columns, mask=left, other=0.0).to(tl.float32)
    if GATED:
        wide *= tl.sigmoid(wide) * tl.load(x + row * x_stride + k + columns, mask=left, other=0.0).to(tl.float32)
    if NORM:
        root = tl.rsqrt(tl.sum(tl.sum(wide * wide, 1), 0) / k + eps)
        wide *= root * tl.load(norm + columns, mask=left, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(wide), 1)
    scale = tl.where(largest > 0, largest / MAX, 1.0)
    tl.store(values + row * k + columns, (wide / scale[:, None]).to(values.dtype.element_ty), mask=left)
    tl.store(scales + row * groups + group, scale, mask=group < groups)


@triton.jit(do_not_specialize=["rows"])
def tiles_kernel(
    x,  # [T, K] float8_e4m3fn
    x_scales,  # [T, 1] or [T, ceil(K / 128)]
    weight,  # [N, K] float8_e4m3fn
    scales,  # [N] or [ceil(N / 128), ceil(K / 128)]
    y,  # [T, N] float32 or as x was
    rows,
    n,
    k,
    groups,
    BLOCKS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    BAND: tl.constexpr,
    STEP: tl.constexpr,  # 128 with blocks
    TOGETHER: tl.constexpr,  # as in `tile_and_band`
):
    tile, band = tile_and_band(tl.cdiv(rows, ROWS), tl.cdiv(n, BAND), TOGETHER)
    row = tile * ROWS + tl.arange(0, ROWS)
    own = band * BAND + tl.arange(0, BAND)
    steps = tl.arange(0, STEP)
    safe_row, safe = tl.where(row < rows, row, 0), tl.where(own < n, own, 0)
    x_at = x + safe_row.to(tl.int64)[:, None] * k + steps[None, :]
    weight_at = weight + safe.to(tl.int64)[None, :] * k + steps[:, None]
    total = tl.zeros((ROWS, BAND), tl.float32)
    for first in range(0, k, STEP):
        if EVEN_K:
            a, b = tl.load(x_at + first), tl.load(weight_at + first)
        else:
            left = first + steps < k
            a = tl.load(x_at + first, mask=left[None, :], other=0.0)
            b = tl.load(weight_at + first, mask=left[:, None], other=0.0)
        if BLOCKS:
            at = first // 128
            mine = tl.load(x_scales + safe_row * groups + at)
            theirs = tl.load(scales + (safe // 128) * groups + at)
            total += tl.dot(a, b) * (mine[:, None] * theirs[None, :])
        else:
            total = tl.dot(a, b, total)
    if not BLOCKS:
        total *= tl.load(x_scales + safe_row)[:, None] * tl.load(scales + safe)[None, :]
    at = row.to(tl.int64)[:, None] * n + own[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (own < n)[None, :])
