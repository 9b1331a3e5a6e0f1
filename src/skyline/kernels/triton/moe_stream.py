"""The experts of one token, in bfloat16 and its like: two launches that stream their weights.

A program reads a few rows of an expert's gate and up, then a few of the down rows of all the token's experts at once,
which it adds up.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.device import overlaps
from skyline.kernels.triton.knobs import current
from skyline.kernels.triton.moe_products import activated
from skyline.kernels.triton.sizes import cdiv, next_power_of_2


@triton.jit
def _gate_up_kernel(
    x,  # [T, H]
    weight,  # [E, 2 I, H], gate rows first or last
    bias,  # [E, 2 I], contiguous, or unused
    ids,  # [T * TOP_K]
    y,  # [T * TOP_K, I]
    n,  # I
    k,  # H
    x_stride,
    expert_stride,
    weight_stride,
    alpha,
    limit,
    TOP_K: tl.constexpr,
    UP_FIRST: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BAND: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    pair = tl.program_id(1)
    own = tl.program_id(0) * BAND + tl.arange(0, BAND)
    safe = tl.where(own < n, own, 0)
    steps = tl.arange(0, STEP)
    expert = tl.load(ids + pair)
    band_at = weight + expert * expert_stride + steps[None, :]
    gate_row = safe + n if UP_FIRST else safe
    up_row = safe if UP_FIRST else safe + n
    gate_at = band_at + gate_row.to(tl.int64)[:, None] * weight_stride
    up_at = band_at + up_row.to(tl.int64)[:, None] * weight_stride
    x_at = x + (pair // TOP_K).to(tl.int64) * x_stride + steps
    gates = tl.zeros((BAND, STEP), tl.float32)
    ups = tl.zeros((BAND, STEP), tl.float32)
    for first in tl.range(0, k, STEP, num_stages=STAGES):
        if EVEN_K:
            values = tl.load(x_at + first)
            gate_part, up_part = tl.load(gate_at + first), tl.load(up_at + first)
        else:
            left = first + steps < k
            values = tl.load(x_at + first, mask=left, other=0.0)
            gate_part = tl.load(gate_at + first, mask=left[None, :], other=0.0)
            up_part = tl.load(up_at + first, mask=left[None, :], other=0.0)
        values = values.to(tl.float32)[None, :]
        gates += gate_part.to(tl.float32) * values
        ups += up_part.to(tl.float32) * values
    gate, up = tl.sum(gates, 1), tl.sum(ups, 1)
    if BIAS:
        biases = bias + expert * 2 * n
        gate += tl.load(biases + gate_row).to(tl.float32)
        up += tl.load(biases + up_row).to(tl.float32)
    result = activated(gate, up, alpha, limit, BIAS)
    tl.store(y + pair.to(tl.int64) * n + own, result.to(y.dtype.element_ty), mask=own < n)


@triton.jit
def _down_kernel(
    x,  # [T * TOP_K, I], contiguous
    weight,  # [E, H, I]
    bias,  # [E, H], contiguous, or unused
    weights,  # [T * TOP_K] float32
    ids,  # [T * TOP_K]
    residual,  # [T, H], or unused
    y,  # [T, H]
    n,  # H
    k,  # I
    expert_stride,
    weight_stride,
    residual_stride,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,  # TOP_K, padded
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    BAND: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(1).to(tl.int64)
    each = tl.arange(0, CHOICES * BAND)  # the band's rows of the first choice, of the second, ...
    choice = each // BAND
    real = choice < TOP_K
    pair = token * TOP_K + tl.where(real, choice, 0)
    own = tl.program_id(0) * BAND + each % BAND
    safe = tl.where(own < n, own, 0)
    steps = tl.arange(0, STEP)
    expert = tl.load(ids + pair)
    weight_at = weight + (expert * expert_stride + safe * weight_stride)[:, None] + steps[None, :]
    x_at = x + (pair * k)[:, None] + steps[None, :]
    sums = tl.zeros((CHOICES * BAND, STEP), tl.float32)
    for first in tl.range(0, k, STEP, num_stages=STAGES):
        inside = real[:, None] if EVEN_K else real[:, None] & (first + steps < k)[None, :]
        values = tl.load(x_at + first, mask=inside, other=0.0).to(tl.float32)
        sums += values * tl.load(weight_at + first, mask=inside, other=0.0).to(tl.float32)
    result = tl.sum(sums, 1)
    if BIAS:
        result += tl.load(bias + expert * n + safe).to(tl.float32)
    result *= tl.load(weights + pair, mask=real, other=0.0)
    result = tl.sum(tl.reshape(result, (CHOICES, BAND)), 0)
    column = tl.program_id(0) * BAND + tl.arange(0, BAND)
    if RESIDUAL:
        result += tl.load(residual + token * residual_stride + column, mask=column < n, other=0.0).to(tl.float32)
    tl.store(y + token * n + column, result.to(y.dtype.element_ty), mask=column < n)


def stream(
    x: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    alpha: float,
    limit: float,
    residual: Tensor | None,
    up_first: bool = False,
) -> Tensor:
    (tokens, top_k), (_, h, i) = ids.shape, down.shape
    early = overlaps(x.device)
    gate_up_band, down_band, stages = current().experts_stream
    hidden = x.new_empty((tokens * top_k, i))
    step = min(2048 // x.element_size(), next_power_of_2(h))
    _gate_up_kernel[(cdiv(i, gate_up_band), tokens * top_k)](
        x,
        gate_up,
        x if gate_up_bias is None else gate_up_bias,
        ids,
        hidden,
        i,
        h,
        x.stride(0),
        gate_up.stride(0),
        gate_up.stride(1),
        alpha,
        limit,
        TOP_K=top_k,
        UP_FIRST=up_first,
        BIAS=gate_up_bias is not None,
        EVEN_K=h % step == 0,
        BAND=gate_up_band,
        STEP=step,
        STAGES=stages,
        EARLY=early,
        launch_pdl=early,
    )
    y = x.new_empty((tokens, h))
    step = min(512 // x.element_size(), next_power_of_2(i))
    _down_kernel[(cdiv(h, down_band), tokens)](
        hidden,
        down,
        x if down_bias is None else down_bias,
        weights,
        ids,
        x if residual is None else residual,
        y,
        h,
        i,
        down.stride(0),
        down.stride(1),
        0 if residual is None else residual.stride(0),
        TOP_K=top_k,
        CHOICES=next_power_of_2(top_k),
        BIAS=down_bias is not None,
        RESIDUAL=residual is not None,
        EVEN_K=i % step == 0,
        BAND=down_band,
        STEP=step,
        STAGES=stages,
        EARLY=early,
        launch_pdl=early,
    )
    return y
