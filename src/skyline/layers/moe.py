"""Mixtures of experts: routers and the experts' weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skyline import ops
from skyline.checkpoint.weights import Destination
from skyline.layers.context import LayerContext
from skyline.layers.linear import Linear
from skyline.ops.router import Scoring

EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj")


class MoE(nn.Module):
    """Each token goes through the `top_k` experts its router likes best. x [T, hidden] -> [T, hidden].

    `renormalize`: the chosen experts' weights sum to one, rather than to their share of the softmax over all. `names`:
    see Experts.
    """

    def __init__(
        self,
        context: LayerContext,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        renormalize: bool,
        names: tuple[str, str, str] = EXPERT_NAMES,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.renormalize = renormalize
        self.gate = Linear(context, hidden_size, num_experts)
        self.experts = Experts(context, hidden_size, intermediate_size, num_experts, names)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = ops.topk_router(self.gate(x), self.top_k, self.renormalize)
        result: Tensor = self.experts(x, weights, ids)
        return result


class Router(nn.Module):
    """x [T, hidden] -> weights [T, top_k] and ids [T, top_k] of experts, in all the ways of `ops.router`.

    Checkpoint names: `weight` [E, hidden], `bias` [E] and `e_score_correction_bias` [E] where they are used.
    """

    def __init__(
        self,
        context: LayerContext,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        scoring: Scoring,
        *,
        renormalize: bool = False,
        bias: bool = False,
        correction: bool = False,
        factor: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
    ) -> None:
        super().__init__()
        self.weight = context.parameter(num_experts, hidden_size)
        self.bias = context.parameter(num_experts) if bias else None
        # Small differences between large numbers decide; checkpoints keep it in float32.
        self.e_score_correction_bias = context.parameter(num_experts, dtype=torch.float32) if correction else None
        self.options = (top_k, scoring, renormalize, factor, groups, top_groups)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = ops.router(x, self.weight, self.bias, self.e_score_correction_bias, *self.options)
        return weights, ids


class Experts(nn.Module):
    """All experts' weights: `gate_up` [E, 2 * intermediate, hidden], gate first, and `down` [E, hidden, intermediate].

    In the checkpoint every expert is an MLP of its own: `experts.{e}.gate_proj.weight`, `.up_proj`, `.down_proj`, or as
    `names` says, in this order.
    """

    def __init__(
        self,
        context: LayerContext,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        names: tuple[str, str, str] = EXPERT_NAMES,
    ) -> None:
        super().__init__()
        self.names = names
        self.gate_up = context.parameter(num_experts, 2 * intermediate_size, hidden_size)
        self.down = context.parameter(num_experts, hidden_size, intermediate_size)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        result: Tensor = ops.moe_experts(x, self.gate_up, self.down, weights, ids)
        return result

    def checkpoint_tensors(self, path: str) -> dict[str, Destination]:
        found: dict[str, Destination] = {}
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            for name, part in zip(self.names, (*gate_up.chunk(2), down), strict=True):
                found[f"{path}.{expert}.{name}.weight"] = Destination(part)
        return found
