"""The experts of a mixture with weights in FP4 (skyline.ops.fp4), as `moe_experts` and as `moe_experts_clamped`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from skyline.ops.contract import Case, Cost, Op, Tolerance, nbytes, randn, register
from skyline.ops.fp4 import MXFP4_GROUP, NVFP4_GROUP, Fp4Weight, fp4_case_weight, fp4_weight_bytes, linear_fp4
from skyline.ops.moe import clamped_cases, clamped_cost, clamped_swiglu, with_residual


def _moe_experts_fp4(
    x: Tensor, gate_up: Fp4Weight, down: Fp4Weight, weights: Tensor, ids: Tensor, residual: Tensor | None = None
) -> Tensor:
    """`moe_experts` in `linear_fp4`, each expert two of its calls; a token adds its experts in float32.

    x [T, H], gate_up [E, 2I, H] (gate rows first), down [E, H, I], weights [T, k] float32, ids [T, k] -> [T, H], to
    which `residual` [T, H] is added, if it is there.
    """
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(ids).tolist():
        tokens, choices = (ids == expert).nonzero(as_tuple=True)
        hidden = linear_fp4.reference(x.index_select(0, tokens), fp4_expert(gate_up, expert), None, True)
        result = linear_fp4.reference(hidden, fp4_expert(down, expert))
        output.index_add_(0, tokens, result.float() * weights[tokens, choices].unsqueeze(1))
    y = output.to(x.dtype)
    return y if residual is None else y + residual


def _moe_experts_clamped_fp4(
    x: Tensor,
    gate_up: Fp4Weight,
    gate_up_bias: Tensor,
    down: Fp4Weight,
    down_bias: Tensor,
    weights: Tensor,
    ids: Tensor,
    alpha: float,
    limit: float,
) -> Tensor:
    """`moe_experts_clamped` in `linear_fp4`, whose sums are activated before they are rounded."""
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(ids).tolist():
        tokens, choices = (ids == expert).nonzero(as_tuple=True)
        product = linear_fp4.reference(
            x.index_select(0, tokens).float(), fp4_expert(gate_up, expert), gate_up_bias[expert]
        )
        hidden = clamped_swiglu(product, alpha, limit).to(x.dtype)
        result = linear_fp4.reference(hidden, fp4_expert(down, expert), down_bias[expert])
        output.index_add_(0, tokens, result.float() * weights[tokens, choices].unsqueeze(1))
    return output.to(x.dtype)


def fp4_expert(weight: Fp4Weight, expert: int) -> Fp4Weight:
    """The matrix [N, K] of one expert of a weight [E, N, K]."""
    return Fp4Weight(weight.values[expert], weight.scales[expert], weight.row_scales[expert], weight.group)


def experts_fp4_cost(
    x: Tensor, gate_up: Any, down: Any, weights: Tensor, ids: Tensor, residual: Tensor | None = None
) -> Cost:
    pairs, (experts, n, h), i = ids.numel(), gate_up.shape, down.shape[-1]
    expert_bytes = (fp4_weight_bytes(gate_up) + fp4_weight_bytes(down)) // experts
    extra = Cost(nbytes(residual), 0 if residual is None else residual.numel())
    return Cost(2 * nbytes(x) + min(experts, pairs) * expert_bytes, 2 * pairs * (n * h + h * i)) + extra


def _stacked(matrices: list[Fp4Weight]) -> Fp4Weight:
    """Matrices [N, K] as one weight [E, N, K]."""
    scales = torch.stack([matrix.scales.view(torch.uint8) for matrix in matrices]).view(matrices[0].scales.dtype)
    return Fp4Weight(
        torch.stack([matrix.values for matrix in matrices]),
        scales,
        torch.stack([matrix.row_scales for matrix in matrices]),
        matrices[0].group,
    )


def fp4_case_experts(
    hidden: int, inner: int, group: int, tokens: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Iterator[Case]:
    """Five experts of one size, and so many tokens that choose two of them: spread, and all the same two."""
    experts, top_k = 5, 2
    gate_up = _stacked([fp4_case_weight(2 * inner, hidden, group, generator) for _ in range(experts)])
    down = _stacked([fp4_case_weight(hidden, inner, group, generator) for _ in range(experts)])
    for rows in tokens:
        x, weights = randn((rows, hidden), dtype, generator), torch.rand((rows, top_k), generator=generator)
        spread = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(rows)])
        same = torch.tensor([[1, 4]]).expand(rows, top_k).contiguous()
        for name, ids in (("spread", spread), ("same", same)):
            label = f"T={rows} H={hidden} I={inner} group={group} {name}"
            yield Case(label, (x, gate_up, down, weights, ids))


def _cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for hidden, inner, group in (
        (64, 32, MXFP4_GROUP),
        (72, 20, MXFP4_GROUP),
        (64, 48, NVFP4_GROUP),
        (136, 24, NVFP4_GROUP),
    ):
        yield from fp4_case_experts(hidden, inner, group, (1, 19), dtype, generator)


# Two products behind each other: the hidden values are rounded, and each expert's result.
_TOLERANCE: Tolerance = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 3e-2), torch.float16: (4e-3, 5e-3)}

moe_experts_fp4 = register(
    Op(
        "moe_experts_fp4",
        _moe_experts_fp4,
        cost=experts_fp4_cost,
        cases=with_residual(_cases),
        meta=lambda x, *_: x.new_empty(x.shape),
        tolerance=_TOLERANCE,
    )
)
moe_experts_clamped_fp4 = register(
    Op(
        "moe_experts_clamped_fp4",
        _moe_experts_clamped_fp4,
        cost=clamped_cost(experts_fp4_cost),
        cases=clamped_cases(_cases),
        meta=lambda x, *_: x.new_empty(x.shape),
        tolerance=_TOLERANCE,
    )
)
