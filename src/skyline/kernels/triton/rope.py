"""Rotary embedding and the write to the KV cache: one launch between the projection and attention.

A program takes the heads of a few tokens, of one kind: queries, keys or values. A head is held as the two halves that
turn into each other and the rest that does not turn. Rounding as in the references (skyline.ops.attention): after the
norm, of cosine and sine, and after the rotation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.device import multiprocessors, overlaps
from skyline.kernels.triton.sizes import cdiv, next_power_of_2
from skyline.ops import AttentionBatch, KVCache

_HEADS = 8  # a program
_ELEMENTS = 4096  # a program, where there are enough tokens


@triton.jit
def _read(source, stride, row, head, inside, D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr):
    """Heads of [T, heads * D], as float32: their halves, [rows, WIDTH], and the rest, if there is one."""
    at = (source + row * stride + head * D)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    mask = inside[:, None] & (column < HALF)
    first = tl.load(at + column, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF + column, mask=mask, other=0.0).to(tl.float32)
    rest = first
    if D > 2 * HALF:
        column = tl.arange(0, triton.next_power_of_2(D - 2 * HALF))[None, :]
        mask = inside[:, None] & (column < D - 2 * HALF)
        rest = tl.load(at + 2 * HALF + column, mask=mask, other=0.0).to(tl.float32)
    return first, second, rest


@triton.jit
def _scaled(values, factor, weight, start, SIZE: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    column = tl.arange(0, WIDTH)
    scale = tl.load(weight + start + column, mask=column < SIZE, other=0.0).to(tl.float32)
    normed = (values * factor[:, None]).to(TYPE).to(tl.float32)
    return (normed * scale[None, :]).to(TYPE).to(tl.float32)


@triton.jit
def _turned(
    source,
    stride,
    weight,
    eps,
    positions,
    table,
    row,
    head,
    inside,
    NORM: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`_read`, the heads' norm if there is one, and the rotation; rounded, but in float32."""
    TYPE: tl.constexpr = source.dtype.element_ty
    first, second, rest = _read(source, stride, row, head, inside, D, HALF, WIDTH)
    if NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if D > 2 * HALF:
            squares += tl.sum(rest * rest, 1)
        factor = tl.rsqrt(squares / D + eps)
        first = _scaled(first, factor, weight, 0, HALF, WIDTH, TYPE)
        second = _scaled(second, factor, weight, HALF, HALF, WIDTH, TYPE)
        if D > 2 * HALF:
            REST: tl.constexpr = D - 2 * HALF
            rest = _scaled(rest, factor, weight, 2 * HALF, REST, triton.next_power_of_2(REST), TYPE)
    position = tl.load(positions + row, mask=inside, other=0).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    at = table + position[:, None] * (2 * HALF) + column
    mask = inside[:, None] & (column < HALF)
    cosine = tl.load(at, mask=mask, other=0.0).to(TYPE).to(tl.float32)
    sine = tl.load(at + HALF, mask=mask, other=0.0).to(TYPE).to(tl.float32)
    turned_first = (first * cosine - second * sine).to(TYPE).to(tl.float32)
    turned_second = (second * cosine + first * sine).to(TYPE).to(tl.float32)
    return turned_first, turned_second, rest


@triton.jit
def _write(target, at, first, second, rest, inside, D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr):
    """Heads to the places `at` [rows], counted in numbers."""
    TYPE: tl.constexpr = target.dtype.element_ty
    to = (target + at)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    mask = inside[:, None] & (column < HALF)
    tl.store(to + column, first.to(TYPE), mask=mask)
    tl.store(to + HALF + column, second.to(TYPE), mask=mask)
    if D > 2 * HALF:
        column = tl.arange(0, triton.next_power_of_2(D - 2 * HALF))[None, :]
        tl.store(to + 2 * HALF + column, rest.to(TYPE), mask=inside[:, None] & (column < D - 2 * HALF))


@triton.jit
def to_fp8(values, scale):
    """values [rows, n] over scale [rows], within the range of FP8."""
    return tl.clamp(tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape)), -448.0, 448.0)


