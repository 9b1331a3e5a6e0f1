"""Embedding and normalisation."""

from __future__ import annotations

from torch import Tensor, nn

from skyline import ops
from skyline.layers.context import LayerContext


class Embedding(nn.Module):
    """ids [T] int -> rows of `weight` [vocab, hidden], [T, hidden]."""

    def __init__(self, context: LayerContext, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = context.parameter(vocab_size, hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = ops.embedding(ids, self.weight)
        return result


class RMSNorm(nn.Module):
    """x [T, n * size] -> each group of `size` columns divided by its root mean square, times `weight` [size].

    n is 1 for the norms of the residual stream; the norms of queries and keys treat each head alone (`per_head`).
    """

    def __init__(self, context: LayerContext, size: int, eps: float, per_head: bool = False) -> None:
        super().__init__()
        self.weight = context.parameter(size)
        self.eps = eps
        self.per_head = per_head

    def forward(self, x: Tensor) -> Tensor:
        norm = ops.head_rms_norm if self.per_head else ops.rms_norm
        result: Tensor = norm(x, self.weight, self.eps)
        return result
