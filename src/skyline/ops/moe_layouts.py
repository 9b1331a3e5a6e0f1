"""Experts on tokens that are sorted by expert already, as they arrive where experts live on many devices.

`moe_experts` takes tokens in their own order. Between devices they travel by expert, in one of two layouts:

    ragged   the rows of one expert after those of the other, in one tensor [N, H]: little memory, uneven messages.
             offsets [E + 1] int32: expert e has rows offsets[e] to offsets[e + 1]
    padded   room for `capacity` rows of each expert, [E, C, H]: shapes that never change, for graphs that are recorded.
             counts [E] int32: expert e has rows 0 to counts[e]; what is beyond is neither read nor written

`moe_sort` brings tokens into the first, `moe_combine` adds the experts' results up again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.ops.contract import Case, Cost, Op, nbytes, randn, register


def _moe_sort(x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], ids [T, k] -> rows [T * k, H] by expert, offsets [E + 1] int32, and places [T, k] int32 of the rows.

    Tokens of one expert keep their order.
    """
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    offsets = torch.zeros(experts + 1, dtype=torch.int32, device=x.device)
    offsets[1:] = torch.bincount(flat, minlength=experts).cumsum(0)
    places = torch.empty_like(order, dtype=torch.int32)
    places[order] = torch.arange(len(order), dtype=torch.int32, device=x.device)
    return x.index_select(0, order // ids.shape[1]), offsets, places.view(ids.shape)


def _moe_sort_meta(x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.new_empty((ids.numel(), x.shape[1]))
    return rows, x.new_empty((experts + 1,), dtype=torch.int32), x.new_empty(ids.shape, dtype=torch.int32)


def _chosen(rows: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    spread = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(rows)])
    yield "spread", spread
    yield "same", torch.tensor([[4, 1]]).expand(rows, 2).contiguous()  # empty and overfull experts


def _moe_sort_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in (1, 4, 19):
        for name, ids in _chosen(rows, generator):
            yield Case(f"T={rows} {name}", (randn((rows, 16), dtype, generator), ids, 6))


moe_sort = register(
    Op(
        "moe_sort",
        _moe_sort,
        cost=lambda x, ids, experts: Cost(
            (1 + ids.shape[1]) * nbytes(x) + nbytes(ids) + 4 * (ids.numel() + experts + 1), 0
        ),
        cases=_moe_sort_cases,
        meta=_moe_sort_meta,
        num_outputs=3,
    )
)


def _moe_experts_ragged(rows: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """rows [N, H] by expert, offsets [E + 1] int32 -> down[e](silu(gate[e](row)) * up[e](row)) of each, [N, H].

    gate_up [E, 2I, H] (gate rows first), down [E, H, I].
    """
    output = torch.empty_like(rows)
    bounds = offsets.tolist()
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        gate, up = F.linear(rows[start:stop], gate_up[expert]).chunk(2, dim=-1)
        output[start:stop] = F.linear(F.silu(gate) * up, down[expert])
    return output


def _experts_cost(rows: int, used: int, x: Tensor, gate_up: Tensor, down: Tensor) -> Cost:
    """Of `rows` rows, for which the weights of `used` experts are read."""
    matrices = gate_up[0].numel() + down[0].numel()
    moved = 2 * rows * x.shape[-1] * x.element_size()
    return Cost(moved + used * matrices * gate_up.element_size(), 2 * rows * matrices)


def _moe_experts_ragged_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in (1, 4, 19):
        for name, ids in _chosen(rows, generator):
            sorted_rows, offsets, _ = _moe_sort(randn((rows, 16), dtype, generator), ids, 6)
            gate_up, down = randn((6, 24, 16), dtype, generator, 0.25), randn((6, 16, 12), dtype, generator, 0.3)
            yield Case(f"T={rows} {name}", (sorted_rows, offsets, gate_up, down))


moe_experts_ragged = register(
    Op(
        "moe_experts_ragged",
        _moe_experts_ragged,
        cost=lambda rows, offsets, gate_up, down: _experts_cost(
            rows.shape[0], min(rows.shape[0], gate_up.shape[0]), rows, gate_up, down
        ),
        cases=_moe_experts_ragged_cases,
        meta=lambda rows, *_: rows.new_empty(rows.shape),
    )
)


def _moe_experts_padded(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`moe_experts_ragged` on rows [E, C, H] with counts [E] int32 -> [E, C, H]; zeros beyond the counts."""
    output = torch.zeros_like(rows)
    for expert, count in enumerate(counts.tolist()):
        gate, up = F.linear(rows[expert, :count], gate_up[expert]).chunk(2, dim=-1)
        output[expert, :count] = F.linear(F.silu(gate) * up, down[expert])
    return output


def _moe_experts_padded_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for counts in ([0, 3, 1, 5, 0, 2], [5] * 6, [0] * 6):
        rows = randn((6, 5, 16), dtype, generator)
        for expert, count in enumerate(counts):
            rows[expert, count:] = 1e30  # nobody may look there
        gate_up, down = randn((6, 24, 16), dtype, generator, 0.25), randn((6, 16, 12), dtype, generator, 0.3)
        yield Case(f"counts={counts}", (rows, torch.tensor(counts, dtype=torch.int32), gate_up, down))


moe_experts_padded = register(
    Op(
        "moe_experts_padded",
        _moe_experts_padded,
        cost=lambda rows, counts, gate_up, down: _experts_cost(
            rows.shape[0] * rows.shape[1], rows.shape[0], rows, gate_up, down
        ),
        cases=_moe_experts_padded_cases,
        meta=lambda rows, *_: rows.new_empty(rows.shape),
    )
)


def _moe_combine(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """rows [N, H], places [T, k] int32, weights [T, k] float32 -> sum over k of weight * rows[place], [T, H].

    In float32, in the order of the choices, rounded once.
    """
    total = torch.zeros((places.shape[0], rows.shape[1]), dtype=torch.float32, device=rows.device)
    for choice in range(places.shape[1]):
        total += rows.index_select(0, places[:, choice]).float() * weights[:, choice : choice + 1]
    return total.to(rows.dtype)


def _moe_combine_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in (1, 4, 19):
        places = torch.randperm(2 * rows, generator=generator).int().view(rows, 2)
        weights = torch.rand((rows, 2), generator=generator)
        yield Case(f"T={rows}", (randn((2 * rows, 16), dtype, generator), places, weights))


moe_combine = register(
    Op(
        "moe_combine",
        _moe_combine,
        cost=lambda rows, places, weights: Cost(
            nbytes(rows, places, weights) + places.shape[0] * rows.shape[1] * rows.element_size(), 2 * rows.numel()
        ),
        cases=_moe_combine_cases,
        meta=lambda rows, places, weights: rows.new_empty((places.shape[0], rows.shape[1])),
    )
)
