"""quant_method "fp8" and "fbgemm_fp8": `weight` in float8 beside `weight_scale_inv` or `weight_scale`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skyline.checkpoint.errors import CheckpointError
from skyline.quantization.formats.found import Found
from skyline.quantization.formats.names import is_ignored, pattern_list
from skyline.quantization.formats.scaled import FP8_DTYPES, scaled
from skyline.quantization.formats.stored import TensorSource

DEFAULT_BLOCK = (128, 128)
_MAX_BLOCK = 1 << 20


def find_fp8(config: Mapping[str, Any], source: TensorSource) -> Found:
    """Every float8 tensor of two or more dimensions. What multiplies is called `scale_inv` all the same.

    An ignored tensor that has a scale is quantized nevertheless; without one it is left as it is.
    """
    block = block_size(config.get("weight_block_size"), "quantization_config: weight_block_size")
    ignored = [
        entry
        for key in ("modules_to_not_convert", "ignored_layers")
        for entry in pattern_list(config.get(key), f"quantization_config: {key}")
    ]
    found = Found(source)
    for name in source:
        if source.dtype(name) not in FP8_DTYPES or len(source.shape(name)) < 2:
            continue
        scale = next((name + suffix for suffix in ("_scale_inv", "_scale") if name + suffix in source), None)
        if scale is not None:
            found.add(name, scaled(source, name, scale, block))
        elif not is_ignored(name.removesuffix(".weight"), ignored):
            raise missing_scale(source, name)
    return found


def missing_scale(source: TensorSource, name: str) -> CheckpointError:
    dtype = str(source.dtype(name)).removeprefix("torch.")
    return CheckpointError(
        f"{source.folder}: {name!r} is {dtype} but has no scale, and quantization_config does not list it as left out; "
        "download or quantize the checkpoint again"
    )


def block_size(value: Any, where: str) -> tuple[int, int] | None:
    """[rows, columns] of a configuration. Raises CheckpointError for anything but two positive integers."""
    if value is None:
        return None
    is_pair = isinstance(value, list) and len(value) == 2
    if not is_pair or not all(type(size) is int and 0 < size <= _MAX_BLOCK for size in value):
        raise CheckpointError(f"{where} must be two positive integers, as in [128, 128], not {str(value)[:80]}")
    return value[0], value[1]
