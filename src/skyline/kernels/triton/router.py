"""The router of a mixture of experts in two launches: logits by tiles and slices of the sum, then a choice by row.

The slices let a decode step's few rows be multiplied on all processors. A norm before them is by its weight in the
product, and by the root mean square, of which the slices have parts, in the choice, beside which further programs write
the normed rows. Experts are ranked by 64-bit keys: the float's
bits made monotonic above, the complemented id below, so that all keys differ and of two equals the lower id is larger.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.device import multiprocessors, overlaps
from skyline.kernels.triton.sizes import cdiv, next_power_of_2
from skyline.ops.router import Scoring

_TAKEN = tl.constexpr(-(2**63))  # below the key of any float


class _Tile(NamedTuple):
    """Rows of x, experts and columns a tile, warps, and stages of the pipeline."""

    rows: int
    experts: int
    columns: int
    warps: int
    stages: int


_FEW = _Tile(16, 32, 128, 4, 4)  # up to _FEW_ROWS rows
_MANY = _Tile(64, 64, 64, 4, 4)
_WIDE = _Tile(16, 32, 32, 4, 2)  # for products of float32
_FEW_ROWS = 128
_SLICES = 16  # of the sum, at most
_NORMED = 512  # columns that a program norms


@triton.jit
def _logits_kernel(
    x,  # [T, H]
    weight,  # [E, H]
    norm,  # [H], or unused
    logits,  # [slices, T, E] float32, out
    squares,  # [slices, T] float32, out: of each slice's columns their sum; or unused
    rows,
    experts,
    k,
    slice_columns,  # a multiple of STEP
    x_stride,
    weight_stride,
    NORM: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,  # slice_columns * slices == k
    ROWS: tl.constexpr,
    BAND: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = tl.program_id(1) * BAND + tl.arange(0, BAND)
    part = tl.program_id(2)
    steps = tl.arange(0, STEP)
    x_at = x + tl.where(row < rows, row, 0).to(tl.int64)[:, None] * x_stride + steps[None, :]
    weight_at = weight + tl.where(own < experts, own, 0)[None, :] * weight_stride + steps[:, None]
    total = tl.zeros((ROWS, BAND), tl.float32)
    square = tl.zeros((ROWS, STEP), tl.float32)
    start = part * slice_columns
    for first in range(start, tl.minimum(start + slice_columns, k), STEP):
        if EVEN:
            a, b = tl.load(x_at + first), tl.load(weight_at + first)
        else:
            left = first + steps < k
            a = tl.load(x_at + first, mask=left[None, :], other=0.0)
            b = tl.load(weight_at + first, mask=left[:, None], other=0.0)
        if NORM:
            wide = a.to(tl.float32)
            square += wide * wide
            wide *= tl.load(norm + first + steps, mask=first + steps < k, other=0.0).to(tl.float32)[None, :]
            a = wide if WIDE else wide.to(a.dtype)
        if WIDE:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    at = (part * rows + row).to(tl.int64)
    tl.store(
        logits + at[:, None] * experts + own[None, :], total, mask=(row < rows)[:, None] & (own < experts)[None, :]
    )
    if NORM:
        tl.store(squares + at, tl.sum(square, 1), mask=(row < rows) & (tl.program_id(1) == 0))


@triton.jit
def _keys(values, ids):
    """Keys of float32. -0.0 equals 0.0, and NaN is above everything, as in torch's sort."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    bits = tl.where(values != values, 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - ids)


@triton.jit
def _value_of(keys):
    bits = (keys >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _id_of(keys):
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _norm_columns(x, norm, y, row, first, x_stride, k, root, BLOCK: tl.constexpr):
    """Write some columns of a row as rms_norm has them."""
    column = first + tl.arange(0, BLOCK)
    values = tl.load(x + row * x_stride + column, mask=column < k, other=0.0).to(tl.float32)
    scale = tl.load(norm + column, mask=column < k, other=0.0).to(tl.float32)
    normed = (values * root).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * k + column, (normed * scale).to(y.dtype.element_ty), mask=column < k)


