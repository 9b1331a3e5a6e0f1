"""Mixture of experts: few launches, and nothing that depends on values the device has.

One token streams its experts' weights (moe_stream.py, words.py). More tokens: tiles of an expert's rows (moe_tiles.py,
moe_products.py), which for few pairs of token and expert are found by looking at all ids, else after a sort; then a sum
over a token's choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton.device import overlaps
from skyline.kernels.triton.layouts import Fp4Words, Int4Weight, Words, fp4_words, int4_words
from skyline.kernels.triton.moe_products import grouped_experts
from skyline.kernels.triton.moe_stream import stream
from skyline.kernels.triton.moe_tiles import Groups, Kind, Tile, tile_for
from skyline.kernels.triton.sizes import cdiv, next_power_of_2
from skyline.kernels.triton.thresholds import FEW_PAIRS
from skyline.kernels.triton.words import few_experts
from skyline.ops import Fp4Weight, QuantizedWeight

_STREAM_TOKENS = 1  # up to so many are not grouped: each reads its experts on its own
_SORT_BLOCK = 4096


@triton.jit
def _sort_kernel(
    ids,  # [pairs] int64
    order,  # [pairs] int32: the pair of each place, or unused
    places,  # [pairs] int32: the place of each pair, or unused
    offsets,  # [E + 1] int32
    pairs,
    ORDER: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.program_id(0)
    each = tl.arange(0, BLOCK)
    lower = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, pairs, BLOCK):
        pair = first + each
        chosen = tl.load(ids + pair, mask=pair < pairs, other=0x7FFFFFFF).to(tl.int32)
        lower += (chosen < expert).to(tl.int32)
    start = tl.sum(lower, 0)
    tl.store(offsets + expert, start)
    if expert == tl.num_programs(0) - 1:
        tl.store(offsets + expert + 1, pairs)
    for first in range(0, pairs, BLOCK):
        pair = first + each
        same = tl.load(ids + pair, mask=pair < pairs, other=0x7FFFFFFF).to(tl.int32) == expert
        place = start + tl.cumsum(same.to(tl.int32), 0) - 1
        if ORDER:
            tl.store(order + place, pair, mask=same)
        if PLACES:
            tl.store(places + pair, place, mask=same)
        start += tl.sum(same.to(tl.int32), 0)


def _sort(ids: Tensor, experts: int, order: Tensor | None, places: Tensor | None) -> Tensor:
    """Fill order [pairs] or places [pairs], as given -> offsets [E + 1] int32. Pairs of one expert keep their order."""
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=ids.device)
    block = min(_SORT_BLOCK, max(128, next_power_of_2(ids.numel())))
    early = overlaps(ids.device)
    _sort_kernel[(experts,)](
        ids,
        offsets if order is None else order,
        offsets if places is None else places,
        offsets,
        ids.numel(),
        ORDER=order is not None,
        PLACES=places is not None,
        BLOCK=block,
        EARLY=early,
        num_warps=min(8, block // 128),
        launch_pdl=early,
    )
    return offsets


@triton.jit
def _spread_kernel(
    x,  # [T, H]
    places,  # [T, TOP_K] int32
    rows,  # [T * TOP_K, H], contiguous
    size,
    x_stride,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(x + token * x_stride + columns, mask=inside)
    for choice in tl.static_range(TOP_K):
        place = tl.load(places + token * TOP_K + choice).to(tl.int64)
        tl.store(rows + place * size + columns, values, mask=inside)


@triton.jit
def _combine_kernel(
    rows,  # [N, H]
    places,  # [T, TOP_K] int32, or unused: choice c of token t is row t * TOP_K + c
    weights,  # [T, TOP_K] float32
    residual,  # [T, H], or unused
    y,  # [T, H], contiguous
    size,
    stride,
    residual_stride,
    RESIDUAL: tl.constexpr,
    PLACES: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        place = token * TOP_K + choice
        weight = tl.load(weights + place)
        if PLACES:
            place = tl.load(places + place).to(tl.int64)
        total += weight * tl.load(rows + place * stride + columns, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + token * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * size + columns, total.to(y.dtype.element_ty), mask=inside)


def groups_of(ids: Tensor, experts: int, tile: Tile) -> Groups:
    """Of ids [T, k], contiguous."""
    pairs = ids.numel()
    if pairs <= FEW_PAIRS:
        return Groups("ids", ids, None, pairs, tile, pairs, experts)
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    offsets = _sort(ids, experts, order, None)
    return Groups("offsets", offsets, order, pairs // tile.rows + experts, tile, pairs, experts)


def combine(rows: Tensor, places: Tensor | None, weights: Tensor, residual: Tensor | None = None) -> Tensor:
    """Sum of weight [T, k] * row over a token's choices, in float32, plus residual [T, H] -> [T, H]."""
    (tokens, top_k), size = weights.shape, rows.shape[1]
    y = rows.new_empty((tokens, size))
    if tokens:
        block, early = min(1024, next_power_of_2(size)), overlaps(rows.device)
        _combine_kernel[(tokens, cdiv(size, block))](
            rows,
            weights if places is None else places,
            weights,
            rows if residual is None else residual,
            y,
            size,
            rows.stride(0),
            0 if residual is None else residual.stride(0),
            RESIDUAL=residual is not None,
            PLACES=places is not None,
            TOP_K=top_k,
            BLOCK=block,
            EARLY=early,
            launch_pdl=early,
        )
    return y


