"""Weights of FP8, INT8 or FP4 elements with a grid of scales: most formats, see the table in `__init__.py`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor

from skyline.ops import Fp4Weight, QuantizedWeight
from skyline.ops.formats import IntegerFormat
from skyline.ops.fp4 import unpack_e2m1
from skyline.ops.fp8 import BLOCK, FP8, Fp8Rows
from skyline.quantization.formats.packing import spread_columns, widen_fp8
from skyline.quantization.formats.scales import (
    Grid,
    checked,
    expect_dtype,
    expect_shape,
    exponents,
    lay_out,
)
from skyline.quantization.formats.stored import TensorSource

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOAT_SCALES = (torch.float32, torch.bfloat16, torch.float16)
E8M0_SCALES = (torch.uint8, torch.float8_e8m0fnu)


class Whole(Enum):
    """What one scale for the whole tensor does to all others: compressed-tensors divides, ModelOpt multiplies."""

    DIVIDES = "divides"
    MULTIPLIES = "multiplies"


@dataclass(frozen=True)
class ScaledWeight:
    """A `Stored` weight: (element - zero) * scale in float32, where the scale is scale * or / the whole tensor's.

    elements: float8, int8, or E2M1 two a byte (uint8), [.., N, K or K / 2]; gpt-oss' last dimension is cut in two.
    scales, zeros: laid over it as `grid` says. transposed: the plain tensor is [.., K, N].
    """

    source: TensorSource
    elements: str
    scales: str
    grid: Grid
    matrix: tuple[int, ...]
    format: str
    zeros: str | None = None
    whole: tuple[str, Whole] | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.matrix[:-2], self.matrix[-1], self.matrix[-2]) if self.transposed else self.matrix

    @property
    def parts(self) -> tuple[str, ...]:
        whole = () if self.whole is None else (self.whole[0],)
        return (self.elements, self.scales, *whole, *(() if self.zeros is None else (self.zeros,)))

    @cached_property
    def exact(self) -> bool:
        """Elements of up to 8 significant bits times powers of two, none below bfloat16's range; reads float scales."""
        if self.whole is not None or self.zeros is not None:
            return False
        is_e8m0 = self.source.dtype(self.scales) in E8M0_SCALES
        if is_e8m0 and self.source.dtype(self.elements) == torch.uint8:
            return True
        scales = exponents(self.source.get(self.scales)) if is_e8m0 else self.source.get(self.scales)
        mantissas, _ = torch.frexp(scales.float())
        # The smallest element of E5M2 is 2^-16, and bfloat16's is 2^-133.
        return bool((mantissas == 0.5).all()) and bool((scales.float() >= 2.0**-117).all())

    @property
    def integers(self) -> IntegerFormat | None:
        if self.source.dtype(self.elements) == torch.uint8:
            return IntegerFormat(bits=4, group=self.grid.columns, fp4=True)
        if self.source.dtype(self.elements) == FP8 and len(self.matrix) == 2 and not self.transposed:
            plain = self.whole is None and self.zeros is None
            if plain and (self.grid.rows, self.grid.columns) == (BLOCK, BLOCK):
                return IntegerFormat(bits=8, group=BLOCK, fp8=True)
            return IntegerFormat(bits=8, fp8=True) if plain and self.grid.columns >= self.matrix[-1] else None
        is_int8 = self.source.dtype(self.elements) == torch.int8 and self.zeros is None and len(self.matrix) == 2
        return IntegerFormat(bits=8) if is_int8 and self.grid.columns >= self.matrix[-1] else None

    def read(self, start: int, stop: int) -> Tensor:
        if start >= stop:
            return torch.empty(0, *self.shape[1:])
        stored = self.source.get(self.elements)[start:stop]
        if stored.dtype == torch.uint8:
            values = unpack_e2m1(stored.reshape(stop - start, *self.matrix[1:-1], self.matrix[-1] // 2))
        else:
            values = widen_fp8(stored) if stored.dtype in FP8_DTYPES else stored.float()
        if self.zeros is not None:
            spread_columns(
                values, self._laid(self.source.get(self.zeros), start, stop).float(), self.grid.columns, True
            )
        spread_columns(values, self._scales(start, stop), self.grid.columns)
        return values.transpose(-1, -2) if self.transposed else values

    def levels(self, start: int, stop: int) -> QuantizedWeight | Fp8Rows | Fp4Weight:
        assert self.integers is not None
        if self.integers.fp4:
            return self._four_bits(start, stop)
        scales = self._scales(start, stop) if start < stop else torch.empty(0, 1)
        if self.integers.fp8:
            return Fp8Rows(self.source.get(self.elements)[start:stop], scales.expand(stop - start, -1))
        return QuantizedWeight(self.source.get(self.elements)[start:stop], scales[:, 0].contiguous())

    def _four_bits(self, start: int, stop: int) -> Fp4Weight:
        """Of experts all rows, one after the other, as they are stored: not transposed."""
        rows = (stop - start) * (self.matrix[-2] if len(self.matrix) == 3 else 1)
        values = self.source.get(self.elements)[start:stop].reshape(rows, self.matrix[-1] // 2)
        scales = self.source.get(self.scales)[start:stop].reshape(rows, self.grid.shape[-1])
        is_e8m0 = scales.dtype in E8M0_SCALES
        checked(self.source, self.scales, exponents(scales) if is_e8m0 else scales)
        if is_e8m0:
            scales = scales.view(torch.uint8)
        factor = torch.ones(())
        if self.whole is not None:
            name, does = self.whole
            stored = checked(self.source, name, self.source.get(name)).flatten()[0]
            factor = checked(self.source, name, 1 / stored) if does is Whole.DIVIDES else stored
        return Fp4Weight(values, scales, factor.expand(values.shape[0]), self.grid.columns)

    def _scales(self, start: int, stop: int) -> Tensor:
        """Of rows or entries start to stop: float32 [.., rows, B]."""
        stored = self.source.get(self.scales)
        if stored.dtype in E8M0_SCALES:
            stored = exponents(stored)
        # Widened before rows are picked: torch cannot index E8M0.
        first, last = self._rows(start, stop)
        cut = stored.reshape(self.grid.shape)[first:last]
        scales = self._picked(checked(self.source, self.scales, cut), start, stop, first)
        if self.whole is None:
            return scales
        name, does = self.whole
        factor = checked(self.source, name, self.source.get(name)).flatten()
        return checked(self.source, name, scales / factor if does is Whole.DIVIDES else scales * factor)

    def _laid(self, stored: Tensor, start: int, stop: int) -> Tensor:
        first, last = self._rows(start, stop)
        return self._picked(stored.reshape(self.grid.shape)[first:last], start, stop, first)

    def _rows(self, start: int, stop: int) -> tuple[int, int]:
        """Which entries of the grid's first dimension these rows need."""
        if len(self.matrix) == 2:
            return start // self.grid.rows, (stop - 1) // self.grid.rows + 1
        return (0, 1) if self.grid.shape[0] == 1 else (start, stop)

    def _picked(self, cut: Tensor, start: int, stop: int, first: int) -> Tensor:
        """A row of the grid for each row of the matrix."""
        if cut.shape[-2] == 1:
            return cut
        if len(self.matrix) == 2:
            return cut.index_select(0, torch.arange(start, stop) // self.grid.rows - first)
        return cut.index_select(-2, torch.arange(self.matrix[-2]) // self.grid.rows)


def scaled(
    source: TensorSource, weight: str, scale: str, block: tuple[int, int] | None, zeros: str | None = None
) -> ScaledWeight:
    """FP8 or INT8 elements under a grid of float or E8M0 scales. Raises CheckpointError if they do not fit."""
    expect_dtype(source, weight, *FP8_DTYPES, torch.int8)
    expect_dtype(source, scale, *FLOAT_SCALES, *E8M0_SCALES)
    shape = tuple(source.shape(weight))
    is_e8m0 = source.dtype(scale) in E8M0_SCALES
    if is_e8m0 and block is None:
        block = (1, 32)
    grid = lay_out(source, weight, scale, shape, block)
    if zeros is not None:
        expect_shape(source, zeros, source.shape(scale), f"as {scale!r} has")
    if source.dtype(weight) == torch.int8:
        name = "int8"
    else:
        name = "mxfp8" if is_e8m0 and (grid.rows, grid.columns) == (1, 32) else "fp8"
    return ScaledWeight(source, weight, scale, grid, shape, f"{name}, {_described(grid, shape)}", zeros)


def fp4(
    source: TensorSource, weight: str, scale: str, group: int, whole: tuple[str, Whole] | None = None
) -> ScaledWeight:
    """NVFP4 (E4M3 scales, group 16, and one for the whole tensor) or MXFP4 (E8M0, group 32): [.., N, K / 2] uint8."""
    expect_dtype(source, weight, torch.uint8)
    expect_dtype(source, scale, *((torch.float8_e4m3fn,) if whole is not None else E8M0_SCALES))
    *lead, n, half = source.shape(weight)
    shape = (*lead, n, 2 * half)
    expect_shape(source, scale, (*lead, n, -(-2 * half // group)), f"one for {group} elements of {weight!r}")
    if whole is not None and torch.Size(source.shape(whole[0])).numel() != 1:
        expect_shape(source, whole[0], (1,), f"one for all of {weight!r}")
    name = "nvfp4" if whole is not None else "mxfp4"
    grid = Grid((*lead, n, -(-2 * half // group)), 1, group)
    return ScaledWeight(source, weight, scale, grid, shape, f"{name}, groups of {group}", whole=whole)


def _described(grid: Grid, shape: tuple[int, ...]) -> str:
    if grid.columns < shape[-1]:
        return f"groups of {grid.columns}" if grid.rows == 1 else f"blocks of {grid.rows}x{grid.columns}"
    return "a scale a row" if grid.rows == 1 and shape[-2] > 1 else "a scale a tensor"
