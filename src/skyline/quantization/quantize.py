"""From float weights to integers, row by row, so that a weight may be quantized in pieces as it is read.

Everything is computed in float32 as it is written here. Kernels that write a layout of their own use the same formulas,
operation by operation, and give the same integers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.ops import QuantizedWeight
from skyline.ops.formats import DEFAULT_GROUP


def quantize_int8(weight: Tensor) -> QuantizedWeight:
    """weight [.., N, K] of any float dtype -> int8 with one scale a row: largest magnitude / 127.

    Raises ValueError if a value is NaN or infinite.
    """
    wide = _finite(weight)
    largest = wide.abs().amax(-1, keepdim=True)
    inverse = torch.div(torch.full_like(largest, 127), largest)  # 127 / largest would round twice, by a reciprocal
    values = (wide * _finite_or_zero(inverse)).round().clamp(-127, 127)
    return QuantizedWeight(values.to(torch.int8), (largest / 127).squeeze(-1))


def quantize_int4(weight: Tensor, group: int = DEFAULT_GROUP, symmetric: bool = True) -> QuantizedWeight:
    """weight [.., N, K] of any float dtype -> int4 with a float16 scale for each `group` neighbours of a row.

    Symmetric: the value of largest magnitude becomes -8, so that all 16 levels serve; that may make the scale negative
    (as in llama.cpp's Q4_0). Otherwise the range from the smallest to the largest value, widened to hold 0, is cut into
    15 steps, and the level of 0 is the zero point. Zeros are exact in both.

    Raises ValueError if a value is NaN or infinite, or so large that the scale is beyond float16.
    """
    wide = _finite(weight)
    k = wide.shape[-1]
    # Zeros beyond the end of a row change neither its largest magnitude nor a range that holds 0.
    groups = F.pad(wide, (0, -k % group)).reshape(*wide.shape[:-1], -1, group)
    if symmetric:
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scales = _half(extreme / -8)
        values = _finite_or_zero(groups / scales.float()).round().clamp(-8, 7)
        zeros = None
    else:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scales = _half((high - low) / 15)
        zero = _finite_or_zero(-low / scales.float()).round()
        values = (_finite_or_zero(groups / scales.float()).round() + zero).clamp(0, 15)
        zeros = zero.half().squeeze(-1)
    return QuantizedWeight(values.flatten(-2)[..., :k].to(torch.int8), scales.squeeze(-1), zeros, group)


def _finite_or_zero(quotient: Tensor) -> Tensor:
    """Where a division by the scale overflowed there are only zeros to represent, or what is as good as that."""
    return torch.where(quotient.isfinite(), quotient, 0.0)


def _half(scales: Tensor) -> Tensor:
    narrow = scales.half()
    if bool(narrow.isinf().any()):
        raise ValueError(f"has values so large that their int4 scale, {scales.abs().max():g}, is beyond float16")
    return narrow


def _finite(weight: Tensor) -> Tensor:
    wide = weight.float()
    if not bool(wide.isfinite().all()):
        nans, infinities = int(wide.isnan().sum()), int(wide.isinf().sum())
        found = [f"{count} {name}" for count, name in ((nans, "NaN"), (infinities, "infinite")) if count]
        raise ValueError(f"has {' and '.join(found)} values, which cannot be quantized")
    return wide
