"""Embedding and normalisation."""

from __future__ import annotations

from torch import Tensor, nn

from skyline import ops
from skyline.layers.context import LayerContext


class Embedding(nn.Module):
    """ids [T] int -> rows of `weight` [vocab, hidden], [T, hidden], times `scale` where there is one."""

    def __init__(self, context: LayerContext, vocab_size: int, hidden_size: int, scale: float | None = None) -> None:
        super().__init__()
        self.weight = context.parameter(vocab_size, hidden_size)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = ops.embedding(ids, self.weight)
        return rows if self.scale is None else ops.scale(rows, self.scale)


class RMSNorm(nn.Module):
    """x [T, n * size] -> each group of `size` columns divided by its root mean square, times `weight` [size].

    n is 1 for the norms of the residual stream; the norms of queries and keys treat each head alone (`per_head`).
    `offset`: what is stored is the weight less one, as in Gemma.
    """

    def __init__(
        self, context: LayerContext, size: int, eps: float, per_head: bool = False, offset: bool = False
    ) -> None:
        super().__init__()
        self.weight = context.parameter(size)
        self.eps = eps
        self.per_head = per_head
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        if self.offset:
            norm = ops.offset_head_rms_norm if self.per_head else ops.offset_rms_norm
        else:
            norm = ops.head_rms_norm if self.per_head else ops.rms_norm
        result: Tensor = norm(x, self.weight, self.eps)
        return result


class LayerNorm(nn.Module):
    """x [T, size] -> normalised to mean 0 and variance 1, times `weight` plus `bias`, both [size]."""

    def __init__(self, context: LayerContext, size: int, eps: float) -> None:
        super().__init__()
        self.weight = context.parameter(size)
        self.bias = context.parameter(size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = ops.layer_norm(x, self.weight, self.bias, self.eps)
        return result
