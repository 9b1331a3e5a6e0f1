"""Which format a checkpoint is in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from skyline.checkpoint.errors import CheckpointError
from skyline.quantization.formats.bitsandbytes import find_bitsandbytes
from skyline.quantization.formats.compressed_tensors import find_compressed_tensors
from skyline.quantization.formats.found import Found, QuantizedWeights
from skyline.quantization.formats.fp8 import DEFAULT_BLOCK, find_fp8
from skyline.quantization.formats.modelopt import find_modelopt, own_config
from skyline.quantization.formats.mxfp4 import find_mxfp4
from skyline.quantization.formats.packed_integers import find_awq, find_gptq
from skyline.quantization.formats.scaled import FP8_DTYPES
from skyline.quantization.formats.stored import TensorSource

_READERS: dict[str, Callable[[Mapping[str, Any], TensorSource], Found]] = {
    "awq": find_awq,
    "bitsandbytes": find_bitsandbytes,
    "compressed-tensors": find_compressed_tensors,
    "fbgemm_fp8": find_fp8,
    "fp8": find_fp8,
    "gptq": find_gptq,
    "modelopt": find_modelopt,
    "mxfp4": lambda _, source: find_mxfp4(source),
}


def detect(config: Mapping[str, Any] | None, source: TensorSource) -> QuantizedWeights | None:
    """What is quantized in a checkpoint, or None. `config`: quantization_config of config.json, if there is one.

    Without it hf_quant_config.json in the source's folder counts, then names and dtypes of tensors. Headers are read,
    and two numbers of a weight where they leave its shape open. Raises CheckpointError for an unknown format, naming
    those that are known, for tensors that are missing, and for shapes and dtypes that contradict each other.
    """
    if not config:
        return _by_tensors(source)
    method = config.get("quant_method")
    name = method.lower() if isinstance(method, str) else None
    if name is None and "quant_algo" in config:
        name = "modelopt"
    if name is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        name = "bitsandbytes"
    if name is None or name not in _READERS:
        raise CheckpointError(
            f"quantization_config: quant_method {str(method)[:80]!r} is not supported; "
            f"those that are: {', '.join(_READERS)}"
        )
    return _READERS[name](config, source).finish(name)


def _by_tensors(source: TensorSource) -> QuantizedWeights | None:
    config = own_config(source)
    if config is not None:
        return find_modelopt(config, source).finish("modelopt")
    for name in source:
        dtype, shape = source.dtype(name), source.shape(name)
        if dtype in FP8_DTYPES and f"{name}_scale_inv" in source:
            blocks = len(source.shape(f"{name}_scale_inv")) >= 2
            return find_fp8({"weight_block_size": list(DEFAULT_BLOCK) if blocks else None}, source).finish("fp8")
        if dtype in FP8_DTYPES and f"{name}_scale" in source:
            return find_fp8({}, source).finish("fp8")
        if dtype == torch.uint8 and len(shape) == 4 and name.endswith("_blocks"):
            return find_mxfp4(source).finish("mxfp4")
    return None
