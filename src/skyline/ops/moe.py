"""Ops of a mixture of experts: choosing experts, and computing them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.ops.contract import Case, Cost, Op, nbytes, randn, register


def _topk_router(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> weights [T, top_k] float32 and expert ids [T, top_k] int64: softmax, then the largest.

    With `renormalize` the chosen weights sum to one.
    """
    weights, ids = logits.float().softmax(-1).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids


def _topk_router_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in (1, 9):
        for renormalize in (False, True):
            # A permutation of well separated values: no ties, so the choice is unambiguous in every dtype.
            logits = torch.stack([torch.randperm(8, generator=generator) for _ in range(rows)]) * 0.5
            yield Case(f"T={rows} renormalize={renormalize}", (logits.to(dtype), 3, renormalize))


topk_router = register(
    Op(
        "topk_router",
        _topk_router,
        cost=lambda logits, top_k, renormalize: Cost(nbytes(logits) + 12 * logits.shape[0] * top_k, 4 * logits.numel()),
        cases=_topk_router_cases,
        meta=lambda logits, top_k, renormalize: (
            logits.new_empty((logits.shape[0], top_k), dtype=torch.float32),
            logits.new_empty((logits.shape[0], top_k), dtype=torch.int64),
        ),
        num_outputs=2,
    )
)


def _moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Sum over the chosen experts e of weight * down[e](silu(gate[e](x)) * up[e](x)).

    x [T, H], gate_up [E, 2I, H] (gate rows first), down [E, H, I], weights [T, k] float32, ids [T, k] -> [T, H].
    """
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)  # (token, choice) pairs grouped by expert
    counts = torch.bincount(flat, minlength=gate_up.shape[0]).tolist()
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        pairs = order[start : start + count]
        tokens = pairs // ids.shape[1]
        hidden = _swiglu(x.index_select(0, tokens), gate_up[expert], down[expert])
        output.index_add_(0, tokens, hidden.float() * weights.reshape(-1)[pairs].unsqueeze(1))
        start += count
    return output.to(x.dtype)


def _swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def _moe_experts_cost(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Cost:
    pairs, experts = ids.numel(), gate_up.shape[0]
    touched = min(experts, pairs)  # each token may choose experts no other token did
    expert_bytes = nbytes(gate_up, down) // experts
    return Cost(2 * nbytes(x) + touched * expert_bytes, 2 * pairs * (gate_up[0].numel() + down[0].numel()))


def _moe_experts_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in (1, 4, 19):
        x = randn((rows, 16), dtype, generator)
        gate_up, down = randn((6, 24, 16), dtype, generator, 0.25), randn((6, 16, 12), dtype, generator, 0.3)
        spread = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(rows)])
        same = torch.tensor([[1, 4]]).expand(rows, 2).contiguous()  # empty and overfull experts
        weights = torch.rand((rows, 2), generator=generator)
        yield Case(f"T={rows} spread", (x, gate_up, down, weights, spread))
        yield Case(f"T={rows} same", (x, gate_up, down, weights, same))


moe_experts = register(
    Op(
        "moe_experts",
        _moe_experts,
        cost=_moe_experts_cost,
        cases=_moe_experts_cases,
        meta=lambda x, *_: torch.empty_like(x),
    )
)
