"""Quantized copies of tiny checkpoints, each with the transformers model of the very values that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from skyline.runner.export import export

Values = dict[str, Tensor]


def compressed(folder: Path, theirs: Any, format: str) -> Any:
    """By `skyline quantize`; the values are those that compressed-tensors makes of it."""
    import transformers
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8

    small = folder.parent / "small"
    export(folder, small, format)
    read = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    for layer in read.modules():
        if getattr(layer, "quantization_status", None) == "compressed":
            for name, scale in list(layer.named_parameters(recurse=False)):
                if name.endswith("_scale") and scale.dtype == torch.bfloat16:
                    scale.data = scale.data.float()  # else the library rounds the products to that
            packed, shape = layer.weight_packed if format == "nvfp4" else None, (layer.out_features, layer.in_features)
            BaseCompressor.load_from_registry(layer.quantization_scheme.format).decompress_module(layer)
            if packed is not None:  # the library rounds these too, so only its numbers and scales are taken
                numbers = unpack_fp4_from_uint8(packed, *shape, dtype=torch.float32)
                steps = layer.weight_scale.float() / layer.weight_global_scale
                layer.weight.data = numbers * steps.repeat_interleave(16, 1)
    found = read.state_dict()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(found[name])
    return theirs


def rewrite(folder: Path, theirs: Any, change: Callable[[Values], Values], quantization: dict[str, Any]) -> Any:
    """Replace tensors of the checkpoint by what `change` makes of them, in a copy; it also rounds them in place."""
    small = folder.parent / "small"
    small.mkdir()
    tensors = load_file(folder / "model.safetensors")
    written = change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in written.items()}, small / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (small / "config.json").write_text(json.dumps(config))
    for path in folder.glob("*token*"):
        (small / path.name).write_text(path.read_text())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return type(theirs).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def fp8_blocks(block: int) -> Callable[[Values], Values]:
    """As DeepSeek V3: `weight_scale_inv` for blocks of block x block, the last of which are smaller."""

    def change(tensors: Values) -> Values:
        written = {}
        for name, weight in tensors.items():
            if weight.dim() != 2 or "proj" not in name:
                written[name] = weight
                continue
            rows, columns = (-(-size // block) for size in weight.shape)
            scales = torch.empty(rows, columns)
            stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
            for i in range(rows):
                for j in range(columns):
                    part = weight[i * block : (i + 1) * block, j * block : (j + 1) * block]
                    scales[i, j] = part.abs().max() / 448
                    values = (part / scales[i, j]).to(torch.float8_e4m3fn)
                    stored[i * block : (i + 1) * block, j * block : (j + 1) * block] = values
                    part.copy_(values.float() * scales[i, j])
            written[name], written[f"{name}_scale_inv"] = stored, scales
        return written

    return change


def mxfp4_experts(tensors: Values) -> Values:
    """As gpt-oss: blocks [E, N, K / 32, 16] and exponents [E, N, K / 32] of the experts' transposed weights."""
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    numbers = torch.cat((numbers, -numbers))
    written = {}
    for name, weight in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            written[name] = weight
            continue
        groups = weight.transpose(1, 2).unflatten(-1, (-1, 32))
        exponents = (groups.abs().amax(-1, keepdim=True).log2().floor() - 2).clamp(-127, 127)
        codes = (groups / 2**exponents).unsqueeze(-1).sub(numbers).abs().argmin(-1)
        weight.copy_((numbers[codes] * 2**exponents).flatten(-2).transpose(1, 2))
        written[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        written[f"{name}_scales"] = (exponents.squeeze(-1) + 127).to(torch.uint8)
    return written
