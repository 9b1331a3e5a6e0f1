"""Which rows of which expert a program computes: the tiles that skyline.kernels.triton.moe_products goes by.

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

from skyline.kernels.triton.device import capability
from skyline.kernels.triton.knobs import current


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
# With a scale a block, each block's products are scaled before they are added: a second sum in registers.
_BLOCK_TILES: tuple[tuple[float, Tile], ...] = (
    *_BYTE_TILES[:2],
    (64, Tile(64, 128, 128, 8, 4)),  # with four warps 440 bytes a thread did not fit (counted in the machine code)
    _BYTE_TILES[3],
)
# Those of four bits by what benchmarks/gpu/experts.py found of FP4 on an H200.
_WORD_TILES: tuple[tuple[float, Tile], ...] = (
    (8, Tile(16, 128, 128, 4, 4)),
    (float("inf"), Tile(64, 128, 64, 4, 3)),
)


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


# Of products: plain ones of x as it is, with weights that may be int8; of bytes, and of those whose scales belong to
# blocks; of x with words of FP4, and of int4.
Kind = Literal["plain", "bytes", "blocks", "fp4", "int4"]


def tile_for(rows: int, experts: int, x: Tensor, kind: Kind = "plain") -> Tile:
    """For so many rows of x's device and dtype in all."""
    if kind in ("bytes", "blocks"):
        tiles = _BYTE_TILES if kind == "bytes" else _BLOCK_TILES
    elif (x.dtype == torch.bfloat16 and kind == "fp4") or (x.dtype != torch.float32 and kind == "int4"):
        tiles = _WORD_TILES
    else:
        tiles = _TILES if kind == "plain" and x.dtype != torch.float32 else _FLOAT32_TILES
    tile = next(tile for most, tile in tiles if rows <= most * experts)
    major = capability(x.device)[0]
    if major == 10 and kind == "blocks":
        tile = tile._replace(rows=min(tile.rows, 64))  # of 128, 400 bytes a thread did not fit
    if major not in (9, 10):
        tile = tile._replace(band=min(tile.band, 128))  # matrix units whose operands take registers as well
    knobs = current()
    return Tile(
        knobs.experts_rows or tile.rows,
        knobs.experts_band or tile.band,
        tile.columns,
        knobs.experts_warps or tile.warps,
        knobs.experts_stages or tile.stages,
    )


@triton.jit
def rows_of(
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