@triton.jit
def _choose_kernel(
    logits,  # [slices, T, groups * size]
    squares,  # [slices, T], or unused
    x,  # [T, H], or unused, as are norm and normed
    norm,  # [H]
    normed,  # [T, H], contiguous, out
    bias,  # [E], or unused
    correction,  # [E], or unused
    weights,  # [T, TOP_K] float32, out
    ids,  # [T, TOP_K] int64, out
    rows,
    groups,
    size,
    top_groups,
    row_stride,
    factor,
    k,
    x_stride,
    eps,
    NORM: tl.constexpr,
    SLICES: tl.constexpr,
    BIAS: tl.constexpr,
    CORRECTION: tl.constexpr,
    GROUPED: tl.constexpr,
    PAIRS: tl.constexpr,  # a group has two experts or more
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,  # TOP_K, groups and size, padded
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    if NORM:
        square = tl.zeros((), tl.float32)
        for part in tl.static_range(SLICES):
            square += tl.load(squares + part * rows + row)
        root = tl.rsqrt(square / k + eps)
        if tl.program_id(1) > 0:
            _norm_columns(x, norm, normed, row, (tl.program_id(1) - 1) * BLOCK, x_stride, k, root, BLOCK)
            return
    group, member = tl.arange(0, GROUPS), tl.arange(0, SIZE)
    expert = group[:, None] * size + member[None, :]
    real = (group < groups)[:, None] & (member < size)[None, :]
    scores = tl.zeros((GROUPS, SIZE), tl.float32)
    for part in tl.static_range(SLICES):
        at = (part * rows + row) * row_stride
        scores += tl.load(logits + at + expert, mask=real, other=0.0).to(tl.float32)
    if NORM:
        scores *= root
    if BIAS:
        scores += tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)
    if SCORING == "sigmoid":
        scores = tl.sigmoid(scores)
    elif SCORING == "softmax":
        top = tl.max(tl.max(tl.where(real, scores, -float("inf")), 1), 0)
        scores = tl.where(real, tl.exp(scores - top), 0.0)
        scores /= tl.sum(tl.sum(scores, 1), 0)
    ranked = scores
    if CORRECTION:
        ranked += tl.load(correction + expert, mask=real, other=0.0).to(tl.float32)
    keys = tl.where(real, _keys(ranked, expert), _TAKEN)
    if GROUPED:
        first = tl.max(keys, 1)
        best = _value_of(first)
        if PAIRS:
            best += _value_of(tl.max(tl.where(keys == first[:, None], _TAKEN, keys), 1))
        runs = tl.where(group < groups, _keys(best, group), _TAKEN)
        for _ in range(top_groups):
            runs = tl.where(runs == tl.max(runs, 0), _TAKEN, runs)
        shut = real & ((runs != _TAKEN) & (group < groups))[:, None]
        keys = tl.where(shut, _keys(tl.full((GROUPS, SIZE), -float("inf"), tl.float32), expert), keys)
    slot = tl.arange(0, CHOICES)
    chosen = tl.zeros((CHOICES,), tl.int32)
    share = tl.full((CHOICES,), -float("inf") if SCORING == "softmax of the chosen" else 0.0, tl.float32)
    for choice in range(TOP_K):
        best_key = tl.max(tl.max(keys, 1), 0)
        score = tl.sum(tl.sum(tl.where(keys == best_key, scores, 0.0), 1), 0)
        keys = tl.where(keys == best_key, _TAKEN, keys)
        chosen = tl.where(slot == choice, _id_of(best_key), chosen)
        share = tl.where(slot == choice, score, share)
    if SCORING == "softmax of the chosen":
        share = tl.exp(share - tl.max(share, 0))
        share /= tl.sum(share, 0)
    elif RENORMALIZE:
        share /= tl.sum(share, 0) + 1e-20
    tl.store(weights + row * TOP_K + slot, share * factor, mask=slot < TOP_K)
    tl.store(ids + row * TOP_K + slot, chosen.to(tl.int64), mask=slot < TOP_K)


class _Norm(NamedTuple):
    """What `_choose` norms, by parts of the sums of squares [slices, T], and where to."""

    x: Tensor
    weight: Tensor
    eps: float
    squares: Tensor
    out: Tensor


