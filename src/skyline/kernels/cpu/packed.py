"""Weights in the layout of csrc/packed.h."""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from skyline.kernels.cpu.native import library
from skyline.kernels.fp4_layout import FP4
from skyline.kernels.fp8_layout import FP8_BLOCKS, FP8_ROWS
from skyline.kernels.registry import CPU
from skyline.ops import Fp4Weight, Fp8Weight, QuantizedWeight
from skyline.ops.formats import DEFAULT_GROUP, integers_of
from skyline.ops.fp4 import MXFP4_GROUP
from skyline.ops.fp8 import BLOCK as FP8_BLOCK
from skyline.ops.fp8 import Fp8Rows
from skyline.ops.host_memory import give_back, reserve_weight
from skyline.ops.quantized import ByteRows
from skyline.ops.quantized_moe import expert_weight

PANEL = 32
SUPER = 256  # values of a row that share factors, in GGML's K types
_Rows = Tensor | QuantizedWeight | ByteRows | Fp8Rows | Fp4Weight


class Format(IntEnum):
    """As in csrc/packed.h."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8_WEIGHT_ONLY = 2
    INT8 = 3
    INT4 = 4
    FP4 = 5
    FP8 = 6
    BYTES = 7
    SIX_BITS = 8
    COMPRESSED = 9  # bfloat16, without loss


_NAMES = {Format.COMPRESSED: "bfloat16 in 12 bits"}
_LONGEST = 1 << 19  # numbers in a row: an exception has 14 bits for its block of 32
_lock = threading.Lock()


@dataclass(slots=True, eq=False)
class PackedWeight:
    """A weight [N, K], or [E, N, K], that the kernels of this provider read.

    data: uint8 [E * panels, bytes of a panel]. scales float32, one a packed row: int8 formats, fp4, and fp8 without
    groups; sums int32: of int8 formats, one a packed row; compressed, the exceptions. While a compressed weight is
    written, `found` has those of its parts, int64 as csrc/compressed.h lists them; `rows_aside`, from and to, are in
    `aside` instead, as plain bfloat16.
    """

    layout: PackedLayout
    shape: tuple[int, ...]
    data: Tensor
    scales: Tensor | None
    sums: Tensor | None
    found: list[Tensor] = field(default_factory=list)
    rows_aside: list[tuple[int, int]] = field(default_factory=list)
    aside: PackedWeight | None = None

    @property
    def finished(self) -> bool:
        return not self.found and not self.rows_aside

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.data, self.scales, self.sums) if part is not None)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """PACKED_PARAMETERS of csrc/packed_arguments.h."""
        if not self.finished:
            raise RuntimeError("a compressed weight was used before it was finished")
        n, k = self.shape[-2:]
        layout = self.layout
        return self.data, self.scales, self.sums, int(layout.format), n, k, layout.gated, layout.group, layout.zeros

    def expert(self, index: int) -> PackedWeight:
        """A view of one matrix of [E, N, K]; of [N, K], the only one."""
        panels = self.layout.panels(self.shape[-2])
        rows = slice(index * panels * PANEL, (index + 1) * panels * PANEL)
        scales = None if self.scales is None else self.scales[rows]
        sums = self.sums if self.sums is None or self.layout.format is Format.COMPRESSED else self.sums[rows]
        data = self.data[index * panels : (index + 1) * panels]
        return PackedWeight(self.layout, self.shape[-2:], data, scales, sums)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values as the kernels use them, [N, K]."""
        return self.read(0, self.shape[0], dtype)

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows [first, last) of [N, K], as the kernels use them."""
        out = torch.empty((last - first, self.shape[1]), dtype=dtype)
        library().packed_embedding(out, torch.arange(first, last), *self.arguments)
        return out


class PackedLayout:
    """A layout of csrc/packed.h. `gated`: rows are gate and up projections, to be multiplied after silu.

    group: of all but int8 and plain formats, the number of values that share a scale; of fp8, 0 if all of a row do.
    zeros: whether those have a zero point, or of bytes offsets.
    """

    def __init__(self, format: Format, gated: bool = False, group: int = 0, zeros: bool = False) -> None:
        self.format = format
        self.gated = gated
        self.group = group
        self.zeros = zeros
        self.name = _NAMES.get(format, format.name.lower()) + (f" by {group}" if group else "")
        self.name += ((" with offsets" if format is Format.BYTES else " with zero points") if zeros else "") + (
            ", gated" if gated else ""
        )

    def panels(self, n: int) -> int:
        return -(-(n // 2) // (PANEL // 2)) if self.gated else -(-n // PANEL)

    def panel_bytes(self, k: int) -> int:
        match self.format:
            case Format.FLOAT32:
                return k * PANEL * 4
            case Format.BFLOAT16:
                return -(-k // 32) * 32 * PANEL * 2
            case Format.COMPRESSED:
                return 64 + -(-k // 32) * 1536
            case Format.INT8_WEIGHT_ONLY:
                return -(-k // 32) * 32 * PANEL
            case Format.INT8:
                return -(-k // 64) * 64 * PANEL
            case Format.INT4:
                return -(-k // self.group) * ((128 if self.zeros else 64) + self.group // 32 * 512)
            case Format.FP4:
                padded = -(-k // 32) * 32
                return -(-padded // self.group * PANEL // 64) * 64 + padded * PANEL // 2
            case Format.BYTES | Format.SIX_BITS:
                of_a_head, head = (32, 64) if self.group == 32 else (SUPER, 64 + SUPER // 16 * PANEL)
                heads = -(-k // of_a_head)
                values = 768 if self.format is Format.SIX_BITS else 1024
                return heads * (head * (2 if self.zeros else 1) + of_a_head // 32 * values)
            case Format.FP8:
                padded = -(-k // 32) * 32
                return (-(-padded // self.group) * 4 if self.group else 0) * PANEL + padded * PANEL

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> PackedWeight:
        experts = shape[0] if len(shape) == 3 else 1
        n, k = shape[-2:]
        if self.gated and n % 2:
            raise ValueError(f"a gated weight needs an even number of rows, not {n}")
        panels = experts * self.panels(n)
        data = reserve_weight((panels, self.panel_bytes(k)), torch.uint8)  # zeros, for the padding
        scales = sums = None
        by_rows = self.format is Format.FP8 and not self.group
        if by_rows or self.format in (Format.INT8, Format.INT8_WEIGHT_ONLY, Format.FP4):
            scales = torch.zeros(panels * PANEL, dtype=torch.float32)
        if self.format in (Format.INT8, Format.INT8_WEIGHT_ONLY):
            sums = torch.zeros(panels * PANEL, dtype=torch.int32)
        if self.format is Format.COMPRESSED:
            sums = reserve_weight((max(panels * -(-k // 32), 1),), torch.int32)
        return PackedWeight(self, tuple(shape), data, scales, sums)

    def write(self, target: PackedWeight, first_row: int, rows: _Rows) -> None:
        rows = self._ready(rows)
        n, count, done = target.shape[-2], rows.shape[0], 0
        while done < count:
            expert, row = divmod(first_row + done, n)
            stop = min(count, done + n - row)
            place = target.expert(expert).arguments
            if isinstance(rows, QuantizedWeight):
                part = rows.rows(done, stop)
                library().pack_levels(*place, part.values, part.scales, part.zeros, row)
            elif isinstance(rows, Fp4Weight):
                parts = (rows.values, rows.scales.view(torch.uint8), rows.row_scales)
                library().pack_fp4(*place, *(part[done:stop].contiguous() for part in parts), row)
            elif isinstance(rows, ByteRows):
                levels, *others = (None if p is None else p.contiguous() for p in rows.rows(done, stop))
                library().pack_bytes(*place, levels, rows.group, *others, row)
            elif isinstance(rows, Fp8Rows):
                values, scales = rows.values.view(torch.uint8)[done:stop], rows.scales[done:stop].float()
                if not library().pack_fp8(*place, values.contiguous(), scales.contiguous(), row):
                    raise ValueError("a weight holds NaN; quantize the checkpoint again")
            elif self.format is Format.COMPRESSED:
                self._compress(target, expert, row, rows[done:stop].contiguous())
            elif not library().pack_rows(*place, rows[done:stop].contiguous(), row):
                raise ValueError("a weight holds NaN or infinity, which cannot be quantized")
            done = stop

    def _compress(self, target: PackedWeight, expert: int, row: int, rows: Tensor) -> None:
        """Rows of one expert. With too many exceptions to list they are kept aside, as plain bfloat16."""
        found = torch.empty(rows.numel() // 64 + 64, dtype=torch.int64)
        exceptions = library().pack_compressed(*target.expert(expert).arguments, rows, row, found)
        if exceptions <= len(found):
            target.found.append(found[:exceptions] + (expert * self.panels(target.shape[-2]) << 32))
            return
        with _lock:
            if target.aside is None:
                target.aside = packed_layout(Format.BFLOAT16, self.gated).allocate(target.shape, torch.bfloat16)
        first = expert * target.shape[-2] + row
        target.aside.layout.write(target.aside, first, rows)
        target.rows_aside.append((first, first + len(rows)))

    def finish(self, target: PackedWeight) -> bool:
        """As skyline.kernels.registry.Finishing. Weights with too many exceptions become plain bfloat16."""
        if target.finished:
            return True
        assert target.sums is not None
        found = torch.cat([torch.empty(0, dtype=torch.int64), *target.found]).sort().values
        counts = torch.bincount(found >> 32, minlength=len(target.data)).int()
        heads = target.data.view(torch.int32)[:, PANEL // 4 : PANEL // 4 + 2]
        heads[:, 0] = counts.cumsum(0) - counts
        heads[:, 1] = counts
        exceptions = (found & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
        aside, ranges = target.aside, sorted(target.rows_aside)
        target.found, target.rows_aside, target.aside = [], [], None
        if aside is None and len(exceptions) <= len(target.sums):
            target.sums[: len(exceptions)] = exceptions
            return True
        compressed = PackedWeight(self, target.shape, target.data, None, exceptions)
        aside = aside or packed_layout(Format.BFLOAT16, self.gated).allocate(target.shape, torch.bfloat16)
        n, rows, done = target.shape[-2], math.prod(target.shape[:-1]), 0
        for first, last in [*ranges, (rows, rows)]:
            while done < first:  # what was compressed
                expert, row = divmod(done, n)
                part = compressed.expert(expert).read(row, min(n, row + first - done), torch.bfloat16)
                aside.layout.write(aside, done, part)
                done += len(part)
            done = last
        for part in (target.data, target.sums):
            give_back(part)
        target.layout, target.data, target.sums = aside.layout, aside.data, aside.sums
        return False

    def _ready(self, rows: _Rows) -> _Rows:
        """Rows in the numbers of this format, where those are not made while packing."""
        match self.format:
            case Format.BYTES | Format.SIX_BITS:
                assert isinstance(rows, ByteRows)  # decided for weights that are stored as such
                return rows
            case Format.FP8:
                assert isinstance(rows, Tensor | QuantizedWeight | Fp8Rows)
                return (FP8_BLOCKS if self.group else FP8_ROWS).rows_of(rows)
            case Format.FP4:
                assert not isinstance(rows, ByteRows)
                return FP4[self.group].rows_of(rows)
            case _:
                return rows


def packed_layout(format: Format, gated: bool = False, group: int = 0, zeros: bool = False) -> PackedLayout:
    """One object a layout: layouts are compared by identity."""
    return _layout(format, gated, group, zeros)


def weight_layout(format: Format, weight: Any, gated: bool = False) -> PackedLayout:
    """For a parameter; in int4, fp4, fp8 and bytes, with the group and zero points that were decided for it."""
    decided = integers_of(weight)
    group = 0 if decided is None else decided.group or 0
    match format:
        case Format.BFLOAT16 | Format.COMPRESSED if decided is not None and decided.widened:
            return packed_layout(Format.SIX_BITS if decided.bits == 6 else Format.BYTES, gated, group, decided.zeros)
        case Format.COMPRESSED if weight.shape[-1] > _LONGEST:
            return packed_layout(Format.BFLOAT16, gated)
        case Format.FP8:
            return packed_layout(format, gated, group)
        case Format.FP4:
            return packed_layout(format, gated, group or MXFP4_GROUP)
        case Format.INT4:
            return packed_layout(format, gated, group or DEFAULT_GROUP, decided is not None and decided.zeros)
        case _:
            return packed_layout(format, gated)


_layout = functools.cache(PackedLayout)  # tells calls apart by how they are written, hence the function above


def pack(weight: Tensor | QuantizedWeight | ByteRows | Fp4Weight | Fp8Weight, layout: PackedLayout) -> PackedWeight:
    """weight [N, K] or [E, N, K] in this layout; one that is quantized already keeps its values and scales."""
    if isinstance(weight, ByteRows):
        target = layout.allocate(tuple(weight.shape), torch.bfloat16)
        layout.write(target, 0, weight)
        return target
    if isinstance(weight, Fp4Weight):
        layout = packed_layout(layout.format, layout.gated, weight.group)
        target = layout.allocate(tuple(weight.shape), torch.bfloat16)
        values, scales = (part.reshape(-1, part.shape[-1]) for part in (weight.values, weight.scales))
        layout.write(target, 0, Fp4Weight(values, scales, weight.row_scales.flatten(), weight.group))
        return target
    if isinstance(weight, Fp8Weight):
        layout = packed_layout(layout.format, layout.gated, FP8_BLOCK if weight.blocks else 0)
        target = layout.allocate(tuple(weight.shape), torch.bfloat16)
        n, k = weight.shape[-2:]
        scales = weight.scales[..., None]
        if weight.blocks:
            scales = weight.scales.repeat_interleave(FP8_BLOCK, -2)[..., :n, :]
        layout.write(target, 0, Fp8Rows(weight.values.reshape(-1, k), scales.reshape(-1, scales.shape[-1])))
        return target
    if isinstance(weight, QuantizedWeight):
        layout = packed_layout(layout.format, layout.gated, weight.group or 0, weight.zeros is not None)
        target = layout.allocate(tuple(weight.shape), torch.int8)
        matrices = [expert_weight(weight, e) for e in range(weight.shape[0])] if len(weight.shape) == 3 else [weight]
        for expert, matrix in enumerate(matrices):
            layout.write(target, expert * weight.shape[-2], matrix)
        return target
    target = layout.allocate(tuple(weight.shape), weight.dtype)
    layout.write(target, 0, weight.reshape(-1, weight.shape[-1]))
    layout.finish(target)
    return target
