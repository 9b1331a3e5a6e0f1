"""Tensors in memory in the place of a checkpoint, and what every test of a format asks of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skyline.ops import Fp4Weight
from skyline.ops.fp8 import Fp8Rows
from skyline.quantization.formats import QuantizedWeights, Stored, detect


class Tensors:
    """A TensorSource. It counts what is read, for `detect` is to read headers only."""

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path = Path("/nowhere")) -> None:
        self.folder = folder
        self.tensors = dict(tensors)
        self.reads: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def get(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name]


def found(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> QuantizedWeights:
    """What `detect` finds, having read nothing but recorded shapes."""
    source = Tensors(tensors)
    weights = detect(config, source)
    assert weights is not None
    assert all(name.endswith(".weight_shape") for name in source.reads)
    assert weights.consumed <= set(tensors)
    assert all(set(stored.parts) <= weights.consumed for stored in weights.stored.values())
    return weights


def only(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> Stored:
    (stored,) = found(config, tensors).stored.values()
    return stored


def whole(stored: Stored) -> Tensor:
    """All of it, after slices, and integers if there are any, have been compared with it."""
    n = stored.shape[0]
    values = stored.read(0, n)
    assert values.dtype == torch.float32 and tuple(values.shape) == stored.shape
    for start, stop in cuts(n):
        assert torch.equal(stored.read(start, stop), values[start:stop]), (start, stop)
    if stored.exact:
        assert torch.equal(values.bfloat16().float(), values)
    if stored.integers is not None and stored.integers.fp4:
        for start, stop in ((0, n), *cuts(n)):
            _same_in_fp4(stored, start, stop, values[start:stop])
    elif stored.integers is not None:
        weight = stored.levels(0, n)
        assert torch.equal(weight.dequantize(), values)
        if isinstance(weight, Fp8Rows):
            assert stored.integers.fp8 and weight.scales.shape == (
                n,
                -(-stored.shape[1] // (stored.integers.group or 1 << 30)),
            )
        else:
            assert weight.group == stored.integers.group and (weight.zeros is not None) == stored.integers.zeros
            assert weight.values.dtype == torch.int8
        for start, stop in cuts(n):
            assert torch.equal(stored.levels(start, stop).dequantize(), values[start:stop])
    return values


def _same_in_fp4(stored: Stored, start: int, stop: int, values: Tensor) -> None:
    """Rows of experts one after the other, as they lie in the file; the scale of a whole tensor is multiplied last."""
    rows = stored.levels(start, stop)
    assert isinstance(rows, Fp4Weight) and stored.integers is not None and rows.group == stored.integers.group
    lying = values.transpose(1, 2) if values.dim() == 3 else values
    wanted = lying.reshape(-1, lying.shape[-1])
    torch.testing.assert_close(rows.dequantize(), wanted, rtol=0 if rows.group == 32 else 3e-7, atol=0)


def cuts(n: int) -> list[tuple[int, int]]:
    """Slices that start and end on, before and after the borders of blocks and words; an empty one."""
    edges = sorted({edge for edge in (0, 1, 3, 7, 8, 9, 17, n // 2, n - 3, n) if 0 <= edge <= n})
    return [(start, stop) for start in edges for stop in edges if start < stop] + [(n // 2, n // 2)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randint(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
