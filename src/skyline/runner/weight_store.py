"""Fills a Program's weights, each in the layout its kernels want, as the checkpoint is read.

The model's parameters have no memory of their own here: a parameter that only packed kernels use never exists unpacked.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from skyline.checkpoint.errors import CheckpointError
from skyline.graph import Program, WeightUse
from skyline.kernels import finish_weight
from skyline.layers import random_values
from skyline.ops import Fp4Weight, QuantizedWeight
from skyline.ops.fp8 import Fp8Rows
from skyline.ops.host_memory import reserve_weight
from skyline.ops.quantized import ByteRows


class WeightStore:
    """The memory behind the parameters, which are on the meta device, of a model that runs as `program`."""

    def __init__(self, model: nn.Module, program: Program, device: torch.device) -> None:
        self._device = device
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._targets: dict[int, list[tuple[WeightUse, Any]]] = {id(p): [] for p in model.parameters()}
        for use in program.weights:
            shape, dtype = tuple(use.parameter.shape), use.parameter.dtype
            if use.layout is None:
                target = reserve_weight(shape, dtype, device)
            else:
                target = use.layout.allocate(shape, dtype, device)
            self._targets[id(use.parameter)].append((use, target))
            program.set_weight(use, target)

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for targets in self._targets.values() for _, target in targets)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of the memory, each tensor under the names of its parameter, of its layout, and of the part it is."""
        found: dict[str, torch.Tensor] = {}
        for use, memory in (pair for targets in self._targets.values() for pair in targets):
            name = f"{self._names[id(use.parameter)]}/{'plain' if use.layout is None else use.layout.name}"
            if isinstance(memory, torch.Tensor):
                parts = {name: memory}
            else:
                values = {field.name: getattr(memory, field.name) for field in dataclasses.fields(memory)}
                parts = {f"{name}/{part}": v for part, v in values.items() if isinstance(v, torch.Tensor)}
            assert not found.keys() & parts.keys(), f"two layouts of one weight have the same name: {name}"
            found |= parts
        return found

    def write(
        self, target: torch.Tensor, source: torch.Tensor | QuantizedWeight | ByteRows | Fp8Rows | Fp4Weight
    ) -> None:
        """`target` is a parameter or some of its rows, on the meta device; `source` has its shape. Thread-safe.

        Integers are for layouts that were made for them, by `set_integers`.
        """
        parameter = target if id(target) in self._targets else target._base
        assert parameter is not None and id(parameter) in self._targets
        for use, memory in self._targets[id(parameter)]:
            if use.layout is None:
                plain = source if isinstance(source, torch.Tensor) else source.dequantize()
                memory.as_strided(target.shape, target.stride(), target.storage_offset()).copy_(
                    plain.view(target.shape)
                )
                continue
            width = parameter.shape[-1]
            rows = source.reshape(-1, width) if isinstance(source, torch.Tensor) else source
            try:
                use.layout.write(memory, target.storage_offset() // width, rows)
            except ValueError as error:
                raise CheckpointError(f"{self._names[id(parameter)]}: {error}") from error

    def finish(self) -> list[str]:
        """Once everything is written. Returns which weights had to be kept in another layout than `tensors` knew of."""
        return [
            self._names[id(use.parameter)]
            for targets in self._targets.values()
            for use, memory in targets
            if use.layout is not None and not finish_weight(use.layout, memory)
        ]

    def randomize(self, model: nn.Module, seed: int) -> None:
        """As skyline.layers.randomize."""
        for parameter, fill in random_values(model, seed):
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=self._device)
            fill(values)
            self.write(parameter, values)
        self.finish()
