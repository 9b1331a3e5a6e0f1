"""Linear layers: one checkpoint tensor each, or several of them fused into one product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

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

    places: where the checkpoint mixes what is to lie apart here, the runs of rows (start, count) of this weight that a
    tensor's rows fill one after the other, by the tensor's name.
    """

    def __init__(
        self,
        context: LayerContext,
        in_features: int,
        outputs: Mapping[str, int],
        bias: bool = False,
        places: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        super().__init__()
        total = sum(outputs.values())
        starts = accumulate(outputs.values(), initial=0)
        whole = {name: [(start, rows)] for (name, rows), start in zip(outputs.items(), starts, strict=False)}
        self.places: dict[str, Sequence[tuple[int, int]]] = {**whole, **(places or {})}
        self.weight = context.parameter(total, in_features)
        self.bias = context.parameter(total) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = ops.linear(x, self.weight, self.bias)
        return result

    def checkpoint_tensors(self, path: str) -> dict[str, Destination]:
        parent = path.rpartition(".")[0]
        found: dict[str, Destination] = {}
        for name, runs in self.places.items():
            for kind, parameter in self.named_parameters(recurse=False):
                first, *others = (parameter.narrow(0, start, rows) for start, rows in runs)
                found[f"{parent}.{name}.{kind}".lstrip(".")] = Destination(first, others=tuple(others))
        return found
