"""Weights of small integers in groups of a row, packed into 32-bit words: compressed-tensors, AWQ and GPTQ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from skyline.checkpoint.errors import CheckpointError
from skyline.ops import QuantizedWeight
from skyline.ops.formats import IntegerFormat
from skyline.quantization.formats.packing import spread_columns, unpack_awq, unpack_words
from skyline.quantization.formats.scales import checked
from skyline.quantization.formats.stored import TensorSource

_KERNEL_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class GroupedWeight(ABC):
    """A `Stored` weight [N, K]: (level - zero) * scale in float32, levels and zeros in 0..2^bits - 1.

    Each group of `group` neighbours of a row has a scale and a zero point; without `zeros` that is 2^(bits - 1). With
    `order`, column k is of group order[k] instead. Scales may be negative: some quantizers use the whole range so.
    `recorded` is a tensor that holds the shape.
    """

    source: TensorSource
    packed: str
    scales: str
    zeros: str | None
    order: str | None
    shape: tuple[int, ...]
    bits: int
    group: int
    label: str
    recorded: str | None = None

    @abstractmethod
    def _levels(self, start: int, stop: int) -> Tensor:
        """uint8 [rows, K]."""

    @abstractmethod
    def _stored_zeros(self, start: int, stop: int) -> Tensor:
        """Integers [rows, groups]."""

    @abstractmethod
    def _stored_scales(self, start: int, stop: int) -> Tensor:
        """[rows, groups], in the dtype they are stored in."""

    @property
    def parts(self) -> tuple[str, ...]:
        names = (self.packed, self.scales, self.zeros, self.order, self.recorded)
        return tuple(name for name in names if name is not None)

    @property
    def format(self) -> str:
        groups = "a scale a row" if self.group >= self.shape[1] else f"groups of {self.group}"
        return f"{self.label} int{self.bits}, {groups}{', zero points' if self.zeros is not None else ''}"

    @property
    def exact(self) -> bool:
        """An integer of several bits times a scale of as many as bfloat16 has, or more, is none in general."""
        return False

    @cached_property
    def integers(self) -> IntegerFormat | None:
        """Reads scales, zero points and the order, once, to be sure that nothing would be lost."""
        n, k = self.shape
        if self._columns is not None:
            return None
        if self.bits == 8:
            return IntegerFormat(bits=8) if self.group >= k and self._is_symmetric else None
        if self.group < k and self.group not in _KERNEL_GROUPS and self.group % _KERNEL_GROUPS[-1]:
            return None
        scales = self._stored_scales(0, n)
        if scales.dtype != torch.float16 and not torch.equal(scales.half().float(), scales.float()):
            return None
        return IntegerFormat(bits=4, group=self._kernel_group, zeros=not self._is_symmetric)

    def read(self, start: int, stop: int) -> Tensor:
        self._check()
        values = self._levels(start, stop).float()
        scales, zeros = self._scales(start, stop), self._zeros(start, stop)
        if self._columns is not None:
            values -= zeros.index_select(1, self._columns)
            values *= scales.index_select(1, self._columns)
            return values
        spread_columns(values, zeros, self.group, subtract=True)
        spread_columns(values, scales, self.group)
        return values

    def levels(self, start: int, stop: int) -> QuantizedWeight:
        format = self.integers
        assert format is not None
        self._check()
        levels, scales = self._levels(start, stop), self._scales(start, stop)
        middle = 1 << (self.bits - 1)
        if format.group is None:
            return QuantizedWeight((levels ^ middle).view(torch.int8), scales[:, 0].contiguous())
        groups = self._for_kernel(scales.half())
        if format.zeros:
            zeros = self._for_kernel(self._zeros(start, stop).half())
            return QuantizedWeight(levels.view(torch.int8), groups, zeros, format.group)
        return QuantizedWeight(levels.view(torch.int8) - middle, groups, None, format.group)

    def _check(self) -> None:
        """Compare the shape with the recorded one, which headers do not tell."""
        if self.recorded is not None and self.source.get(self.recorded).tolist() != list(self.shape):
            raise CheckpointError(
                f"{self.source.folder}: {self.recorded!r} says {self.source.get(self.recorded).tolist()}, but "
                f"{self.packed!r} and its scales stand for {list(self.shape)}; quantize the checkpoint again"
            )

    def _scales(self, start: int, stop: int) -> Tensor:
        return checked(self.source, self.scales, self._stored_scales(start, stop), signed=True)

    def _zeros(self, start: int, stop: int) -> Tensor:
        """float32 [rows, groups]."""
        if self.zeros is None:
            groups = -(-self.shape[1] // self.group)
            return torch.full((max(0, stop - start), groups), float(1 << (self.bits - 1)))
        return self._stored_zeros(start, stop).float()

    @cached_property
    def _is_symmetric(self) -> bool:
        return self.zeros is None or bool((self._stored_zeros(0, self.shape[0]) == 1 << (self.bits - 1)).all())

    @property
    def _kernel_group(self) -> int:
        return self.group if self.group in _KERNEL_GROUPS else _KERNEL_GROUPS[-1]

    def _for_kernel(self, per_group: Tensor) -> Tensor:
        """What is the same for a large group is so for each of the smaller ones it is cut into."""
        if self._kernel_group == self.group:
            return per_group
        k, size = self.shape[1], self._kernel_group
        return per_group.repeat_interleave(-(-min(self.group, k) // size), dim=1)[:, : -(-k // size)]

    @cached_property
    def _columns(self) -> Tensor | None:
        """The group of each column [K], if they are not in their natural order."""
        if self.order is None:
            return None
        columns, k = self.source.get(self.order).long(), self.shape[1]
        groups = -(-k // self.group)
        # Writers that did not sort leave it filled with -1 (compressed-tensors) or with 0 (GPTQ).
        if bool((columns == -1).all()) or bool((columns == 0).all()):
            return None
        if int(columns.min()) < 0 or int(columns.max()) >= groups:
            raise CheckpointError(
                f"{self.source.folder}: {self.order!r} names groups outside of 0..{groups - 1}; quantize it again"
            )
        return None if torch.equal(columns, torch.arange(k) // self.group) else columns


def _down(words: Tensor, start: int, stop: int, bits: int) -> Tensor:
    """Words [W, C], each holding 32 / bits rows of one column: rows start to stop, uint8 [C, stop - start]."""
    each = 32 // bits
    first = start // each
    unpacked = unpack_words(words[first : -(-stop // each)].t(), bits)
    return unpacked[:, start - first * each : stop - first * each]


def _across(words: Tensor, start: int, stop: int, bits: int, awq: bool = False) -> Tensor:
    """Words [R, W], each holding 32 / bits columns of one row: columns start to stop, uint8 [stop - start, R]."""
    each = 32 // bits
    first = start // each
    cut = words[:, first : -(-stop // each)]
    unpacked = unpack_awq(cut) if awq else unpack_words(cut, bits).t()
    return unpacked[start - first * each : stop - first * each]


class RowPacked(GroupedWeight):
    """compressed-tensors' pack-quantized: words along rows, scales [N, groups], zero points packed down the rows."""

    def _levels(self, start: int, stop: int) -> Tensor:
        return unpack_words(self.source.get(self.packed)[start:stop], self.bits)[:, : self.shape[1]].contiguous()

    def _stored_zeros(self, start: int, stop: int) -> Tensor:
        assert self.zeros is not None
        zeros = self.source.get(self.zeros)
        if zeros.dtype == torch.int8:
            return zeros[start:stop].short() + (1 << (self.bits - 1))
        return _down(zeros, start, stop, self.bits).t()

    def _stored_scales(self, start: int, stop: int) -> Tensor:
        return self.source.get(self.scales)[start:stop]


