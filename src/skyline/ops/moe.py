"""Ops of a mixture of experts: choosing experts, and computing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.ops.contract import Case, CaseGenerator, Cost, Op, nbytes, randn, register
from skyline.ops.formats import plain_bytes


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
    expert_bytes = (plain_bytes(gate_up) + plain_bytes(down)) // experts
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
        meta=lambda x, *_: x.new_empty(x.shape),
    )
)


def _fused_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, residual: Tensor) -> Tensor:
    """moe_experts(x, gate_up, down, weights, ids) + residual [T, H]. A graph pass puts it in."""
    y: Tensor = moe_experts.reference(x, gate_up, down, weights, ids)
    return y + residual


def _fused_experts_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for case in _moe_experts_cases(dtype, generator):
        yield Case(case.label, (*case.args, randn(case.args[0].shape, dtype, generator)))


fused_experts = register(
    Op(
        "fused_experts",
        _fused_experts,
        cost=lambda x, gate_up, down, weights, ids, residual: (
            _moe_experts_cost(x, gate_up, down, weights, ids) + Cost(nbytes(residual), residual.numel())
        ),
        cases=_fused_experts_cases,
        meta=lambda x, *_: x.new_empty(x.shape),
    )
)


def _moe_experts_clamped(
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
    """`moe_experts` as gpt-oss has them: with biases, and an activation that is clamped.

    gate_up_bias [E, 2I], down_bias [E, H]. With gate at most `limit`, and up within -limit..limit, the activation is
    gate * sigmoid(alpha * gate) * (up + 1). https://github.com/openai/gpt-oss
    """
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(ids).tolist():
        tokens, choices = (ids == expert).nonzero(as_tuple=True)
        product = F.linear(x.index_select(0, tokens), gate_up[expert], gate_up_bias[expert])
        hidden = F.linear(clamped_swiglu(product, alpha, limit), down[expert], down_bias[expert])
        output.index_add_(0, tokens, hidden.float() * weights[tokens, choices].unsqueeze(1))
    return output.to(x.dtype)


def clamped_swiglu(product: Tensor, alpha: float, limit: float) -> Tensor:
    """[T, 2I], gate first -> [T, I], as in `moe_experts_clamped`."""
    gate, up = product.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def clamped_cost(plain: Callable[..., Cost]) -> Callable[..., Cost]:
    """That of `moe_experts_clamped`, from that of the op without biases."""

    def cost(
        x: Tensor,
        gate_up: Any,
        gate_up_bias: Tensor,
        down: Any,
        down_bias: Tensor,
        weights: Tensor,
        ids: Tensor,
        alpha: float,
        limit: float,
    ) -> Cost:
        biases = nbytes(gate_up_bias, down_bias) // gate_up.shape[0] * min(gate_up.shape[0], ids.numel())
        return plain(x, gate_up, down, weights, ids) + Cost(biases, 0)

    return cost


def with_residual(cases: CaseGenerator) -> CaseGenerator:
    """Of experts: as they are, and added to a residual."""

    def both(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
        for case in cases(dtype, generator):
            yield case
            residual = randn(case.args[0].shape, dtype, generator)
            yield Case(f"{case.label} residual", (*case.args, residual))

    return both


def clamped_cases(plain: CaseGenerator) -> CaseGenerator:
    """Those of `moe_experts_clamped`, from those of the op without biases."""

    def cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
        for case in plain(dtype, generator):
            x, gate_up, down, weights, ids = case.args
            biases = (randn(gate_up.shape[:2], dtype, generator, 0.5), randn(down.shape[:2], dtype, generator, 0.5))
            for limit in (7.0, 0.6):
                arguments = (x, gate_up, biases[0], down, biases[1], weights, ids, 1.702, limit)
                yield Case(f"{case.label} limit={limit}", arguments)

    return cases


moe_experts_clamped = register(
    Op(
        "moe_experts_clamped",
        _moe_experts_clamped,
        cost=clamped_cost(_moe_experts_cost),
        cases=clamped_cases(_moe_experts_cases),
        meta=lambda x, *_: x.new_empty(x.shape),
    )
)
