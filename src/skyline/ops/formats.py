"""In what form a weight is kept, as it is decided for parameters while they still stand for themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

DEFAULT_GROUP = 64


@dataclass(frozen=True, slots=True)
class IntegerFormat:
    """Of what kind the integers of a weight are (skyline.ops.quantized.QuantizedWeight).

    bits 8: one scale a row. bits 4: a scale for each `group` neighbours of a row, with `zeros` also a zero point.
    fp8: no integers, but FP8 (skyline.ops.fp8), with a scale a row, or, with `group`, for each block of group x group.
    fp4: no integers, but FP4 (skyline.ops.fp4), with a scale for each `group` neighbours of a row. activations: made
    for activations that are NVFP4 as well (skyline.ops.nvfp4).
    widened: bytes, or with bits 6 those (skyline.ops.quantized.ByteRows, `zeros`: with offsets), kept to be the
    activations' dtype wherever they are read: the ops are those of plain weights, and so is what they compute.
    blocks: from GGML's blocks of 256, whose groups' scales have a factor in common; as bytes they are groups of 16.
    """

    bits: int
    group: int | None = None
    zeros: bool = False
    fp8: bool = False
    fp4: bool = False
    activations: bool = field(default=False, compare=False)
    widened: bool = False
    blocks: bool = field(default=False, compare=False)

    @property
    def kind(self) -> str:
        """As kernels are asked for it: "fp8", "fp4", "bytes", "int8" or "int4"."""
        return "fp8" if self.fp8 else "fp4" if self.fp4 else "bytes" if self.widened else f"int{self.bits}"


def widened(format: IntegerFormat) -> IntegerFormat:
    """The same levels as bytes, of a format of GGUF."""
    return format if format.widened else replace(format, bits=8, group=16 if format.blocks else 32, widened=True)


def together(formats: Iterable[IntegerFormat | None]) -> IntegerFormat | None:
    """What weights in these formats are kept as in one: the same if there is but one; else bytes, if one is in bytes,
    so that they all are GGUF's, and either all or none in blocks of 256. None: as plain values."""
    known = list(formats)
    different = set(known)
    if len(different) == 1 and (first := known[0]) is not None:
        return replace(first, activations=all(format is not None and format.activations for format in known))
    if not any(format is not None and format.widened for format in different):
        return None
    levels = [widened(format) for format in known if format is not None and not format.fp4]
    if len(levels) < len(known) or len({format.blocks for format in levels}) > 1:
        return None
    zeros = any(format.zeros for format in levels)
    return IntegerFormat(8, levels[0].group, zeros, widened=True, blocks=levels[0].blocks)


def set_integers(parameter: Tensor, format: IntegerFormat) -> None:
    """Decide what the values of a parameter, which still stand for themselves, become in memory."""
    parameter.integers = format  # type: ignore[attr-defined]


def integers_of(parameter: Any) -> IntegerFormat | None:
    """What `set_integers` decided."""
    found = getattr(parameter, "integers", None)
    assert found is None or isinstance(found, IntegerFormat)
    return found


def plain_bytes(weight: Any) -> int:
    """Of a weight [.., N, K] of an op on plain ones, which may be kept in bytes; or of anything with `nbytes`."""
    decided = integers_of(weight)
    if decided is None or not decided.widened:
        return int(weight.nbytes)
    scales = (2 / 256 + 1 / 16 if decided.blocks else 2 / 32) * (2 if decided.zeros else 1)
    return int(weight.numel() * (decided.bits / 8 + scales))
