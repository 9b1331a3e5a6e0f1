"""Products of the rows of each expert with its matrix, in tiles: what skyline.kernels.triton.moe is made of.

A tile is up to ROWS rows of one expert. How many experts have rows is known on the device alone, so there are tiles for
the worst case, and those without rows end at once. Rows are found in one of three ways:

    ids      ids [pairs] int64, few: a tile a pair. That of every ROWS-th pair of an expert takes this pair and those
             after it; all other tiles are without rows.
    offsets  [E + 1] int32: expert e has places offsets[e] to offsets[e + 1]; its first tile is offsets[e] // ROWS + e,
             which leaves room for all its tiles whatever the other experts have. `order` [pairs] int32, where there is
             one, tells the row of a place.
    counts   [E] int32: expert e has rows e * capacity to e * capacity + counts[e]. Rows after them become zeros.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.device import capability, overlaps, shared_memory
from skyline.kernels.triton.four_bits import e2m1, fp4_scales, scaled
from skyline.kernels.triton.sizes import cdiv, next_power_of_2
from skyline.ops import Fp4Weight


class Tile(NamedTuple):
    """Rows of x, rows of the weight, and columns a tile, warps, and stages of the pipeline, if there is room."""

    rows: int
    band: int
    columns: int
    warps: int
    stages: int


# By how many rows an expert has on average, at most.
_TILES: tuple[tuple[float, Tile], ...] = (
    (8, Tile(16, 64, 128, 4, 4)),
    (24, Tile(32, 64, 128, 4, 4)),
    (64, Tile(64, 128, 64, 4, 4)),
    (float("inf"), Tile(128, 256, 64, 8, 4)),
)
_FLOAT32_TILES: tuple[tuple[float, Tile], ...] = (
    (16, Tile(16, 64, 32, 4, 3)),
    (float("inf"), Tile(64, 64, 32, 4, 3)),
)
_BYTE_TILES: tuple[tuple[float, Tile], ...] = (
    (8, Tile(16, 64, 128, 4, 5)),
    (24, Tile(32, 64, 128, 4, 5)),
    (64, Tile(64, 128, 128, 4, 4)),
    (float("inf"), Tile(128, 128, 128, 8, 4)),
)
_FP4_TILES: tuple[tuple[float, Tile], ...] = (
    (8, Tile(16, 64, 128, 4, 4)),
    (24, Tile(32, 64, 128, 4, 4)),
    (64, Tile(64, 128, 64, 4, 3)),
    (float("inf"), Tile(128, 128, 64, 8, 3)),
)
_TOGETHER = 8  # tiles of rows that go by before the next band of the weights is read


class Groups(NamedTuple):
    """Where the rows of the experts are."""

    layout: Literal["ids", "offsets", "counts"]
    where: Tensor  # ids, offsets or counts
    order: Tensor | None
    tiles: int
    tile: Tile
    rows: int  # pairs, or places
    experts: int
    capacity: int = 0


def tile_for(rows: int, experts: int, x: Tensor, in_bytes: bool = False, fp4: bool = False) -> Tile:
    """For so many rows of x's device and dtype in all; in_bytes: that are quantized to eight bits. fp4: the weights."""
    if fp4 and x.dtype == torch.bfloat16:
        tiles = _FP4_TILES
    else:
        tiles = _BYTE_TILES if in_bytes else _FLOAT32_TILES if fp4 or x.dtype == torch.float32 else _TILES
    tile = next(tile for most, tile in tiles if rows <= most * experts)
    if capability(x.device)[0] in (9, 10):
        return tile
    return tile._replace(band=min(tile.band, 128))  # matrix units whose operands take registers as well


@triton.jit
def activated(gate, up, alpha, limit, CLAMPED: tl.constexpr):
    """silu(gate) * up, or clamped as skyline.ops.moe_experts_clamped defines it."""
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return gate * tl.sigmoid(alpha * gate) * (up + 1.0)
    else:
        return gate * tl.sigmoid(gate) * up


