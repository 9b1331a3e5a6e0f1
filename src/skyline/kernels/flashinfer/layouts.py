"""How this provider's kernels want weights to lie. Told without FlashInfer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skyline.kernels.fp8_layout import FP8_BLOCKS, FP8_ROWS, Fp8Layout
from skyline.kernels.registry import CPU, Layout
from skyline.kernels.triton.layouts import FP4_WORDS, NVFP4_LESS, Fp4Words
from skyline.ops import Fp4Weight, Fp8Weight, QuantizedWeight
from skyline.ops.formats import integers_of
from skyline.ops.fp4 import NVFP4_GROUP
from skyline.ops.fp8 import BLOCK, Fp8Rows


@dataclass(frozen=True, slots=True, eq=False)
class UpFirst:
    """Experts' gate and up [E, 2 I, H] with the rows of up before those of gate.

    values: of the activations' dtype, without scales; or FP8, whose scales are as `Fp8Weight` has them.
    """

    values: Tensor
    scales: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def weight(self) -> Any:
        """As kernels take it that are told of the order: a Tensor or an Fp8Weight."""
        return self.values if self.scales is None else Fp8Weight(self.values, self.scales)

    def turned(self) -> Any:
        """A copy with gate first, as references take it."""
        values, scales = (None if part is None else part.roll(part.shape[1] // 2, 1) for part in _bytes(self))
        assert values is not None
        return values if scales is None else Fp8Weight(values.view(self.values.dtype), scales)


def _bytes(weight: UpFirst) -> tuple[Tensor, Tensor | None]:
    """torch does not move FP8."""
    return (weight.values if weight.scales is None else weight.values.view(torch.uint8)), weight.scales


class UpFirstLayout:
    """`UpFirst`, of what the layout `fp8` makes of rows, or of plain rows."""

    def __init__(self, fp8: Fp8Layout | None = None) -> None:
        self.name = "up first" if fp8 is None else f"{fp8.name}, up first"
        self._fp8 = fp8

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> UpFirst:
        if self._fp8 is None:
            return UpFirst(torch.empty(shape, dtype=dtype, device=device))
        made = self._fp8.allocate(shape, dtype, device)
        return UpFirst(made.values, made.scales)

    def write(self, target: UpFirst, first_row: int, rows: Tensor | QuantizedWeight | Fp8Rows) -> None:
        """Raises what `Fp8Layout.rows_of` does."""
        ready: Tensor | Fp8Rows
        if self._fp8 is not None:
            ready = self._fp8.rows_of(rows, target.values.device)
        else:
            ready = rows if isinstance(rows, Tensor) else rows.dequantize()
        n = target.shape[1]
        half, count, done = n // 2, ready.shape[0], 0
        while done < count:  # up to where a half ends
            row = first_row + done
            stop = min(count, done + half - row % half)
            place = row + half if row % n < half else row - half
            if isinstance(ready, Tensor):
                target.values.view(-1, target.shape[2])[place : place + stop - done] = ready[done:stop]
            else:
                assert self._fp8 is not None
                part = Fp8Rows(ready.values[done:stop], ready.scales[done:stop])
                self._fp8.write(target.weight, place, part)
            done = stop


UP_FIRST = UpFirstLayout()
UP_FIRST_BLOCKS = UpFirstLayout(FP8_BLOCKS)


def up_first_fp8(index: int) -> Callable[[tuple[Any, ...]], Layout]:
    """Of experts in FP8 with a scale a block, none of which holds rows of both gate and up; as they are of others."""

    def choose(arguments: tuple[Any, ...]) -> Layout:
        decided = integers_of(arguments[index])
        if decided is None or decided.group is None:
            return FP8_ROWS
        return UP_FIRST_BLOCKS if arguments[index].shape[-2] // 2 % BLOCK == 0 else FP8_BLOCKS

    return choose


@dataclass(frozen=True, slots=True, eq=False)
class SwizzledFp4:
    """NVFP4 [N, K] in words, whose scales lie a second time as the matrix units of Blackwell read them.

    swizzled: uint8, of the groups that words.values have, where `swizzled_places` says. row_scales: float32 [N], times
    the products of elements and their groups' scales.
    """

    words: Fp4Words
    swizzled: Tensor
    row_scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.words.shape

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.swizzled.nbytes + self.row_scales.nbytes


def swizzled_size(rows: int, groups: int) -> int:
    """Of scales [rows, groups]: tiles of 128 x 4."""
    return -(-rows // 128) * 128 * (-(-groups // 4) * 4)


def swizzled_places(rows: Tensor, groups: int) -> Tensor:
    """Where the scales of these rows lie, int64 [len(rows), groups]: in tiles of 128 rows and 4 groups, one after the
    other along a row of tiles; in a tile row r is at 16 (r % 32) + 4 (r // 32) (cuBLAS,
    "1D Block Scaling Factors Layout")."""
    group = torch.arange(groups, device=rows.device)
    row = rows[:, None]
    tile = row // 128 * -(-groups // 4) + group // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4


class SwizzledFp4Layout:
    """`SwizzledFp4`, of what `Fp4WordsLayout` makes of rows."""

    name = "nvfp4 in words, scales also swizzled"

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> SwizzledFp4:
        words = FP4_WORDS[NVFP4_GROUP].allocate(shape, dtype, device)
        size = swizzled_size(shape[0], groups_of(words))
        return SwizzledFp4(
            words, torch.zeros(size, dtype=torch.uint8, device=device), torch.empty_like(words.row_scales)
        )

    def write(self, target: SwizzledFp4, first_row: int, rows: Tensor | QuantizedWeight | Fp8Rows | Fp4Weight) -> None:
        """Raises what `Fp4Layout.rows_of` does."""
        FP4_WORDS[NVFP4_GROUP].write(target.words, first_row, rows)
        last = first_row + rows.shape[0]
        places = swizzled_places(torch.arange(first_row, last, device=target.swizzled.device), groups_of(target.words))
        target.swizzled[places] = target.words.scales[first_row:last, : places.shape[1]]
        target.row_scales[first_row:last] = target.words.row_scales[first_row:last] * 2.0**-NVFP4_LESS


def groups_of(words: Fp4Words) -> int:
    """That the words of a row are cut into; there are as many scales, or more."""
    return words.values.shape[-1] * 8 // NVFP4_GROUP


SWIZZLED_FP4 = SwizzledFp4Layout()
