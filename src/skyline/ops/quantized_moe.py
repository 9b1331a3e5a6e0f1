"""The experts of a mixture on quantized weights, in the signature of `moe_experts`.

Each expert is two calls of the linear op of the same format (ops/quantized.py): gate and up with silu_mul, and down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from skyline.ops import quantized
from skyline.ops.contract import Case, Cost, Op, nbytes, randn, register
from skyline.ops.moe import with_residual
from skyline.ops.quantized import QuantizedWeight

Linear = Callable[[Tensor, QuantizedWeight, Tensor | None, bool], Tensor]


def expert_weight(weight: QuantizedWeight, expert: int) -> QuantizedWeight:
    """The matrix [N, K] of one expert of a weight [E, N, K]."""
    zeros = None if weight.zeros is None else weight.zeros[expert]
    return QuantizedWeight(weight.values[expert], weight.scales[expert], zeros, weight.group)


def mixture(
    x: Tensor, gate_up: QuantizedWeight, down: QuantizedWeight, weights: Tensor, ids: Tensor, linear: Linear
) -> Tensor:
    """`moe_experts` by means of a linear op. A token adds its experts in the order of its choices, in float32."""
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for choice in range(ids.shape[1]):
        chosen = ids[:, choice]
        for expert in torch.unique(chosen).tolist():
            rows = (chosen == expert).nonzero().squeeze(1)
            hidden = linear(x.index_select(0, rows), expert_weight(gate_up, expert), None, True)
            result = linear(hidden, expert_weight(down, expert), None, False)
            output[rows] += result.float() * weights[rows, choice].unsqueeze(1)
    return output.to(x.dtype)


def _moe_experts_int8(
    x: Tensor, gate_up: QuantizedWeight, down: QuantizedWeight, weights: Tensor, ids: Tensor
) -> Tensor:
    """`moe_experts` in `linear_int8`: x's rows are quantized, and so is each expert's activated product.

    x [T, H], gate_up [E, 2I, H] (gate rows first), down [E, H, I], weights [T, k] float32, ids [T, k] -> [T, H].
    """
    return mixture(x, gate_up, down, weights, ids, quantized.linear_int8.reference)


def _moe_experts_int8_weight_only(
    x: Tensor, gate_up: QuantizedWeight, down: QuantizedWeight, weights: Tensor, ids: Tensor
) -> Tensor:
    """`moe_experts` in `linear_int8_weight_only`; shapes as in `moe_experts_int8`."""
    return mixture(x, gate_up, down, weights, ids, quantized.linear_int8_weight_only.reference)


def _moe_experts_int4(
    x: Tensor, gate_up: QuantizedWeight, down: QuantizedWeight, weights: Tensor, ids: Tensor
) -> Tensor:
    """`moe_experts` in `linear_int4`; shapes as in `moe_experts_int8`."""
    return mixture(x, gate_up, down, weights, ids, quantized.linear_int4.reference)


def _moe_experts_int4_weight_only(
    x: Tensor,
    gate_up: QuantizedWeight,
    down: QuantizedWeight,
    weights: Tensor,
    ids: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """`moe_experts` in `linear_int4_weight_only`; shapes as in `moe_experts_int8`. residual [T, H] is added."""
    y = mixture(x, gate_up, down, weights, ids, quantized.linear_int4_weight_only.reference)
    return y if residual is None else y + residual


def _cost(bits: int) -> Callable[..., Cost]:
    def cost(x: Tensor, gate_up: Any, down: Any, weights: Tensor, ids: Tensor, residual: Tensor | None = None) -> Cost:
        pairs, (experts, n, h), i = ids.numel(), gate_up.shape, down.shape[-1]
        expert_bytes = sum(quantized.weight_bytes(weight, bits) // experts for weight in (gate_up, down))
        extra = Cost(nbytes(residual), 0 if residual is None else residual.numel())
        return Cost(2 * nbytes(x) + min(experts, pairs) * expert_bytes, 2 * pairs * (n * h + h * i)) + extra

    return cost


def _meta(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def stacked(matrices: list[QuantizedWeight]) -> QuantizedWeight:
    """Matrices [N, K] as one weight [E, N, K]."""
    zeros = [matrix.zeros for matrix in matrices if matrix.zeros is not None]
    return QuantizedWeight(
        torch.stack([matrix.values for matrix in matrices]),
        torch.stack([matrix.scales for matrix in matrices]),
        torch.stack(zeros) if zeros else None,
        matrices[0].group,
    )


_EXPERTS, _TOP_K = 5, 2


def _moe_cases(
    label: str, make: Callable[[int, int], QuantizedWeight], dtype: torch.dtype, generator: torch.Generator
) -> Iterator[Case]:
    for hidden, inner in ((64, 32), (72, 20)):
        gate_up = stacked([make(2 * inner, hidden) for _ in range(_EXPERTS)])
        down = stacked([make(hidden, inner) for _ in range(_EXPERTS)])
        for rows in (1, 19):
            x, weights = randn((rows, hidden), dtype, generator), torch.rand((rows, _TOP_K), generator=generator)
            spread = torch.stack([torch.randperm(_EXPERTS, generator=generator)[:_TOP_K] for _ in range(rows)])
            same = torch.tensor([[1, 4]]).expand(rows, _TOP_K).contiguous()
            for name, ids in (("spread", spread), ("same", same)):
                yield Case(f"T={rows} H={hidden} I={inner} {name}{label}", (x, gate_up, down, weights, ids))


def _int8_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    yield from _moe_cases("", lambda n, k: quantized.int8_case_weight(n, k, generator), dtype, generator)


def _int4_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for group in (32, 64, 128):
        for zeros in (False, True):

            def make(n: int, k: int, group: int = group, zeros: bool = zeros) -> QuantizedWeight:
                weight = quantized.int4_case_weight(n, k, group, zeros, generator)
                # Weights off their zero points are large, and three of them are multiplied: keep results near one.
                return QuantizedWeight(weight.values, weight.scales / 2, weight.zeros, group)

            yield from _moe_cases(f" group={group} zeros={zeros}", make, dtype, generator)


# Where activations are quantized, a hidden value that is rounded to bfloat16 may become another integer.
_TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 4e-2), torch.float16: (4e-3, 1e-2)}

moe_experts_int8 = register(
    Op(
        "moe_experts_int8",
        _moe_experts_int8,
        cost=_cost(8),
        cases=_int8_cases,
        tolerance=_TOLERANCE,
        meta=_meta,
    )
)
moe_experts_int8_weight_only = register(
    Op(
        "moe_experts_int8_weight_only",
        _moe_experts_int8_weight_only,
        cost=_cost(8),
        cases=_int8_cases,
        meta=_meta,
    )
)
moe_experts_int4 = register(
    Op(
        "moe_experts_int4",
        _moe_experts_int4,
        cost=_cost(4),
        cases=_int4_cases,
        tolerance=_TOLERANCE,
        meta=_meta,
    )
)
moe_experts_int4_weight_only = register(
    Op(
        "moe_experts_int4_weight_only",
        _moe_experts_int4_weight_only,
        cost=_cost(4),
        cases=with_residual(_int4_cases),
        tolerance=_TOLERANCE,  # hidden values are rounded, and each expert's result
        meta=_meta,
    )
)
