"""Four-bit weights in the type of x, for so many rows of x that cuBLAS makes up for writing and reading them.

A product's tiles each widen their part of the weight again, and wait for it; cuBLAS does neither.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.device import has_assembly, overlaps
from skyline.kernels.triton.four_bits import (
    KIND_FP4,
    KIND_INT4,
    a_byte,
    fp4_factors,
    fp4_numbers,
    int4_numbers,
    int4_scales,
)
from skyline.kernels.triton.layouts import WORD, Operands, Words
from skyline.kernels.triton.sizes import cdiv

_BAND, _STEP = 16, 32  # rows, and words of eight


@triton.jit
def _widen_kernel(
    weight,  # [N, weight_stride] int32, of eight a word
    scales,  # int4: [groups, N] float16. FP4: [N, scale_stride] uint8
    zeros,  # like scales, of int4
    row_scales,  # [N] float32, of FP4
    wide,  # [N, K]; of FP4 bfloat16
    n,
    k,
    groups,  # ceil(K / GROUP)
    weight_stride,
    scale_stride,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    BAND: tl.constexpr,
    STEP: tl.constexpr,  # words
    NATIVE: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0) * BAND + tl.arange(0, BAND)
    safe = tl.where(row < n, row, 0).to(tl.int64)
    first = tl.program_id(1) * STEP
    word = first + tl.arange(0, STEP)
    words = tl.load(
        weight + (safe * weight_stride)[:, None] + word[None, :], mask=(word < weight_stride)[None, :], other=0
    )
    group = first * 8 // GROUP + tl.arange(0, STEP * 8 // GROUP)
    known = (group < groups)[None, :]
    TYPE: tl.constexpr = wide.dtype.element_ty
    if KIND == KIND_FP4:
        scale = tl.load(scales + (safe * scale_stride)[:, None] + group[None, :], mask=known, other=0)
        numbers = fp4_numbers(words, fp4_factors(scale, GROUP), NATIVE, tl.float32)
        numbers = numbers.to(tl.float32) * tl.load(row_scales + safe)[:, None]
    else:
        at = group.to(tl.int64)[None, :] * n + safe[:, None]
        scale, zero = int4_scales(scales, zeros, at, known, ZEROS)
        numbers = int4_numbers(words, a_byte(weight, BAND, NATIVE), scale, zero, NATIVE, TYPE)
    if EARLY:  # until then nothing was written, and nothing read that any launch writes
        gdc_wait()
        gdc_launch_dependents()
    column = first * 8 + tl.arange(0, STEP * 8)
    inside = (row < n)[:, None] & (column < k)[None, :]
    tl.store(wide + (safe * k)[:, None] + column[None, :], numbers.to(TYPE), mask=inside)


def widen(weight: Words, dtype: torch.dtype) -> Tensor:
    """A matrix [N, K] in bfloat16, in which MXFP4 is exact, or, of int4, in float16."""
    (n, k), device, given = weight.shape, weight.values.device, Operands.of(weight)
    wide = torch.empty((n, k), dtype=dtype, device=device)
    early = overlaps(device)
    _widen_kernel[(cdiv(n, _BAND), cdiv(k, _STEP * WORD))](
        given.values,
        given.scales,
        given.zeros,
        given.row_scales,
        wide,
        n,
        k,
        given.groups,
        given.weight_stride,
        given.scale_stride,
        KIND=KIND_FP4 if given.fp4 else KIND_INT4,
        ZEROS=given.has_zeros,
        GROUP=weight.group,
        BAND=_BAND,
        STEP=_STEP,
        NATIVE=has_assembly(device),
        EARLY=early,
        launch_pdl=early,
    )
    return wide