@triton.jit
def _rows_of(
    tile,
    index,
    order,
    pairs,
    experts,
    capacity,
    LAYOUT: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The expert of a tile, its rows [ROWS], how many are there (none: 0 or less), and how many there could be."""
    slot = tl.arange(0, ROWS)
    each = tl.arange(0, INDEX)
    if LAYOUT == "ids":
        expert = tl.load(index + tile).to(tl.int32)
        same = tl.load(index + each, mask=each < pairs, other=-1).to(tl.int32) == expert
        earlier = tl.sum((same & (each < tile)).to(tl.int32), 0)
        count = tl.where(earlier % ROWS == 0, tl.sum(same.to(tl.int32), 0) - earlier, 0)
        rank = tl.cumsum(same.to(tl.int32), 0) - 1 - earlier
        hit = same[None, :] & (rank[None, :] == slot[:, None])
        row = tl.sum(tl.where(hit, each[None, :], 0), 1)
        room = count
    elif LAYOUT == "offsets":
        starts = tl.load(index + each, mask=each < experts, other=0)
        expert = tl.sum(((starts // ROWS + each <= tile) & (each < experts)).to(tl.int32), 0) - 1
        start = tl.load(index + expert)
        place = start + (tile - start // ROWS - expert) * ROWS
        count = tl.load(index + expert + 1) - place
        row = place + slot
        if ORDER:
            row = tl.load(order + row, mask=slot < count, other=0)
        room = count
    else:
        tiles = tl.cdiv(capacity, ROWS)
        expert = tile // tiles
        place = tile % tiles * ROWS
        count = tl.load(index + expert) - place
        row = expert * capacity + place + slot
        room = capacity - place
    return expert, row, count, room


@triton.jit
def _grouped_kernel(
    x,  # [rows // DIVISOR, K]
    weight,  # [E, N, K], or [E, 2 N, K] if GATED, gate rows first; of FP4 uint8, two a byte
    bias,  # [E, N or 2 N], contiguous, or unused
    x_scales,  # of FP8 and int8: [rows // DIVISOR, 1], or [rows // DIVISOR, ceil(K / 128)]
    scales,  # [E, N or 2 N], or [E, ceil(N or 2 N / 128), ceil(K / 128)], of FP4 [E, N or 2 N, ceil(K / FP4)] uint8
    row_scales,  # of FP4: [E, N or 2 N]
    y,  # [rows, N], contiguous
    index,
    order,
    tiles,
    pairs,
    experts,
    capacity,
    n,
    k,
    x_stride,
    expert_stride,
    weight_stride,
    alpha,
    limit,
    LAYOUT: tl.constexpr,
    ORDER: tl.constexpr,
    INDEX: tl.constexpr,  # pairs of the layout "ids", else experts, padded
    DIVISOR: tl.constexpr,  # so many rows of y belong to one of x
    GATED: tl.constexpr,  # the result is the activation, clamped if there is a bias
    BIAS: tl.constexpr,
    SCALES: tl.constexpr,  # of x as well: 0: none, 1: by row, 2: by block, and STEP is 128
    FP4: tl.constexpr,  # so many neighbours share a scale, or 0: the weight is no FP4
    WIDEN: tl.constexpr,  # float16 times FP4 in tf32, which holds both: float16 has not the range of the scales
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    BAND: tl.constexpr,
    STEP: tl.constexpr,
    TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    WIDTH: tl.constexpr = BAND // 2 if GATED else BAND
    bands = tl.cdiv(n, WIDTH)
    program = tl.program_id(0)
    group = program // (TOGETHER * bands)
    height = tl.minimum(tiles - group * TOGETHER, TOGETHER)
    tile = group * TOGETHER + program % (TOGETHER * bands) % height
    band = program % (TOGETHER * bands) // height
    expert, row, count, room = _rows_of(tile, index, order, pairs, experts, capacity, LAYOUT, ORDER, ROWS, INDEX)
    if room <= 0:
        return
    ZEROS: tl.constexpr = LAYOUT == "counts" and not GATED
    if not ZEROS and count <= 0:
        return
    there = tl.arange(0, ROWS) < count
    each = tl.arange(0, BAND)
    # Gate and up rows alternate, so that one product yields both, next to each other in a thread's registers.
    own = band * WIDTH + each // 2 if GATED else band * WIDTH + each
    safe = tl.where(own < n, own, 0)
    if GATED:
        safe += each % 2 * n
    steps = tl.arange(0, STEP)
    x_row = (row // DIVISOR).to(tl.int64)
    x_at = x + x_row[:, None] * x_stride + steps[None, :]
    matrix_rows = 2 * n if GATED else n
    if FP4:
        HALF: tl.constexpr = STEP // 2
        octets = tl.arange(0, HALF)
        parts = tl.arange(0, STEP // FP4)
        groups = tl.cdiv(k, FP4)
        weight_row = expert.to(tl.int64) * matrix_rows + safe
        weight_at = weight + weight_row[:, None] * (k // 2) + octets[None, :]
        scale_at = scales + weight_row[:, None] * groups + parts[None, :]
    else:
        weight_at = (
            weight + expert.to(tl.int64) * expert_stride + safe.to(tl.int64)[None, :] * weight_stride + steps[:, None]
        )
    total = tl.zeros((ROWS, BAND), tl.int32 if weight.dtype.element_ty == tl.int8 else tl.float32)
    columns = tl.where(count > 0, k, 0)
    for first in range(0, columns, STEP):
        left = first + steps < k
        if EVEN_K:
            a = tl.load(x_at + first, mask=there[:, None], other=0.0)
        else:
            a = tl.load(x_at + first, mask=there[:, None] & left[None, :], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
        if FP4:
            if EVEN_K:
                stored = tl.load(weight_at + first // 2)
                codes = tl.load(scale_at + first // FP4)
            else:
                stored = tl.load(weight_at + first // 2, mask=(first // 2 + octets < k // 2)[None, :], other=0)
                codes = tl.load(scale_at + first // FP4, mask=(first // FP4 + parts < groups)[None, :], other=0)
            factors = fp4_scales(codes, FP4)
            evens = scaled(e2m1(stored & 15), factors, 1, BAND, HALF, FP4 // 2).to(a.dtype)
            odds = scaled(e2m1(stored >> 4), factors, 1, BAND, HALF, FP4 // 2).to(a.dtype)
            b = tl.trans(tl.interleave(evens, odds))
        elif EVEN_K:
            b = tl.load(weight_at + first)
        else:
            b = tl.load(weight_at + first, mask=left[:, None], other=0.0)
        if SCALES == 2:
            blocks = tl.cdiv(k, 128)
            mine = tl.load(x_scales + x_row * blocks + first // 128, mask=there, other=0.0)
            block_row = expert.to(tl.int64) * tl.cdiv(matrix_rows, 128) + safe // 128
            theirs = tl.load(scales + block_row * blocks + first // 128)
            total += tl.dot(a, b) * (mine[:, None] * theirs[None, :])
        else:
            total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
    if SCALES == 1:
        mine = tl.load(x_scales + x_row, mask=there, other=0.0)
        theirs = tl.load(scales + expert.to(tl.int64) * matrix_rows + safe)
        total = total.to(tl.float32) * (mine[:, None] * theirs[None, :])
    if FP4:
        total *= tl.load(row_scales + weight_row)[None, :]
    if BIAS:
        biases = bias + expert.to(tl.int64) * matrix_rows
        total += tl.load(biases + safe).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(total, (ROWS, WIDTH, 2)))
        total = activated(gate, up, alpha, limit, BIAS)
    if ZEROS:
        total = tl.where(there[:, None], total, 0.0)
        there = tl.arange(0, ROWS) < room
    column = band * WIDTH + tl.arange(0, WIDTH)
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=there[:, None] & (column < n)[None, :])


def product(
    x: Tensor,
    weight: Tensor | Fp4Weight,
    groups: Groups,
    divisor: int,
    gated: bool,
    bias: Tensor | None = None,
    alpha: float = 0.0,
    limit: float = 0.0,
    scales: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Each row's expert's matrix [N, K], or [2 N, K] if gated, times the row, activated if gated: [groups.rows, N].

    x [rows // divisor, K], weight [E, N, K]. scales: of x and of the weight, in FP8 or int8, and dtype of the result.
    """
    fp4 = weight.group if isinstance(weight, Fp4Weight) else 0
    values = weight.values if isinstance(weight, Fp4Weight) else weight
    n, k = weight.shape[1] // 2 if gated else weight.shape[1], weight.shape[2]
    y = torch.empty((groups.rows, n), dtype=dtype or x.dtype, device=x.device)
    tile = groups.tile
    step = tile.columns
    if scales is None:
        step = min(tile.columns, next_power_of_2(k))
        while step > 64 and k % step:
            step //= 2
        step = max(fp4, 16, step)
    stage = (tile.rows + tile.band) * step * x.element_size()
    if isinstance(weight, Fp4Weight):
        tables = (x, weight.scales.view(torch.uint8), weight.row_scales)
    else:
        tables = (x, x, x) if scales is None else (*scales, x)
    widen = fp4 > 0 and x.dtype == torch.float16
    early = overlaps(x.device)
    grid = (groups.tiles * cdiv(n, tile.band // 2 if gated else tile.band),)
    _grouped_kernel[grid](
        x,
        values,
        x if bias is None else bias,
        *tables,
        y,
        groups.where,
        groups.where if groups.order is None else groups.order,
        groups.tiles,
        groups.rows,
        groups.experts,
        groups.capacity,
        n,
        k,
        x.stride(0),
        values.stride(0),
        values.stride(1),
        alpha,
        limit,
        LAYOUT=groups.layout,
        ORDER=groups.order is not None,
        INDEX=next_power_of_2(groups.rows if groups.layout == "ids" else groups.experts),
        DIVISOR=divisor,
        GATED=gated,
        BIAS=bias is not None,
        SCALES=0 if scales is None else scales[1].dim() - 1,
        FP4=fp4,
        WIDEN=widen,
        EVEN_K=k % step == 0,
        ROWS=tile.rows,
        BAND=tile.band,
        STEP=step,
        TOGETHER=_TOGETHER,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        EARLY=early,
        launch_pdl=early,
        num_warps=tile.warps,
        num_stages=max(1, min(tile.stages, shared_memory(x.device) // stage)),
    )
    return y


def grouped_experts(
    x: Tensor,
    groups: Groups,
    gate_up: Tensor | Fp4Weight,
    down: Tensor | Fp4Weight,
    divisor: int = 1,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 0.0,
    limit: float = 0.0,
) -> Tensor:
    """The experts on their rows, [groups.rows, H]. Row r is of x's row r // divisor."""
    hidden = product(x, gate_up, groups, divisor, True, gate_up_bias, alpha, limit)
    return product(hidden, down, groups, 1, False, down_bias, alpha, limit)