@triton.jit
def to_int8(values, inverse):
    """values [rows, n] times inverse [rows] as whole numbers; where that is no number, 0."""
    scaled = values * inverse[:, None]
    # Numbers from 2^23 on are integers, and additions round half to even.
    levels = (scaled + 12582912.0) - 12582912.0
    return tl.clamp(tl.where(levels == levels, levels, 0.0), -127.0, 127.0)


@triton.jit
def own_scale(largest, TYPE: tl.constexpr):
    """What takes the largest magnitudes [rows] to the largest number of int8 or FP8; of zeros, 0 or 1."""
    if TYPE == tl.int8:  # noqa: SIM300
        scale = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
    else:
        scale = tl.where(largest > 0, tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32)), 1.0)
    return scale


@triton.jit
def by_own_scale(values, largest, TYPE: tl.constexpr):
    """values [rows, n] over `own_scale`, as numbers of the type, in float32."""
    if TYPE == tl.int8:  # noqa: SIM300
        top = tl.full(largest.shape, 127.0, tl.float32)
        result = to_int8(values, tl.where(largest > 0, tl.div_rn(top, largest), 0.0))
    else:
        result = to_fp8(values, own_scale(largest, TYPE))
    return result


@triton.jit
def _store(
    target,  # [places, heads, D]
    scales,  # [heads] of fp8, [places, heads] of int8, or unused
    slots,  # [T], or unused
    row,
    head,
    heads,
    first,
    second,
    rest,
    inside,
    PAGED: tl.constexpr,
    SCALED: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Keys or values to their tokens' slots, quantized as the target is; without slots, to rows like the input's."""
    place = row
    if PAGED:
        place = tl.load(slots + row, mask=inside, other=-1).to(tl.int64)
        inside = inside & (place >= 0)
    at = place * heads + head
    if SCALED:
        TYPE: tl.constexpr = target.dtype.element_ty
        if TYPE == tl.int8:  # noqa: SIM300
            largest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
            if D > 2 * HALF:
                largest = tl.maximum(largest, tl.max(tl.abs(rest), 1))
            tl.store(scales + at, own_scale(largest, TYPE), mask=inside)
            first, second = by_own_scale(first, largest, TYPE), by_own_scale(second, largest, TYPE)
            rest = by_own_scale(rest, largest, TYPE)
        else:
            scale = tl.load(scales + head, mask=inside, other=1.0)
            first, second, rest = to_fp8(first, scale), to_fp8(second, scale), to_fp8(rest, scale)
    _write(target, at * D, first, second, rest, inside, D, HALF, WIDTH)


@triton.jit(do_not_specialize=["rows"])
def _heads_kernel(
    q,  # [T, q_heads * D]
    k,  # [T, kv_heads * D]
    v,  # like k
    q_norm,  # [D], or unused
    k_norm,  # [D], or unused
    positions,  # [T]
    table,  # [P, 2 * HALF] float32
    slots,  # [T] int64
    q_out,  # [T, q_heads * D], contiguous
    k_out,  # [slots, kv_heads, D], contiguous
    v_out,  # like k_out
    k_scale,
    v_scale,
    rows,
    q_stride,
    k_stride,
    v_stride,
    q_heads,
    kv_heads,
    eps,
    NORM: tl.constexpr,
    TURN: tl.constexpr,
    PAGED: tl.constexpr,
    SCALED: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,  # HALF, padded
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Groups of heads are counted through queries, keys and values; those the grid leaves out are none of its work."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    lane = tl.arange(0, TOKENS * HEADS)
    row = tl.program_id(0).to(tl.int64) * TOKENS + lane // HEADS
    group, q_groups, kv_groups = tl.program_id(1), tl.cdiv(q_heads, HEADS), tl.cdiv(kv_heads, HEADS)
    if group < q_groups:
        head = group * HEADS + lane % HEADS
        inside = (row < rows) & (head < q_heads)
        first, second, rest = _turned(
            q, q_stride, q_norm, eps, positions, table, row, head, inside, NORM, D, HALF, WIDTH
        )
        _write(q_out, (row * q_heads + head) * D, first, second, rest, inside, D, HALF, WIDTH)
    elif group < q_groups + kv_groups:
        head = (group - q_groups) * HEADS + lane % HEADS
        inside = (row < rows) & (head < kv_heads)
        if TURN:
            first, second, rest = _turned(
                k, k_stride, k_norm, eps, positions, table, row, head, inside, NORM, D, HALF, WIDTH
            )
        else:
            first, second, rest = _read(k, k_stride, row, head, inside, D, HALF, WIDTH)
        _store(k_out, k_scale, slots, row, head, kv_heads, first, second, rest, inside, PAGED, SCALED, D, HALF, WIDTH)
    else:
        head = (group - q_groups - kv_groups) * HEADS + lane % HEADS
        inside = (row < rows) & (head < kv_heads)
        first, second, rest = _read(v, v_stride, row, head, inside, D, HALF, WIDTH)
        _store(v_out, v_scale, slots, row, head, kv_heads, first, second, rest, inside, PAGED, SCALED, D, HALF, WIDTH)


def launch(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    head_dim: int,
    outputs: tuple[Tensor | None, Tensor, Tensor | None],
    norms: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: float = 0.0,
    positions: Tensor | None = None,
    table: Tensor | None = None,
    slots: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> None:
    """What is None is not done. q must come with positions and table."""
    rows, kv_heads = k.shape[0], k.shape[1] // head_dim
    if not rows:
        return
    q_heads = 0 if q is None else q.shape[1] // head_dim
    q, v = (k if x is None else x for x in (q, v))
    groups = cdiv(q_heads, _HEADS) + (1 if outputs[2] is None else 2) * cdiv(kv_heads, _HEADS)
    half = (head_dim if table is None else table.shape[1]) // 2
    tokens = max(1, _ELEMENTS // (_HEADS * next_power_of_2(head_dim)))
    if cdiv(rows, tokens) * groups < 4 * multiprocessors(k.device):
        tokens = 1
    q_norm, k_norm = (k if norm is None else norm for norm in norms)
    q_out, k_out, v_out = (outputs[1] if out is None else out for out in outputs)
    k_scale, v_scale = (k, k) if scales is None else scales
    early = overlaps(k.device)
    _heads_kernel[(cdiv(rows, tokens), groups)](
        q,
        k,
        v,
        q_norm,
        k_norm,
        k if positions is None else positions,
        k if table is None else table,
        k if slots is None else slots,
        q_out,
        k_out,
        v_out,
        k_scale,
        v_scale,
        rows,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        q_heads,
        kv_heads,
        eps,
        NORM=norms[0] is not None,
        TURN=table is not None,
        PAGED=slots is not None,
        SCALED=scales is not None,
        D=head_dim,
        HALF=half,
        WIDTH=next_power_of_2(half),
        TOKENS=tokens,
        HEADS=_HEADS,
        EARLY=early,
        launch_pdl=early,
        num_warps=4 if tokens > 1 else 2,
        # Levels of int8 are rounded products: fused with the addition that rounds them, they would not be.
        enable_fp_fusion=k_out.dtype != torch.int8,
    )


def rope_kv_write(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    table: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
) -> Tensor:
    kv_size = cache.num_kv_heads * cache.head_dim
    q, k, v = torch.split(qkv, [qkv.shape[1] - 2 * kv_size, kv_size, kv_size], dim=-1)
    rotated = q.new_empty(q.shape)
    norms = (None, None) if q_norm is None or k_norm is None else (q_norm, k_norm)
    slots = batch.of(cache).slot_mapping
    outputs = (rotated, *cache.tensors)
    launch(q, k, v, cache.head_dim, outputs, norms, eps, positions, table, slots, cache.scales)
    return rotated


def rope(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    outputs = (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
    )
    launch(q, k, None, head_dim, (*outputs, None), positions=positions, table=table)
    return outputs


def kv_write(k: Tensor, v: Tensor, cache: KVCache, batch: AttentionBatch) -> None:
    slots = batch.of(cache).slot_mapping
    launch(None, k, v, cache.head_dim, (None, *cache.tensors), slots=slots, scales=cache.scales)
