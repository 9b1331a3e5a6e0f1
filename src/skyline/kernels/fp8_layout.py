"""How FP8 weights lie in memory. Rows that are no FP8 yet are quantized on the device, after they were copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skyline.kernels.registry import CPU, Layout
from skyline.ops import Fp8Weight, QuantizedWeight
from skyline.ops.formats import integers_of
from skyline.ops.fp8 import BLOCK, FP8, Fp8Rows, quantize_fp8


class Fp8Layout:
    """`Fp8Weight`. Without blocks, rows of floats become what skyline.ops.fp8.quantize_fp8 makes of them."""

    def __init__(self, blocks: bool) -> None:
        self.name = "fp8 in blocks" if blocks else "fp8"
        self.blocks = blocks

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> Fp8Weight:
        values = torch.empty(shape, dtype=torch.uint8, device=device).view(FP8)
        *lead, n, k = shape
        scales = (*lead, -(-n // BLOCK), -(-k // BLOCK)) if self.blocks else (*lead, n)
        return Fp8Weight(values, torch.empty(scales, device=device))

    def write(self, target: Fp8Weight, first_row: int, rows: Tensor | QuantizedWeight | Fp8Rows) -> None:
        """Raises what `rows_of` does."""
        device, n, count = target.values.device, target.shape[-2], rows.shape[0]
        ready = self.rows_of(rows, device)
        values, scales = ready.values.view(torch.uint8).to(device), ready.scales.to(device)
        target.values.view(torch.uint8).view(-1, target.shape[-1])[first_row : first_row + count] = values
        if not self.blocks:
            target.scales.view(-1)[first_row : first_row + count] = scales[:, 0]
            return
        # The rows of a block bring the same scale.
        row = torch.arange(first_row, first_row + count, device=device)
        target.scales.view(-1, scales.shape[1])[row // n * -(-n // BLOCK) + row % n // BLOCK] = scales

    def rows_of(self, rows: Tensor | QuantizedWeight | Fp8Rows, device: torch.device = CPU) -> Fp8Rows:
        """These rows, made on that device if they are not FP8 yet.

        Raises ValueError if a value is NaN or infinite, or if blocks are to be made of rows of floats.
        """
        if isinstance(rows, Fp8Rows):
            return rows
        if self.blocks:
            raise ValueError("a block's scale belongs to rows that are stored with it; quantize the checkpoint again")
        made = quantize_fp8((rows if isinstance(rows, Tensor) else rows.dequantize()).to(device))
        return Fp8Rows(made.values, made.scales.unsqueeze(1))


FP8_ROWS, FP8_BLOCKS = Fp8Layout(False), Fp8Layout(True)


def fp8_layout(index: int) -> Callable[[tuple[Any, ...]], Layout]:
    """Of the weight among a call's arguments, with the blocks that were decided for it."""

    def choose(arguments: tuple[Any, ...]) -> Layout:
        decided = integers_of(arguments[index])
        return FP8_ROWS if decided is None or decided.group is None else FP8_BLOCKS

    return choose
