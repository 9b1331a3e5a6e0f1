"""A safetensors checkpoint in the compressed-tensors format that vLLM reads (runs in the conversion environment).

    python to_compressed_tensors.py CHECKPOINT FOLDER int8|int4

int8: weights with one scale a row, activations quantized by token while running (W8A8).
int4: symmetric weights with one scale for 128 neighbours, eight to an int32; activations stay bfloat16 (W4A16).
The embedding, the head, the norms and a router are left alone.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

GROUP = 128


def main() -> None:
    source, target, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(source / "model.safetensors", "pt") as original:
        for name in original.keys():  # noqa: SIM118
            weight = original.get_tensor(name)
            if not name.endswith("_proj.weight"):
                tensors[name] = weight
                continue
            tensors.update(_int8(name, weight) if kind == "int8" else _int4(name, weight))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / file, target / file)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = _config(kind)
    (target / "config.json").write_text(json.dumps(config, indent=1))


def _int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
    return {name: (weight / scale).round().clamp(-127, 127).to(torch.int8), f"{name}_scale": scale.bfloat16()}


def _int4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // GROUP, GROUP)
    scale = groups.abs().amax(2, keepdim=True).clamp(min=1e-8) / 7
    values = ((groups / scale).round().clamp(-8, 7) + 8).to(torch.int32).view(rows, columns // 8, 8)
    packed = torch.zeros(rows, columns // 8, dtype=torch.int32)
    for index in range(8):
        packed |= values[:, :, index] << (4 * index)
    stem = name.removesuffix("weight")
    return {
        f"{stem}weight_packed": packed,
        f"{stem}weight_scale": scale.squeeze(2).bfloat16(),
        f"{stem}weight_shape": torch.tensor([rows, columns]),
    }


def _config(kind: str) -> dict[str, Any]:
    weights = {"type": "int", "symmetric": True, "dynamic": False, "observer": "minmax"}
    if kind == "int8":
        weights |= {"num_bits": 8, "strategy": "channel"}
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    else:
        weights |= {"num_bits": 4, "strategy": "group", "group_size": GROUP}
        inputs = None
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if kind == "int8" else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp[.]gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }


if __name__ == "__main__":
    main()
