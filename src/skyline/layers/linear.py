"""Linear layers: one checkpoint tensor each, or several of them fused into one product."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from skyline import ops
from skyline.checkpoint.weights import Destination
from skyline.layers.context import LayerContext


class Linear(nn.Module):
    """x [T, in] -> x @ weight.T + bias, [T, out]. Checkpoint names: `weight` [out, in], `bias` [out].

    `weight`: another module's parameter to use as this one's, for an output head tied to the word embeddings.
    """

    def __init__(
        self,
        context: LayerContext,
        in_features: int,
        out_features: int,
        bias: bool = False,
        weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.weight = context.parameter(out_features, in_features) if weight is None else weight
        self.bias = context.parameter(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = ops.linear(x, self.weight, self.bias)
        return result


class MergedLinear(nn.Module):
    """Linears that read the same input, as one: x [T, in] -> [T, sum(outputs)], in the order of `outputs`.

    One large product is faster than several small ones. In the checkpoint the parts are siblings of this module: with
    outputs {"q_proj": n, "k_proj": m} at `self_attn.qkv_proj`, the rows come from `self_attn.q_proj.weight` [n, in]
    and `self_attn.k_proj.weight` [m, in], and the biases likewise.
    """

    def __init__(self, context: LayerContext, in_features: int, outputs: Mapping[str, int], bias: bool = False) -> None:
        super().__init__()
        self.outputs = dict(outputs)
        total = sum(self.outputs.values())
        self.weight = context.parameter(total, in_features)
        self.bias = context.parameter(total) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = ops.linear(x, self.weight, self.bias)
        return result

    def checkpoint_tensors(self, path: str) -> dict[str, Destination]:
        parent = path.rpartition(".")[0]
        found: dict[str, Destination] = {}
        start = 0
        for name, rows in self.outputs.items():
            for kind, parameter in self.named_parameters(recurse=False):
                found[f"{parent}.{name}.{kind}".lstrip(".")] = Destination(parameter.narrow(0, start, rows))
            start += rows
        return found
