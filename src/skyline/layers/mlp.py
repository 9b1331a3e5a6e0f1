"""The gated feed-forward layer."""

from __future__ import annotations

from torch import Tensor, nn

from skyline import ops
from skyline.layers.context import LayerContext
from skyline.layers.linear import Linear, MergedLinear


class MLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202): x [T, hidden] -> down(silu(gate(x)) * up(x)), [T, hidden].

    `gelu`: with the tanh form of gelu in silu's place.
    """

    def __init__(
        self,
        context: LayerContext,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        gelu: bool = False,
    ) -> None:
        super().__init__()
        self.activation = ops.gelu_mul if gelu else ops.silu_mul
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = MergedLinear(context, hidden_size, parts, bias)
        self.down_proj = Linear(context, intermediate_size, hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.activation(self.gate_up_proj(x)))
        return result
