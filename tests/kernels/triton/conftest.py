"""Mends Triton 3.6's interpreter where it does not compute what a GPU does.

Its floats of 16 and 8 bits that numpy lacks are kept as integers: products took those for the values, and conversions
cut off what they should round. And numpy 2.4 no longer gives the only element of an array for an index.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

from skyline.kernels import triton as provider

provider.FALLS_BACK = False

_TORCH = {
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _convert(data: NDArray[Any], source: Any, target: Any) -> NDArray[Any]:
    """Rounded to the nearest, as torch does; results of types that numpy lacks as their bits."""
    start, end = _TORCH[source.scalar.name], _TORCH[target.scalar.name]
    bits = torch.from_numpy(np.ascontiguousarray(data).view(f"i{start.itemsize}" if start.itemsize > 1 else "u1"))
    values = bits.view(start).float() if start != torch.float64 else bits.view(start)
    if end == torch.float8_e4m3fn:  # as the hardware's conversion, which saturates
        values = values.clamp(-448, 448)
    return values.to(end).view(_BITS[end.itemsize]).numpy().view(interpreter._get_np_dtype(target))


def _cast(self: Any, source: Any, target: Any, rounding: Any = None) -> Any:
    kinds = (source.dtype.scalar, target.scalar)
    if all(kind.name in _TORCH for kind in kinds):
        data = _convert(source.data, *kinds).reshape(source.data.shape)
    elif target.scalar.name in _TORCH:  # of integers
        data = _convert(source.data.astype(np.float32), tl.float32, target).reshape(source.data.shape)
    elif kinds[0].name in _TORCH:
        wide = _convert(source.data, kinds[0], tl.float32).reshape(source.data.shape)
        data = wide.astype(interpreter._get_np_dtype(target))
    else:
        data = source.data.astype(interpreter._get_np_dtype(target))
    return interpreter.TensorHandle(data, target.scalar)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    if a.dtype.scalar.name in _TORCH:
        wide = [_convert(part.data, part.dtype, tl.float32).reshape(part.data.shape) for part in (a, b)]
    else:  # integers: their sums are exact in int32
        wide = [part.data.astype(np.int32) for part in (a, b)]
    return interpreter.TensorHandle((wide[0] @ wide[1]).astype(d.data.dtype) + d.data, d.dtype.scalar)


for _name in ("fp_ext", "fp_trunc", "fp_to_fp", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui"):
    setattr(interpreter.InterpreterBuilder, f"create_{_name}", _cast)
interpreter.InterpreterBuilder.create_dot = _dot

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor
