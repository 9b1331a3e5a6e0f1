"""quant_method "bitsandbytes" with 4 bits: NF4 or FP4 in blocks of a flattened matrix, scales quantized again or not.

https://github.com/bitsandbytes-foundation/bitsandbytes (functional.py: QuantState, dequantize_4bit)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.fields import Fields
from skyline.ops import QuantizedWeight
from skyline.ops.formats import IntegerFormat
from skyline.quantization.formats.found import Found
from skyline.quantization.formats.scales import checked, expect, expect_dtype, expect_shape
from skyline.quantization.formats.stored import TensorSource

_STATE = ".quant_state.bitsandbytes__"
_MAX_STATE = 10_000
_MAX_SIZE = 1 << 31


@dataclass(frozen=True)
class BlockwiseWeight:
    """A `Stored` weight: a table's entry times its block's scale, blocks running on through the rows of [N, K].

    packed: uint8 [N * K / 2, 1], the high nibble first. With `nested` scales are a table's entries (uint8) times the
    scale of their own block, plus an offset.
    """

    source: TensorSource
    packed: str
    state: str
    nested: bool

    @property
    def parts(self) -> tuple[str, ...]:
        names = ("absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if self.nested else ()))
        return (self.packed, self.state, *(f"{self.packed}.{name}" for name in names))

    @property
    def format(self) -> str:
        return f"bitsandbytes {self.state.rpartition('__')[2]}{', nested scales' if self.nested else ''}"

    @property
    def exact(self) -> bool:
        return False

    @property
    def integers(self) -> IntegerFormat | None:
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @cached_property
    def _fields(self) -> Fields:
        """The quantization's parameters, JSON in bytes."""
        where = f"{self.source.folder}: {self.state!r}"
        try:
            values = json.loads(bytes(self.source.get(self.state).tolist()))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where} is not valid JSON ({error}); download the checkpoint again") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} must be a JSON object; download the checkpoint again")
        return Fields(values, where)

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        sizes = self._fields.values.get("shape")
        if not isinstance(sizes, list) or not sizes or not all(type(s) is int and 0 < s < _MAX_SIZE for s in sizes):
            raise self._fields.error("shape", "must be a list of positive integers")
        shape = tuple(sizes)
        count, packed = torch.Size(shape).numel(), torch.Size(self.source.shape(self.packed)).numel()
        blocks = torch.Size(self.source.shape(f"{self.packed}.absmax")).numel()
        if -(-count // 2) != packed or -(-count // self._block) != blocks:
            raise CheckpointError(
                f"{self.source.folder}: {self.packed!r} holds {2 * packed} values in {blocks} blocks of {self._block}, "
                f"but its state says {list(shape)}; download the checkpoint again"
            )
        return shape

    @cached_property
    def _block(self) -> int:
        return self._fields.integer("blocksize", 2, 1 << 20)

    def read(self, start: int, stop: int) -> Tensor:
        width = torch.Size(self.shape[1:]).numel()
        first, last = start * width, stop * width
        if first >= last:
            return torch.empty(0, *self.shape[1:])
        table = checked(self.source, f"{self.packed}.quant_map", self._part("quant_map"), signed=True).flatten()
        octets = self.source.get(self.packed).flatten()[first // 2 : -(-last // 2)]
        byte = torch.arange(256)
        pairs = torch.stack((table[byte >> 4], table[byte & 15]), -1).view(torch.int64).flatten()
        values = pairs.index_select(0, octets.int()).view(torch.float32)[first % 2 :][: last - first]
        # From the start of the first block to the end of the last.
        low, high = first // self._block, -(-last // self._block)
        spread = self._scales(low, high).repeat_interleave(self._block)
        values *= spread[first - low * self._block :][: last - first]
        return values.view(stop - start, *self.shape[1:])

    def levels(self, start: int, stop: int) -> QuantizedWeight:
        raise CheckpointError(f"{self.source.folder}: {self.packed!r} holds no integers")

    def _part(self, name: str) -> Tensor:
        return self.source.get(f"{self.packed}.{name}")

    def _scales(self, low: int, high: int) -> Tensor:
        name = f"{self.packed}.absmax"
        stored = self._part("absmax").flatten()[low:high]
        if not self.nested:
            return checked(self.source, name, stored)
        outer = self._fields.integer("nested_blocksize", 1, 1 << 20)
        offset = self._fields.number("nested_offset", -1e30, 1e30)
        scales = self._part("nested_absmax").float()[torch.arange(low, high) // outer]
        return checked(self.source, name, self._part("nested_quant_map").float()[stored.int()] * scales + offset)


def find_bitsandbytes(config: Mapping[str, Any], source: TensorSource) -> Found:
    """Raises CheckpointError for 8 bits (LLM.int8)."""
    if Fields(config, "quantization_config").boolean("load_in_8bit", False):
        raise CheckpointError("quantization_config: bitsandbytes is supported with 4 bits only (load_in_4bit)")
    found = Found(source)
    for state in source:
        packed, mark, _ = state.partition(_STATE)
        if not mark:
            continue
        expect(source, packed, state)
        nested = f"{packed}.nested_absmax" in source
        weight = BlockwiseWeight(source, packed, state, nested)
        for part in weight.parts:
            expect(source, part, packed)
        expect_dtype(source, packed, torch.uint8)
        expect_dtype(source, state, torch.uint8)
        expect_dtype(source, f"{packed}.absmax", torch.uint8 if nested else torch.float32)
        expect_shape(source, f"{packed}.quant_map", (16,), "the values of four bits")
        if nested:
            expect_shape(source, f"{packed}.nested_quant_map", (256,), "the values of eight bits")
        if torch.Size(source.shape(state)).numel() > _MAX_STATE:
            raise CheckpointError(f"{source.folder}: {state!r} is too long; download the checkpoint again")
        found.add(packed, weight)
    return found
