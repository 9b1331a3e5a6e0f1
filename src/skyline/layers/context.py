"""What every layer must know to create its parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class LayerContext:
    """Handed down from the model to each layer's constructor.

    On the "meta" device a model has shapes but no memory, which is enough to explain it.
    """

    dtype: torch.dtype
    device: torch.device

    def parameter(self, *shape: int) -> nn.Parameter:
        """Uninitialised memory: a checkpoint or `randomize` fills it, so nothing is spent on values twice."""
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device), requires_grad=False)
