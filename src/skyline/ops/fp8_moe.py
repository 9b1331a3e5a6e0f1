"""The experts of a mixture with weights in FP8 (skyline.ops.fp8), in the signature of `moe_experts`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from skyline.ops.contract import Case, Cost, Op, Tolerance, nbytes, randn, register
from skyline.ops.fp8 import Fp8Weight, fp8_bytes, fp8_case_weight, linear_fp8
from skyline.ops.moe import with_residual


def _moe_experts_fp8(
    x: Tensor, gate_up: Fp8Weight, down: Fp8Weight, weights: Tensor, ids: Tensor, residual: Tensor | None = None
) -> Tensor:
    """`moe_experts` in `linear_fp8`, each expert two of its calls; a token adds its experts in float32.

    x [T, H], gate_up [E, 2I, H] (gate rows first), down [E, H, I], weights [T, k] float32, ids [T, k] -> [T, H], to
    which `residual` [T, H] is added, if it is there. Kernels may round x and the activated products to FP8.
    """
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(ids).tolist():
        tokens, choices = (ids == expert).nonzero(as_tuple=True)
        hidden = linear_fp8.reference(x.index_select(0, tokens), fp8_expert(gate_up, expert), None, True)
        result = linear_fp8.reference(hidden, fp8_expert(down, expert))
        output.index_add_(0, tokens, result.float() * weights[tokens, choices].unsqueeze(1))
    y = output.to(x.dtype)
    return y if residual is None else y + residual


def fp8_expert(weight: Fp8Weight, expert: int) -> Fp8Weight:
    """The matrix [N, K] of one expert of a weight [E, N, K]."""
    return Fp8Weight(weight.values[expert], weight.scales[expert])


def _cost(x: Tensor, gate_up: Any, down: Any, weights: Tensor, ids: Tensor, residual: Tensor | None = None) -> Cost:
    pairs, (experts, n, h), i = ids.numel(), gate_up.shape, down.shape[-1]
    expert_bytes = (fp8_bytes(gate_up) + fp8_bytes(down)) // experts
    extra = Cost(nbytes(residual), 0 if residual is None else residual.numel())
    return Cost(2 * nbytes(x) + min(experts, pairs) * expert_bytes, 2 * pairs * (n * h + h * i)) + extra


def _stacked(matrices: list[Fp8Weight]) -> Fp8Weight:
    """Matrices [N, K] as one weight [E, N, K]."""
    return Fp8Weight(
        torch.stack([matrix.values.view(torch.uint8) for matrix in matrices]).view(matrices[0].values.dtype),
        torch.stack([matrix.scales for matrix in matrices]),
    )


def _cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    experts, top_k = 5, 2
    for hidden, inner, blocks in ((64, 32, False), (72, 20, False), (144, 128, True), (136, 24, True)):
        gate_up = _stacked([fp8_case_weight(2 * inner, hidden, blocks, generator) for _ in range(experts)])
        down = _stacked([fp8_case_weight(hidden, inner, blocks, generator) for _ in range(experts)])
        for rows in (1, 19):
            x, weights = randn((rows, hidden), dtype, generator), torch.rand((rows, top_k), generator=generator)
            spread = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(rows)])
            same = torch.tensor([[1, 4]]).expand(rows, top_k).contiguous()
            for name, ids in (("spread", spread), ("same", same)):
                label = f"T={rows} H={hidden} I={inner} blocks={blocks} {name}"
                yield Case(label, (x, gate_up, down, weights, ids))


# Two products behind each other, and the activation between them can double an error: more than one linear's.
_TOLERANCE: Tolerance = {dtype: (0.15, 0.4) for dtype in (torch.float32, torch.bfloat16, torch.float16)}

moe_experts_fp8 = register(
    Op(
        "moe_experts_fp8",
        _moe_experts_fp8,
        cost=_cost,
        cases=with_residual(_cases),
        meta=lambda x, *_: x.new_empty(x.shape),
        tolerance=_TOLERANCE,
    )
)