class GPTQPacked(GroupedWeight):
    """Words down the columns of [K, N]; scales and zero points [groups, N], the latter packed along N."""

    def _levels(self, start: int, stop: int) -> Tensor:
        return unpack_words(self.source.get(self.packed)[:, start:stop].t(), self.bits)

    def _stored_zeros(self, start: int, stop: int) -> Tensor:
        assert self.zeros is not None
        return _across(self.source.get(self.zeros), start, stop, self.bits)

    def _stored_scales(self, start: int, stop: int) -> Tensor:
        return self.source.get(self.scales)[:, start:stop].t()


class GPTQPackedMinusOne(GPTQPacked):
    """Version 1 of the format stores zero points less one: packed words less 0x1111.. (or 0x0101..).

    The one is added to whole words, as GPTQModel takes it off, so that a zero point of 0, stored with a borrow from its
    neighbour, comes back.
    """

    def _stored_zeros(self, start: int, stop: int) -> Tensor:
        assert self.zeros is not None
        each = 32 // self.bits
        first = start // each
        words = self.source.get(self.zeros)[:, first : -(-stop // each)]
        one = sum(1 << (self.bits * place) for place in range(each))
        return _across(words + one, start - first * each, stop - first * each, self.bits)


class AWQPacked(GPTQPacked):
    """GEMM layout: words along N, eight columns each in the order 0, 2, 4, 6, 1, 3, 5, 7, as the zero points."""

    def _levels(self, start: int, stop: int) -> Tensor:
        return _across(self.source.get(self.packed), start, stop, self.bits, awq=True)

    def _stored_zeros(self, start: int, stop: int) -> Tensor:
        assert self.zeros is not None
        return _across(self.source.get(self.zeros), start, stop, self.bits, awq=True)
