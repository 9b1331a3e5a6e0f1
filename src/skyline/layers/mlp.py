"""Feed-forward layers: the gated MLP, and the mixture of such MLPs."""

from __future__ import annotations

from torch import Tensor, nn

from skyline import ops
from skyline.checkpoint.weights import Destination
from skyline.layers.context import LayerContext
from skyline.layers.linear import Linear, MergedLinear


class MLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202): x [T, hidden] -> down(silu(gate(x)) * up(x)), [T, hidden]."""

    def __init__(self, context: LayerContext, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = MergedLinear(context, hidden_size, parts, bias)
        self.down_proj = Linear(context, intermediate_size, hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(ops.silu_mul(self.gate_up_proj(x)))
        return result


class MoE(nn.Module):
    """Each token goes through the `top_k` experts its router likes best. x [T, hidden] -> [T, hidden].

    `renormalize`: the chosen experts' weights sum to one, rather than to their share of the softmax over all.
    """

    def __init__(
        self,
        context: LayerContext,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        renormalize: bool,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.renormalize = renormalize
        self.gate = Linear(context, hidden_size, num_experts)
        self.experts = Experts(context, hidden_size, intermediate_size, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = ops.topk_router(self.gate(x), self.top_k, self.renormalize)
        result: Tensor = self.experts(x, weights, ids)
        return result


class Experts(nn.Module):
    """All experts' weights: `gate_up` [E, 2 * intermediate, hidden], gate first, and `down` [E, hidden, intermediate].

    In the checkpoint every expert is an MLP of its own: `experts.{e}.gate_proj.weight`, `.up_proj`, `.down_proj`.
    """

    def __init__(self, context: LayerContext, hidden_size: int, intermediate_size: int, num_experts: int) -> None:
        super().__init__()
        self.gate_up = context.parameter(num_experts, 2 * intermediate_size, hidden_size)
        self.down = context.parameter(num_experts, hidden_size, intermediate_size)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        result: Tensor = ops.moe_experts(x, self.gate_up, self.down, weights, ids)
        return result

    def checkpoint_tensors(self, path: str) -> dict[str, Destination]:
        found: dict[str, Destination] = {}
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            gate, up = gate_up.chunk(2)
            for name, part in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                found[f"{path}.{expert}.{name}.weight"] = Destination(part)
        return found
