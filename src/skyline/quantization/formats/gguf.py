"""The weights of a GGUF file under their Hugging Face names (skyline.checkpoint.gguf says how they are found)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.gguf import WEIGHTS_FILE
from skyline.checkpoint.gguf.architectures import Header
from skyline.checkpoint.gguf.reader import open_gguf
from skyline.checkpoint.gguf.tensors import Placed, interleaved_rows, place
from skyline.checkpoint.gguf.types import mxfp4_codes, q4_0_levels
from skyline.ops import Fp4Weight, QuantizedWeight
from skyline.ops.fp4 import MXFP4_GROUP
from skyline.quantization.formats.stored import IntegerFormat, Stored

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 1 << 22  # values dequantized at a time, which bounds the temporaries to some 100 MB


class GGUFWeights:
    """A TensorSource over `folder`/model.gguf, or over that file.

    Tensors that lie in the file as a checkpoint of transformers would have them are iterated, and `get` gives views of
    the mapped file; so are norms and biases that have to be changed, of which `get` gives a copy. All others are in
    `stored`, and in no other place: the quantized ones, and those in another order. A layer's experts are one tensor
    in the file, and are one each here, or as the architecture has them. Opening reads the header.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        placed = place(Header(open_gguf(folder / WEIGHTS_FILE if folder.is_dir() else folder)))
        self._plain = {name: entry for name, entry in placed.items() if _is_plain(name, entry)}
        self.stored: dict[str, Stored] = {
            name: GGUFWeight(entry) for name, entry in placed.items() if name not in self._plain
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __contains__(self, name: object) -> bool:
        return name in self._plain

    def __len__(self) -> int:
        return len(self._plain)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return _PLAIN[self._entry(name).tensor.type.name]

    def get(self, name: str) -> torch.Tensor:
        """A view of the mapped file, where nothing is read until its elements are. Do not write to it."""
        entry = self._entry(name)
        return _plain_view(entry) if entry.is_as_stored else GGUFWeight(entry).read(0, entry.shape[0])

    def _entry(self, name: str) -> Placed:
        try:
            return self._plain[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} holds no plain tensor named {name!r}") from None


def _is_plain(name: str, entry: Placed) -> bool:
    """Also what is small enough to be copied: norms and biases, which are F32."""
    if entry.tensor.type.name not in _PLAIN:
        return False
    return entry.is_as_stored or (entry.tensor.type.name == "F32" and (len(entry.shape) == 1 or name.endswith("bias")))


def _plain_view(entry: Placed) -> torch.Tensor:
    rows = torch.from_numpy(entry.file.rows(entry.tensor))
    return rows.view(_PLAIN[entry.tensor.type.name]).view(entry.tensor.shape)


@dataclass(frozen=True, slots=True)
class GGUFWeight:
    """A `Stored` weight. Its parts are names of tensors in the file, which all experts of a layer share."""

    placed: Placed

    @property
    def shape(self) -> tuple[int, ...]:
        return self.placed.shape

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(entry.tensor.name for entry in self._entries())

    @property
    def format(self) -> str:
        return "GGUF " + ", ".join(dict.fromkeys(entry.tensor.type.name for entry in self._entries()))

    @property
    def exact(self) -> bool:
        # E2M1 times a power of two has two significant bits.
        return all(entry.tensor.type.name in ("BF16", "MXFP4") for entry in self._entries())

    @property
    def matrix(self) -> tuple[int, ...]:
        """Shape [.., N, K], whatever is `transposed` in the checkpoint."""
        *lead, n, k = self.placed.tensor.shape
        return (*lead, n if self.placed.partner is None else 2 * n, k)

    @property
    def transposed(self) -> bool:
        return self.placed.transposed

    @property
    def integers(self) -> IntegerFormat | None:
        if self.placed.shift != 0.0 or len(self.shape) < 2:
            return None
        if {entry.tensor.type.name for entry in self._entries()} == {"MXFP4"}:
            return IntegerFormat(bits=4, group=MXFP4_GROUP, fp4=True)
        is_matrix = len(self.shape) == 2 and self.placed.partner is None
        return IntegerFormat(bits=4, group=32) if is_matrix and self.placed.tensor.type.name == "Q4_0" else None

    def read(self, start: int, stop: int) -> torch.Tensor:
        values = torch.empty(stop - start, *self.shape[1:])
        width = max(1, values[:1].numel())
        step = max(1, _PIECE // width)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values[first - start : last - start] = _values(self.placed, first, last)
        return values

    def levels(self, start: int, stop: int) -> QuantizedWeight | Fp4Weight:
        assert self.integers is not None
        if self.integers.fp4:
            return self._four_bits(start, stop)
        values, scales = q4_0_levels(_rows(self.placed, start, stop))
        if not np.isfinite(scales).all():
            raise _not_finite(self.placed)
        return QuantizedWeight(torch.from_numpy(values), torch.from_numpy(scales), group=self.integers.group)

    def _four_bits(self, start: int, stop: int) -> Fp4Weight:
        """Rows [(stop - start) * N, K] of matrices; those of partners take turns."""
        parts = []
        for entry in self._entries():
            n = 1 if len(entry.tensor.shape) == 2 else entry.tensor.shape[-2]
            codes, scales = mxfp4_codes(_rows(entry, start, stop).reshape((stop - start) * n, -1))
            if (scales == 255).any():
                raise _not_finite(entry)
            parts.append((torch.from_numpy(codes), torch.from_numpy(np.ascontiguousarray(scales))))
        codes_of, scales_of = (torch.stack(both, dim=1).flatten(0, 1) for both in zip(*parts, strict=True))
        return Fp4Weight(codes_of, scales_of, torch.ones(len(codes_of)), MXFP4_GROUP)

    def _entries(self) -> list[Placed]:
        return [self.placed] if self.placed.partner is None else [self.placed, self.placed.partner]


def _rows(placed: Placed, start: int, stop: int) -> NDArray[np.uint8]:
    """Bytes [stop - start, bytes of an entry of the first dimension], in the order of the checkpoint."""
    rows = placed.file.rows(placed.tensor)
    if placed.heads is None:
        return rows[start:stop]
    return rows[interleaved_rows(len(rows), placed.heads)[start:stop]]


def _values(placed: Placed, start: int, stop: int) -> torch.Tensor:
    """Entries of the first dimension as in the checkpoint."""
    rows, kind = _rows(placed, start, stop), placed.tensor.type
    shape = (len(rows), *placed.tensor.shape[1:])
    if kind.name in _PLAIN:
        values = torch.from_numpy(rows).view(_PLAIN[kind.name]).view(shape).float()
    else:
        dequantized = kind.dequantize(rows)
        # Integers are finite, so it is a scale that is not.
        if not np.isfinite(dequantized).all():
            raise _not_finite(placed)
        values = torch.from_numpy(dequantized).view(shape)
    if placed.partner is not None:
        values = torch.stack((values, _values(placed.partner, start, stop)), dim=2).flatten(1, 2)
    if placed.transposed:
        values = values.transpose(1, 2)
    return values + placed.shift if placed.shift else values


def _not_finite(placed: Placed) -> CheckpointError:
    return CheckpointError(
        f"{placed.file.path}: tensor {placed.tensor.name!r} has a scale that is NaN or infinite; "
        "download the file again, or convert the model again"
    )
