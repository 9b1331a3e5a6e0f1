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
from skyline.checkpoint.gguf.types import Levels, mxfp4_codes
from skyline.ops import Fp4Weight, QuantizedWeight
from skyline.ops.fp4 import MXFP4_GROUP
from skyline.ops.quantized import ByteRows
from skyline.quantization.formats.stored import IntegerFormat, Stored

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FOUR_BITS = ("Q4_0", "Q4_1", "Q4_K")  # whose levels, by groups of 32, kernels multiply as integers
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
        kind = self.placed.tensor.type
        if len(self.shape) != 2 or self.placed.partner is not None or kind.unpack is None:
            return None
        blocks = kind.name.endswith("K")
        if kind.name in _FOUR_BITS:
            return IntegerFormat(4, kind.group, kind.offsets, blocks=blocks)
        bits = 6 if kind.name == "Q6_K" else 8
        return IntegerFormat(bits, 16 if blocks else kind.group, kind.offsets, widened=True, blocks=blocks)

    def read(self, start: int, stop: int) -> torch.Tensor:
        values = torch.empty(stop - start, *self.shape[1:])
        width = max(1, values[:1].numel())
        step = max(1, _PIECE // width)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values[first - start : last - start] = _values(self.placed, first, last)
        return values

    def levels(self, start: int, stop: int) -> QuantizedWeight | ByteRows | Fp4Weight:
        assert self.integers is not None
        if self.integers.fp4:
            return self._four_bit_floats(start, stop)
        if self.integers.widened:
            return self.as_bytes(start, stop)
        return _with_zero_points(self.placed, self._levels(start, stop))

    def as_bytes(self, start: int, stop: int) -> ByteRows:
        """The same rows in the form that all integers of GGUF have."""
        found = self._levels(start, stop)
        parts = (found.levels, found.factors, found.offsets, found.scales, found.minima)
        return ByteRows(*(None if part is None else torch.from_numpy(part) for part in parts))  # type: ignore[arg-type]

    def _levels(self, start: int, stop: int) -> Levels:
        found = self.placed.tensor.type.levels(_rows(self.placed, start, stop))
        if not all(np.isfinite(part).all() for part in (found.factors, found.offsets) if part is not None):
            raise _not_finite(self.placed)
        return found

    def _four_bit_floats(self, start: int, stop: int) -> Fp4Weight:
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


def _with_zero_points(placed: Placed, found: Levels) -> QuantizedWeight:
    """In the form of a weight of four bits: (level - zero) * scale, both of float16, to which K types are rounded."""
    levels, scales = torch.from_numpy(found.levels), torch.from_numpy(found.group_scales()).half()
    minima, zeros = found.group_minima(), None
    if minima is not None:
        offsets = torch.from_numpy(minima)
        zeros = (offsets / scales.float()).half()
        # Where levels make no difference to the offset, or there is none of both, zero times a number is left.
        flat = ~zeros.isfinite()
        if bool(flat.any()):
            scales, zeros = torch.where(flat, offsets.half(), scales), torch.where(flat, 1.0, zeros.float()).half()
            levels = levels.masked_fill(flat.repeat_interleave(32, 1), 0)
    if not bool(scales.isfinite().all()):
        raise _not_finite(placed)
    return QuantizedWeight(levels, scales, zeros, 32)


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
        f"{placed.file.path}: tensor {placed.tensor.name!r} has a scale that is NaN, infinite or too large; "
        "download the file again, or convert the model again"
    )
