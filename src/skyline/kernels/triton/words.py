"""One row of x times four-bit weights: their words are streamed past the row, which is normed on the way.

Nothing here uses the matrix unit, which has no use for one row: threads multiply in float32 what they have read
themselves, so that nothing goes through shared memory before the sums. Experts of one token are two launches: gate and
up of all that it has chosen, then their down rows, which each program adds up.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.device import has_assembly, overlaps, reads_whole
from skyline.kernels.triton.four_bits import KIND_FP4, KIND_INT4, eights, lowered, times_words
from skyline.kernels.triton.knobs import current
from skyline.kernels.triton.layouts import WORD, Operands, Words
from skyline.kernels.triton.moe_products import activated
from skyline.kernels.triton.sizes import cdiv, next_power_of_2


@triton.jit
def _product_kernel(
    x,  # [1, K], or [T, K] of experts
    weight,  # [N, weight_stride] int32, of eight a word; [E, N, weight_stride] of experts
    scales,  # int4: [.., groups, N] float16. FP4: [.., N, scale_stride] uint8
    zeros,  # like scales
    row_scales,  # [.., N] float32, of FP4
    bias,  # [.., N]
    norm,  # [K]
    residual,  # [columns of y]
    ids,  # [T * TOP_K] int64, of experts
    y,  # [1, n], or [T * TOP_K, n] of experts
    n,  # columns of y: N, or N / 2
    outputs,  # N
    k,
    groups,  # ceil(K / GROUP)
    weight_stride,
    scale_stride,
    x_stride,
    eps,
    alpha,
    limit,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    CLAMPED: tl.constexpr,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BAND: tl.constexpr,
    STEP: tl.constexpr,  # words
    NATIVE: tl.constexpr,
    WHOLE: tl.constexpr,  # of x, and norm, as in `eights`
    EARLY: tl.constexpr,
):
    own = tl.program_id(0) * BAND + tl.arange(0, BAND)
    safe = tl.where(own < n, own, 0).to(tl.int64)
    step = tl.arange(0, STEP)
    pair = tl.program_id(1)
    first_row = tl.zeros((1,), tl.int64)
    if EXPERTS:
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        first_row += tl.load(ids + pair) * outputs
        x += (pair // TOP_K).to(tl.int64) * x_stride
    row = first_row + safe
    gate_at = weight + (row * weight_stride)[:, None] + step[None, :]
    up_at = gate_at + n.to(tl.int64) * weight_stride if GATED else gate_at
    # Of all inputs the weight alone is there before the launch before this one has ended: begin with it.
    inside = (step < weight_stride)[None, :]
    part = tl.load(gate_at, mask=inside, other=0)
    other = tl.load(up_at, mask=inside, other=0) if GATED else part
    if EARLY and not EXPERTS:
        gdc_wait()
        gdc_launch_dependents()
    to_up = n.to(tl.int64) if GATED else 0
    if KIND == KIND_FP4:
        scale_at, stride = scales + row * scale_stride, 1
        to_up *= scale_stride
    else:
        scale_at, stride = scales + first_row * groups + safe, outputs
    zero_at = zeros + first_row * groups + safe if ZEROS else scale_at
    gates = tl.zeros((BAND, STEP), tl.float32)
    ups = tl.zeros((BAND, STEP), tl.float32)
    squares = tl.zeros((STEP,), tl.float32)
    for first in range(0, tl.cdiv(k, 8), STEP):
        x0, x1, x2, x3, x4, x5, x6, x7 = eights(x, first, k, STEP, WHOLE)
        if NORM:
            squares += (x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3) + (x4 * x4 + x5 * x5 + x6 * x6 + x7 * x7)
            w0, w1, w2, w3, w4, w5, w6, w7 = eights(norm, first, k, STEP, WHOLE)
            x0, x1, x2, x3, x4, x5, x6, x7 = x0 * w0, x1 * w1, x2 * w2, x3 * w3, x4 * w4, x5 * w5, x6 * w6, x7 * w7
        x0, x1, x2, x3 = x0[None, :], x1[None, :], x2[None, :], x3[None, :]
        x4, x5, x6, x7 = x4[None, :], x5[None, :], x6[None, :], x7[None, :]
        group = first * 8 // GROUP
        inside = (first + STEP + step < weight_stride)[None, :]
        gates += times_words(
            part, x0, x1, x2, x3, x4, x5, x6, x7, scale_at, zero_at, group, groups, stride, KIND, ZEROS, GROUP, NATIVE
        )
        part = tl.load(gate_at + first + STEP, mask=inside, other=0)
        if GATED:
            ups += times_words(
                other, x0, x1, x2, x3, x4, x5, x6, x7, scale_at + to_up, zero_at + to_up, group, groups, stride,
                KIND, ZEROS, GROUP, NATIVE,
            )  # fmt: skip
            other = tl.load(up_at + first + STEP, mask=inside, other=0)
    gate, up = lowered(tl.sum(gates, 1), KIND, NATIVE), lowered(tl.sum(ups, 1), KIND, NATIVE)
    if KIND == KIND_FP4:
        gate *= tl.load(row_scales + row)
        if GATED:
            up *= tl.load(row_scales + row + n)
    if NORM:
        root = tl.rsqrt(tl.sum(squares, 0) / k + eps)
        gate *= root
        up *= root
    if BIAS:
        gate += tl.load(bias + row).to(tl.float32)
        if GATED:
            up += tl.load(bias + row + n).to(tl.float32)
    if GATED:
        gate = activated(gate, up, alpha, limit, CLAMPED)
    if RESIDUAL:
        gate += tl.load(residual + safe).to(tl.float32)
    tl.store(y + pair.to(tl.int64) * n + own, gate.to(y.dtype.element_ty), mask=own < n)


@triton.jit
def _down_kernel(
    x,  # [T * TOP_K, K], contiguous
    weight,  # [E, N, weight_stride] int32, of eight a word
    scales,  # as in _product_kernel
    zeros,
    row_scales,
    bias,  # [E, N]
    weights,  # [T * TOP_K] float32
    ids,  # [T * TOP_K] int64
    residual,  # [T, N]
    y,  # [T, N]
    n,
    k,
    groups,
    weight_stride,
    scale_stride,
    residual_stride,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    TOP_K: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BAND: tl.constexpr,
    STEP: tl.constexpr,
    NATIVE: tl.constexpr,
    WHOLE: tl.constexpr,  # of x, and norm, as in `eights`
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * BAND + tl.arange(0, BAND)
    safe = tl.where(own < n, own, 0).to(tl.int64)
    step = tl.arange(0, STEP)
    sums = tl.zeros((BAND, STEP), tl.float32)
    result = tl.zeros((BAND,), tl.float32)
    for choice in range(TOP_K):
        pair = token * TOP_K + choice
        first_row = tl.load(ids + pair) * n
        row, factor = first_row + safe, tl.load(weights + pair)
        if BIAS:
            result += factor * tl.load(bias + row).to(tl.float32)
        factors = tl.full((BAND,), 1.0, tl.float32) * factor
        if KIND == KIND_FP4:
            factors *= tl.load(row_scales + row)
            scale_at, stride = scales + row * scale_stride, 1
        else:
            scale_at, stride = scales + first_row * groups + safe, n
        zero_at = zeros + first_row * groups + safe if ZEROS else scale_at
        for first in range(0, tl.cdiv(k, 8), STEP):
            inside = (first + step < weight_stride)[None, :]
            part = tl.load(weight + (row * weight_stride)[:, None] + (first + step)[None, :], mask=inside, other=0)
            x0, x1, x2, x3, x4, x5, x6, x7 = eights(x + pair * k, first, k, STEP, WHOLE)
            sums += factors[:, None] * times_words(
                part, x0[None, :], x1[None, :], x2[None, :], x3[None, :], x4[None, :], x5[None, :], x6[None, :],
                x7[None, :], scale_at, zero_at, first * 8 // GROUP, groups, stride, KIND, ZEROS, GROUP, NATIVE,
            )  # fmt: skip
    result += lowered(tl.sum(sums, 1), KIND, NATIVE)
    if RESIDUAL:
        result += tl.load(residual + token * residual_stride + safe).to(tl.float32)
    tl.store(y + token * n + own, result.to(y.dtype.element_ty), mask=own < n)


def _step(k: int, group: int, columns: int) -> int:
    """Words a tile."""
    return max(group, min(next_power_of_2(k), columns)) // WORD


def _multiply(
    x: Tensor,
    weight: Words,
    y: Tensor,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    ids: Tensor | None = None,
    top_k: int = 1,
    alpha: float = 0.0,
    limit: float = 0.0,
    clamped: bool = False,
) -> None:
    """Fill y [pairs, N or N / 2]: x [1, K] times a matrix [N, K], or rows of x [T, K] times those of their experts."""
    (*_, outputs, k), n, early, given = weight.shape, y.shape[1], overlaps(x.device), Operands.of(weight)
    band, columns, warps = current().words_gated if silu_mul else current().words
    _product_kernel[(cdiv(n, band), y.shape[0])](
        x,
        given.values,
        given.scales,
        given.zeros,
        given.row_scales,
        x if bias is None else bias,
        x if norm is None else norm,
        x if residual is None else residual,
        x if ids is None else ids,
        y,
        n,
        outputs,
        k,
        given.groups,
        given.weight_stride,
        given.scale_stride,
        x.stride(0),
        eps,
        alpha,
        limit,
        KIND=KIND_FP4 if given.fp4 else KIND_INT4,
        ZEROS=given.has_zeros,
        GROUP=weight.group,
        EXPERTS=ids is not None,
        CLAMPED=clamped,
        TOP_K=top_k,
        GATED=silu_mul,
        BIAS=bias is not None,
        NORM=norm is not None,
        RESIDUAL=residual is not None,
        BAND=band,
        STEP=_step(k, weight.group, columns),
        NATIVE=has_assembly(x.device),
        WHOLE=reads_whole(WORD, x, x if norm is None else norm),
        EARLY=early,
        num_warps=warps,
        launch_pdl=early,
    )


def one_row(
    x: Tensor,
    weight: Words,
    bias: Tensor | None,
    silu_mul: bool,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor:
    """`fused_linear_fp4` or `fused_linear_int4` of x [1, K]."""
    y = x.new_empty((1, weight.shape[0] // 2 if silu_mul else weight.shape[0]))
    _multiply(x, weight, y, bias, silu_mul, norm, eps, residual)
    return y


def few_experts(
    x: Tensor,
    gate_up: Words,
    gate_up_bias: Tensor | None,
    down: Words,
    down_bias: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    alpha: float,
    limit: float,
    residual: Tensor | None,
) -> Tensor:
    """The experts of x [T, H], each token's by themselves; clamped if there are biases."""
    (tokens, top_k), (_, h, i), early = ids.shape, down.shape, overlaps(x.device)
    hidden = x.new_empty((tokens * top_k, i))
    clamped = gate_up_bias is not None
    _multiply(x, gate_up, hidden, gate_up_bias, True, ids=ids, top_k=top_k, alpha=alpha, limit=limit, clamped=clamped)
    band, columns, warps = current().words_down
    y, given = x.new_empty((tokens, h)), Operands.of(down)
    _down_kernel[(cdiv(h, band), tokens)](
        hidden,
        given.values,
        given.scales,
        given.zeros,
        given.row_scales,
        hidden if down_bias is None else down_bias,
        weights,
        ids,
        x if residual is None else residual,
        y,
        h,
        i,
        given.groups,
        given.weight_stride,
        given.scale_stride,
        0 if residual is None else residual.stride(0),
        KIND=KIND_FP4 if given.fp4 else KIND_INT4,
        ZEROS=given.has_zeros,
        GROUP=down.group,
        TOP_K=top_k,
        BIAS=down_bias is not None,
        RESIDUAL=residual is not None,
        BAND=band,
        STEP=_step(i, down.group, columns),
        NATIVE=has_assembly(x.device),
        WHOLE=reads_whole(WORD, hidden),
        EARLY=early,
        num_warps=warps,
        launch_pdl=early,
    )
    return y
