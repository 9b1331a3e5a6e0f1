"""NVIDIA ModelOpt: FP8, NVFP4, MXFP8 and mixtures of them; the tensors of each layer say which it is.

https://github.com/NVIDIA/Model-Optimizer (modelopt/torch/export/quant_utils.py writes what is read here)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.fields import Fields, read_json_object
from skyline.quantization.formats.found import Found
from skyline.quantization.formats.fp8 import DEFAULT_BLOCK, missing_scale
from skyline.quantization.formats.names import is_ignored, pattern_list
from skyline.quantization.formats.scaled import FP8_DTYPES, Whole, fp4, scaled
from skyline.quantization.formats.scales import expect
from skyline.quantization.formats.stored import TensorSource

CONFIG_FILE = "hf_quant_config.json"
_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", "MXFP4")
_MIXED = "MIXED_PRECISION"


def own_config(source: TensorSource) -> Mapping[str, Any] | None:
    """`quantization` of hf_quant_config.json, which older exports have instead of an entry in config.json."""
    path = source.folder / CONFIG_FILE
    return Fields(read_json_object(path), CONFIG_FILE).optional_object("quantization") if path.exists() else None


def find_modelopt(config: Mapping[str, Any], source: TensorSource) -> Found:
    """Raises CheckpointError for an algorithm that is not supported, naming it."""
    for algorithm in _algorithms(config):
        if algorithm not in _ALGORITHMS:
            raise CheckpointError(
                f"quantization_config: quant_algo {algorithm[:80]} is not supported; those that are: "
                f"{', '.join((*_ALGORITHMS, _MIXED))}"
            )
    ignored = [
        entry
        for key in ("ignore", "exclude_modules")
        for entry in pattern_list(config.get(key), f"quantization_config: {key}")
    ]
    found = Found(source)
    for name in source:
        module, _, leaf = name.rpartition(".")
        if leaf == "pre_quant_scale":
            raise CheckpointError(
                f"{source.folder}: {name!r} scales activations while the model runs, which is not supported; "
                "use a checkpoint without it"
            )
        if leaf == "weight" and len(source.shape(name)) >= 2:
            _add(found, name, module, ignored)
    return found


def _add(found: Found, name: str, module: str, ignored: list[str]) -> None:
    source, scale, whole = found.source, f"{name}_scale", f"{name}_scale_2"
    dtype = source.dtype(name)
    if dtype not in (*FP8_DTYPES, torch.uint8):
        return
    if scale not in source:
        if not is_ignored(module, ignored):
            raise missing_scale(source, name)
        return
    if dtype == torch.uint8:
        if source.dtype(scale) == torch.float8_e4m3fn:
            found.add(name, fp4(source, name, scale, 16, (expect(source, whole, name), Whole.MULTIPLIES)))
        else:
            found.add(name, fp4(source, name, scale, 32))
        return
    # FP8_PB_WO writes blocks as [A, 1, B, 1].
    found.add(name, scaled(source, name, scale, DEFAULT_BLOCK if len(source.shape(scale)) == 4 else None))


def _algorithms(config: Mapping[str, Any]) -> list[str]:
    fields = Fields(config, "quantization_config")
    whole = fields.text("quant_algo", "")
    found = [whole] if whole and whole != _MIXED else []
    for name, layer in (fields.optional_object("quantized_layers") or {}).items():
        if not isinstance(layer, dict):
            raise fields.error("quantized_layers", f"must map {str(name)[:80]!r} to an object")
        algorithm = Fields(layer, f"quantization_config: quantized_layers: {name}").text("quant_algo", "")
        if algorithm and algorithm not in found:
            found.append(algorithm)
    return found