def moe_combine(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    return combine(rows, places.contiguous(), weights.contiguous())


def moe_sort(x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, top_k), size = ids.shape, x.shape[1]
    rows = x.new_empty((tokens * top_k, size))
    places = torch.empty(ids.shape, dtype=torch.int32, device=x.device)
    offsets = _sort(ids.contiguous(), experts, None, places)
    if tokens:
        block = min(1024, next_power_of_2(size))
        _spread_kernel[(tokens, cdiv(size, block))](x, places, rows, size, x.stride(0), TOP_K=top_k, BLOCK=block)
    return rows, offsets, places


def _experts(
    x: Tensor,
    gate_up: Tensor | Words,
    gate_up_bias: Tensor | None,
    down: Tensor | Words,
    down_bias: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    alpha: float = 0.0,
    limit: float = 0.0,
    residual: Tensor | None = None,
    up_first: bool = False,
) -> Tensor:
    (tokens, top_k), experts = ids.shape, gate_up.shape[0]
    weights, ids = weights.contiguous(), ids.contiguous()
    if tokens == 0:
        return torch.empty_like(x)
    kind: Kind = "plain" if isinstance(gate_up, Tensor) else "fp4" if isinstance(gate_up, Fp4Words) else "int4"
    if tokens <= _STREAM_TOKENS:
        if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
            return stream(x, gate_up, gate_up_bias, down, down_bias, weights, ids, alpha, limit, residual, up_first)
        if not isinstance(gate_up, Tensor) and not isinstance(down, Tensor):
            return few_experts(x, gate_up, gate_up_bias, down, down_bias, weights, ids, alpha, limit, residual)
    groups = groups_of(ids, experts, tile_for(tokens * top_k, experts, x, kind))
    rows = grouped_experts(x, groups, gate_up, down, top_k, gate_up_bias, down_bias, alpha, limit, up_first)
    return combine(rows, None, weights, residual)


def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    return _experts(x, gate_up, None, down, None, weights, ids)


def fused_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    residual: Tensor | None,
    up_first: bool = False,
) -> Tensor:
    """up_first: of gate_up the rows of gate are the last ones, as CUTLASS's mixtures have them."""
    return _experts(x, gate_up, None, down, None, weights, ids, residual=residual, up_first=up_first)


def moe_experts_clamped(
    x: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    weights: Tensor,
    ids: Tensor,
    alpha: float,
    limit: float,
) -> Tensor:
    return _experts(x, gate_up, gate_up_bias, down, down_bias, weights, ids, alpha, limit)


def moe_experts_fp4(
    x: Tensor,
    gate_up: Fp4Weight | Fp4Words,
    down: Fp4Weight | Fp4Words,
    weights: Tensor,
    ids: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    return _experts(x, fp4_words(gate_up), None, fp4_words(down), None, weights, ids, residual=residual)


def moe_experts_int4_weight_only(
    x: Tensor,
    gate_up: QuantizedWeight | Int4Weight,
    down: QuantizedWeight | Int4Weight,
    weights: Tensor,
    ids: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    return _experts(x, int4_words(gate_up), None, int4_words(down), None, weights, ids, residual=residual)


def moe_experts_clamped_fp4(
    x: Tensor,
    gate_up: Fp4Weight | Fp4Words,
    gate_up_bias: Tensor,
    down: Fp4Weight | Fp4Words,
    down_bias: Tensor,
    weights: Tensor,
    ids: Tensor,
    alpha: float,
    limit: float,
) -> Tensor:
    return _experts(x, fp4_words(gate_up), gate_up_bias, fp4_words(down), down_bias, weights, ids, alpha, limit)


def moe_experts_ragged(rows: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    experts = gate_up.shape[0]
    if rows.shape[0] == 0:
        return torch.empty_like(rows)
    tile = tile_for(rows.shape[0], experts, rows)
    tiles = rows.shape[0] // tile.rows + experts
    return grouped_experts(rows, Groups("offsets", offsets, None, tiles, tile, rows.shape[0], experts), gate_up, down)


def moe_experts_padded(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    experts, capacity, size = rows.shape
    if capacity == 0:
        return torch.empty_like(rows)
    # How full the experts are is known on the device alone: as if all were.
    tile = tile_for(experts * capacity, experts, rows)
    tiles = experts * cdiv(capacity, tile.rows)
    groups = Groups("counts", counts, None, tiles, tile, experts * capacity, experts, capacity)
    return grouped_experts(rows.view(-1, size), groups, gate_up, down).view(rows.shape)