def _choose(
    logits: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    scoring: Scoring,
    renormalize: bool,
    factor: float,
    groups: int,
    top_groups: int,
    norm: _Norm | None = None,
) -> tuple[Tensor, Tensor]:
    """logits [slices, T, E] of which the sum over slices counts -> weights [T, top_k] float32 and ids [T, top_k]."""
    slices, rows, experts = logits.shape
    weights = torch.empty((rows, top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((rows, top_k), dtype=torch.int64, device=logits.device)
    if rows == 0:
        return weights, ids
    size, early = experts // groups, overlaps(logits.device)
    k = 0 if norm is None else norm.x.shape[1]
    _choose_kernel[(rows, 1 + cdiv(k, _NORMED))](
        logits,
        logits if norm is None else norm.squares,
        logits if norm is None else norm.x,
        logits if norm is None else norm.weight,
        logits if norm is None else norm.out,
        logits if bias is None else bias,
        logits if correction is None else correction,
        weights,
        ids,
        rows,
        groups,
        size,
        top_groups,
        logits.stride(1),
        factor,
        k,
        0 if norm is None else norm.x.stride(0),
        0.0 if norm is None else norm.eps,
        NORM=norm is not None,
        SLICES=slices,
        BIAS=bias is not None,
        CORRECTION=correction is not None,
        GROUPED=groups > 1,
        PAIRS=size > 1,
        SCORING=scoring,
        RENORMALIZE=renormalize,
        TOP_K=top_k,
        CHOICES=next_power_of_2(top_k),
        GROUPS=next_power_of_2(groups),
        SIZE=next_power_of_2(size),
        BLOCK=_NORMED,
        EARLY=early,
        num_warps=1,
        launch_pdl=early,
    )
    return weights, ids


def _router(
    x: Tensor,
    weight: Tensor,
    norm: tuple[Tensor, float] | None,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    scoring: Scoring,
    renormalize: bool,
    factor: float,
    groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, normed if there is a norm's weight and eps, and the router's weights and ids."""
    (rows, k), experts = x.shape, weight.shape[0]
    # A product with the norm's weight alone can be too large for float16.
    wide = x.dtype == torch.float32 or x.dtype != weight.dtype or (norm is not None and x.dtype == torch.float16)
    tile = _WIDE if wide else _FEW if rows <= _FEW_ROWS else _MANY
    row_tiles, bands = cdiv(rows, tile.rows), cdiv(experts, tile.experts)
    step = max(16, min(tile.columns, next_power_of_2(k)))
    wanted = max(1, min(_SLICES, multiprocessors(x.device) // max(1, row_tiles * bands)))
    slice_columns = cdiv(cdiv(k, step), wanted) * step
    slices = cdiv(k, slice_columns)
    logits = torch.empty((slices, rows, experts), dtype=torch.float32, device=x.device)
    normed, whole = x, None
    if norm is not None:
        normed = x.new_empty((rows, k))
        squares = torch.empty((slices, rows), dtype=torch.float32, device=x.device)
        whole = _Norm(x, *norm, squares, normed)
    if rows:
        early = overlaps(x.device)
        _logits_kernel[(row_tiles, bands, slices)](
            x,
            weight,
            x if whole is None else whole.weight,
            logits,
            logits if whole is None else whole.squares,
            rows,
            experts,
            k,
            slice_columns,
            x.stride(0),
            weight.stride(0),
            NORM=whole is not None,
            WIDE=wide,
            EVEN=slice_columns * slices == k,
            ROWS=tile.rows,
            BAND=tile.experts,
            STEP=step,
            EARLY=early,
            num_warps=tile.warps,
            num_stages=tile.stages,
            launch_pdl=early,
        )
    found = _choose(logits, bias, correction, top_k, scoring, renormalize, factor, groups, top_groups, whole)
    return normed, *found


def router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    scoring: Scoring,
    renormalize: bool,
    factor: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    given = (bias, correction, top_k, scoring, renormalize, factor, groups, top_groups)
    return _router(x, weight, None, *given)[1:]


def norm_router(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    scoring: Scoring,
    renormalize: bool,
    factor: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    given = (bias, correction, top_k, scoring, renormalize, factor, groups, top_groups)
    return _router(x, weight, (norm, eps), *given)


def topk_router(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    return _choose(logits.unsqueeze(0), None, None, top_k, "softmax", renormalize, 1.0, 1, 1)
