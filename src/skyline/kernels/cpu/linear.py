"""Linear layers over packed weights, in every format, and the embedding that may share one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.kernels.cpu.native import available, compresses, library, only, provide
from skyline.kernels.cpu.packed import Format, PackedLayout, PackedWeight, pack, weight_layout


class Tactic(NamedTuple):
    """How a product is gone through, as in csrc/product.h; results are the same to the bit."""

    rows: int = 0  # as many as are best for the instruction set
    piece: int = 512
    level_rows: int = 4


DEFAULT = Tactic()
_BLOCKINGS = (DEFAULT, Tactic(piece=256), Tactic(rows=128), Tactic(rows=256), Tactic(rows=512))
_CROSSINGS = tuple(Tactic(level_rows=rows) for rows in (4, 1, 2, 8, 16))


def _tactics(format: Format) -> Callable[[int], tuple[Tactic, ...]]:
    """What there is to choose from for a number of rows, the default first."""

    def tactics(rows: int) -> tuple[Tactic, ...]:
        if rows > 64:
            return _BLOCKINGS
        if format is Format.INT4 and 1 < rows <= 16 and available() == "amx":
            return _CROSSINGS
        return (DEFAULT,)

    return tactics


def _layout(format: Format) -> Callable[[tuple[Any, ...]], PackedLayout]:
    """The layout for a call's arguments: a weight of gate and up rows is interleaved if silu_mul is to follow."""

    def choose(arguments: tuple[Any, ...]) -> PackedLayout:
        return weight_layout(format, arguments[1], gated=len(arguments) > 3 and bool(arguments[3]))

    return choose


def _into(format: Format) -> Callable[..., None]:
    choose = _layout(format)

    def linear(
        out: Tensor,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        silu_mul: bool = False,
        tactic: Tactic = DEFAULT,
    ) -> None:
        if not isinstance(weight, PackedWeight):  # a caller without a loader: slow, and right
            weight = pack(weight, choose((x, weight, bias, silu_mul)))
        library().linear(out, x, bias, *tactic, *weight.arguments)

    return linear


provide(
    "linear",
    _into(Format.COMPRESSED),
    compresses,
    layouts={1: _layout(Format.COMPRESSED)},
    tactics=_tactics(Format.COMPRESSED),
)
_FLOAT32, _BFLOAT16 = (torch.float32,), (torch.bfloat16,)
for _op, _format, _dtypes, _why in (
    ("linear", Format.BFLOAT16, _BFLOAT16, "multiplies in bfloat16"),
    ("linear", Format.FLOAT32, _FLOAT32, "multiplies in float32"),
    ("linear_int8", Format.INT8, _FLOAT32 + _BFLOAT16, ""),
    ("linear_int4", Format.INT4, _FLOAT32 + _BFLOAT16, ""),
    ("linear_int8_weight_only", Format.INT8_WEIGHT_ONLY, _BFLOAT16, "multiplies in bfloat16"),
    ("linear_fp4", Format.FP4, _BFLOAT16, "multiplies in bfloat16"),
    ("linear_fp8", Format.FP8, _BFLOAT16, "multiplies in bfloat16"),
):
    provide(_op, _into(_format), only(_dtypes, _why), layouts={1: _layout(_format)}, tactics=_tactics(_format))


def _embedding(out: Tensor, ids: Tensor, weight: Any) -> None:
    """The weight may be packed, which a tied output head wants of it; rows are then dequantized."""
    if isinstance(weight, PackedWeight):
        library().packed_embedding(out, ids, *weight.arguments)
    else:
        out.copy_(F.embedding(ids, weight))


provide("embedding", _embedding, any_layout=frozenset({1}))
