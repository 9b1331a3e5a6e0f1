"""The experts of a mixture over packed weights, in every format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from skyline.kernels.cpu.native import compresses, library, only, provide, supports
from skyline.kernels.cpu.packed import Format, PackedLayout, PackedWeight, pack, weight_layout
from skyline.kernels.registry import Request

_PLAIN = {Format.BFLOAT16, Format.COMPRESSED, Format.BYTES, Format.SIX_BITS}  # that the op on plain weights takes
_Layouts = Mapping[int, Callable[[tuple[Any, ...]], PackedLayout]]


def _layouts(format: Format, gate_up: int = 1, down: int = 2) -> _Layouts:
    """By the weights' places among the arguments."""
    return {
        gate_up: lambda arguments: weight_layout(format, arguments[gate_up], gated=True),
        down: lambda arguments: weight_layout(format, arguments[down]),
    }


def _compute(
    out: Tensor,
    x: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    weights: Tensor,
    ids: Tensor,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    gating: tuple[float, float] = (0.0, 0.0),
) -> None:
    """gating: alpha and limit of `moe_experts_clamped`; alpha 0 is silu."""
    first, second = gate_up.layout, down.layout
    own = int(second.format), second.group, second.zeros
    if own != (int(first.format), first.group, first.zeros) and not {first.format, second.format} <= _PLAIN:
        raise ValueError(f"moe_experts: weights packed as {first.name} and {second.name} do not go together")
    parts = down.arguments[:3]
    library().moe_experts(out, x, weights, ids, *biases, *gating, *parts, *own, *gate_up.arguments)


def _into(layouts: _Layouts) -> Callable[..., None]:
    def moe_experts(
        out: Tensor,
        x: Tensor,
        gate_up: Any,
        down: Any,
        weights: Tensor,
        ids: Tensor,
        residual: Tensor | None = None,  # of moe_experts_fp8 only
    ) -> None:
        if not isinstance(gate_up, PackedWeight):  # a caller without a loader: slow, and right
            arguments = (x, gate_up, down)
            gate_up, down = pack(gate_up, layouts[1](arguments)), pack(down, layouts[2](arguments))
        _compute(out, x, gate_up, down, weights, ids)
        if residual is not None:
            out.add_(residual)

    return moe_experts


def _clamped_into(layouts: _Layouts) -> Callable[..., None]:
    def moe_experts_clamped(
        out: Tensor,
        x: Tensor,
        gate_up: Any,
        gate_up_bias: Tensor,
        down: Any,
        down_bias: Tensor,
        weights: Tensor,
        ids: Tensor,
        alpha: float,
        limit: float,
    ) -> None:
        if not isinstance(gate_up, PackedWeight):  # a caller without a loader: slow, and right
            arguments = (x, gate_up, gate_up_bias, down)
            gate_up, down = pack(gate_up, layouts[1](arguments)), pack(down, layouts[3](arguments))
        _compute(out, x, gate_up, down, weights, ids, (gate_up_bias, down_bias), (alpha, limit))

    return moe_experts_clamped


def _provide(op: str, format: Format, check: Callable[[Request], str | None]) -> None:
    layouts = _layouts(format)
    provide(op, _into(layouts), check, layouts=layouts)


def _provide_clamped(op: str, format: Format, check: Callable[[Request], str | None]) -> None:
    layouts = _layouts(format, 1, 3)
    provide(op, _clamped_into(layouts), check, layouts=layouts)


_FLOAT32, _BFLOAT16 = (torch.float32,), (torch.bfloat16,)
_provide("moe_experts", Format.COMPRESSED, compresses)
_provide("moe_experts", Format.BFLOAT16, only(_BFLOAT16, "multiplies in bfloat16"))
_provide("moe_experts", Format.FLOAT32, only(_FLOAT32, "multiplies in float32"))
_provide("moe_experts_int8", Format.INT8, supports)
_provide("moe_experts_int8_weight_only", Format.INT8_WEIGHT_ONLY, only(_BFLOAT16, "multiplies in bfloat16"))
_provide("moe_experts_int4", Format.INT4, supports)
_provide("moe_experts_fp4", Format.FP4, only(_BFLOAT16, "multiplies in bfloat16"))
_provide("moe_experts_fp8", Format.FP8, only(_BFLOAT16, "multiplies in bfloat16"))
_provide_clamped("moe_experts_clamped", Format.COMPRESSED, compresses)
_provide_clamped("moe_experts_clamped", Format.BFLOAT16, only(_BFLOAT16, "multiplies in bfloat16"))
_provide_clamped("moe_experts_clamped", Format.FLOAT32, only(_FLOAT32, "multiplies in float32"))
_provide_clamped("moe_experts_clamped_fp4", Format.FP4, only(_BFLOAT16, "multiplies in bfloat16"))


def _sorted_into(layouts: _Layouts, padded: bool) -> Callable[..., None]:
    """The same kernel on rows that are sorted by expert: each is a token with one choice."""
    experts = _into({})  # the weights are packed by then

    def run(out: Tensor, rows: Tensor, bounds: Tensor, gate_up: Any, down: Any) -> None:
        if not isinstance(gate_up, PackedWeight):
            arguments = (rows, bounds, gate_up, down)
            gate_up, down = pack(gate_up, layouts[2](arguments)), pack(down, layouts[3](arguments))
        counts = bounds.long() if padded else bounds.long().diff()
        ids = torch.repeat_interleave(torch.arange(len(counts)), counts).view(-1, 1)
        weights = torch.ones(ids.shape, dtype=torch.float32)
        if not padded:
            experts(out, rows, gate_up, down, weights, ids)
            return
        out.zero_()
        there = torch.arange(rows.shape[1]) < counts.unsqueeze(1)
        found = rows[there]
        result = torch.empty_like(found)
        experts(result, found, gate_up, down, weights, ids)
        out[there] = result

    return run


for _format, _check in (
    (Format.COMPRESSED, compresses),
    (Format.BFLOAT16, only(_BFLOAT16, "multiplies in bfloat16")),
    (Format.FLOAT32, only(_FLOAT32, "multiplies in float32")),
):
    _wanted = {
        2: lambda arguments, f=_format: weight_layout(f, arguments[2], gated=True),
        3: lambda arguments, f=_format: weight_layout(f, arguments[3]),
    }
    for _op, _padded in (("moe_experts_ragged", False), ("moe_experts_padded", True)):
        provide(_op, _sorted_into(_wanted, _padded), _check, layouts=_wanted)
