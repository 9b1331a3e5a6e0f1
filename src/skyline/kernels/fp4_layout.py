"""How FP4 weights lie in memory: as checkpoints hold them, the scales of NVFP4's tensors spread over their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.kernels.registry import CPU, Layout
from skyline.ops import Fp4Weight, QuantizedWeight
from skyline.ops.formats import integers_of
from skyline.ops.fp4 import MXFP4_GROUP, NVFP4_GROUP
from skyline.ops.fp8 import Fp8Rows
from skyline.quantization.compress import mxfp4

_LARGEST = 240  # of E8M0: no product of it and an activation above 2^14 is a float32 any more


class Fp4Layout:
    """`Fp4Weight`. Of rows of floats MXFP4 is made, as skyline.quantization.compress.mxfp4 does; NVFP4 is only kept."""

    def __init__(self, group: int) -> None:
        self.name = "mxfp4" if group == MXFP4_GROUP else "nvfp4"
        self.group = group

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> Fp4Weight:
        *lead, n, k = shape
        values = torch.empty((*lead, n, k // 2), dtype=torch.uint8, device=device)
        scales = torch.empty((*lead, n, -(-k // self.group)), dtype=torch.uint8, device=device)
        of_dtype = scales if self.group == MXFP4_GROUP else scales.view(torch.float8_e4m3fn)
        return Fp4Weight(values, of_dtype, torch.empty((*lead, n), device=device), self.group)

    def write(self, target: Fp4Weight, first_row: int, rows: Tensor | QuantizedWeight | Fp8Rows | Fp4Weight) -> None:
        """Raises what `rows_of` does."""
        rows = self.rows_of(rows, target.values.device)
        place = slice(first_row, first_row + rows.shape[0])
        for whole, part in (
            (target.values, rows.values),
            (target.scales.view(torch.uint8), rows.scales.view(torch.uint8)),
        ):
            whole.view(-1, whole.shape[-1])[place] = part.to(whole.device)
        target.row_scales.view(-1)[place] = rows.row_scales.to(target.row_scales.device)

    def rows_of(self, rows: Tensor | QuantizedWeight | Fp8Rows | Fp4Weight, device: torch.device = CPU) -> Fp4Weight:
        """These rows, made on that device if they are not FP4 yet.

        Raises ValueError if a value is NaN or infinite, if K is odd, if NVFP4 is to be made, or for huge scales.
        """
        if not isinstance(rows, Fp4Weight):
            rows = self._made(rows if isinstance(rows, Tensor) else rows.dequantize(), device)
        if self.group == MXFP4_GROUP and rows.scales.numel() and int(rows.scales.max()) > _LARGEST:
            raise ValueError("a scale is above 2^113, more than kernels take; ask for --quantization none")
        return rows

    def _made(self, rows: Tensor, device: torch.device) -> Fp4Weight:
        count, k = rows.shape
        if self.group != MXFP4_GROUP:
            raise ValueError("nvfp4 has a scale for a whole tensor, so it is made by `skyline quantize` only")
        if k % 2:
            raise ValueError(f"fp4 lies two in a byte, but rows have {k} values")
        made = mxfp4(F.pad(rows.to(device), (0, -k % MXFP4_GROUP)))
        values = made["weight_packed"][:, : k // 2]
        return Fp4Weight(values, made["weight_scale"], torch.ones(count, device=device), MXFP4_GROUP)


FP4 = {group: Fp4Layout(group) for group in (MXFP4_GROUP, NVFP4_GROUP)}


def fp4_group(weight: Any) -> int:
    """That was decided for a weight."""
    decided = integers_of(weight)
    return MXFP4_GROUP if decided is None or decided.group is None else decided.group


def fp4_layout(index: int) -> Callable[[tuple[Any, ...]], Layout]:
    """Of the weight among a call's arguments, with the group that was decided for it."""
    return lambda arguments: FP4[fp4_group(arguments[index])]
