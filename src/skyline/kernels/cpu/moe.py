"""The experts of a mixture over packed weights, in every format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skyline.kernels.cpu.native import library, only, provide, supports
from skyline.kernels.cpu.packed import Format, PackedLayout, PackedWeight, pack, weight_layout
from skyline.kernels.registry import Request


def _layouts(format: Format) -> dict[int, Callable[[tuple[Any, ...]], PackedLayout]]:
    """By argument: of gate_up and of down."""
    return {
        1: lambda arguments: weight_layout(format, arguments[1], gated=True),
        2: lambda arguments: weight_layout(format, arguments[2]),
    }


def _into(layouts: dict[int, Callable[[tuple[Any, ...]], PackedLayout]]) -> Callable[..., None]:
    def moe_experts(out: Tensor, x: Tensor, gate_up: Any, down: Any, weights: Tensor, ids: Tensor) -> None:
        if not isinstance(gate_up, PackedWeight):  # a caller without a loader: slow, and right
            arguments = (x, gate_up, down)
            gate_up, down = pack(gate_up, layouts[1](arguments)), pack(down, layouts[2](arguments))
        first, second = gate_up.layout, down.layout
        if (first.format, first.group, first.zeros) != (second.format, second.group, second.zeros):
            raise ValueError(f"moe_experts: weights packed as {first.name} and {second.name} do not go together")
        library().moe_experts(out, x, weights, ids, down.data, down.scales, down.sums, *gate_up.arguments)

    return moe_experts


def _provide(op: str, format: Format, check: Callable[[Request], str | None]) -> None:
    layouts = _layouts(format)
    provide(op, _into(layouts), check, layouts=layouts)


_FLOAT32, _BFLOAT16 = (torch.float32,), (torch.bfloat16,)
_provide("moe_experts", Format.BFLOAT16, only(_BFLOAT16, "multiplies in bfloat16"))
_provide("moe_experts", Format.FLOAT32, only(_FLOAT32, "multiplies in float32"))
_provide("moe_experts_int8", Format.INT8, supports)
_provide("moe_experts_int8_weight_only", Format.INT8_WEIGHT_ONLY, only(_BFLOAT16, "multiplies in bfloat16"))
_provide("moe_experts_int4", Format.INT4, supports)
