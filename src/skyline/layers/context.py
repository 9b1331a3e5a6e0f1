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
    # False: no memory for parameters, which a loader then provides in the layout its kernels want. Tables that follow
    # from the configuration are made in any case.
    allocate: bool = True

    def parameter(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """Uninitialised memory: a checkpoint or `randomize` fills it, so nothing is spent on values twice.

        dtype: for the few that are kept in another one than the model's.
        """
        device = self.device if self.allocate else "meta"
        return nn.Parameter(torch.empty(shape, dtype=dtype or self.dtype, device=device), requires_grad=False)
