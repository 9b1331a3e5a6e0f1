"""Modules that predict one token more equal transformers' on weights under the names that checkpoints give them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from skyline.checkpoint.config import load_config
from skyline.checkpoint.weights import SafetensorsWeights, load
from skyline.layers import RotaryEmbedding
from skyline.layers.context import LayerContext
from skyline.models.mtp import prediction_modules
from skyline.ops import AttentionBatch
from skyline.ops.caches import LayerCache

from .families import FAMILIES
from .harness import CPU, load_ours, save_tiny

MODULES = {
    "DeepseekV3": ("deepseek_v3", "DeepseekV3"),
    "Glm4Moe": ("glm4_moe", "Glm4Moe"),
    "Qwen3Next": ("qwen3_next", "Qwen3Next"),
    "Qwen3_5": ("qwen3_5", "Qwen3_5"),
}


def _theirs(family: str, theirs: Any) -> Any:
    """transformers' module with random weights."""
    from transformers.modeling_layers import MtpLayer

    folder, prefix = MODULES[family]
    classes = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    layer, norm = getattr(classes, f"{prefix}DecoderLayer"), getattr(classes, f"{prefix}RMSNorm")
    config = theirs.config
    index = 0
    if getattr(config, "layer_types", None):
        index = config.layer_types.index("full_attention")
    elif hasattr(config, "first_k_dense_replace"):
        index = config.first_k_dense_replace
    module = MtpLayer(config, layer, norm, index).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
            )
    return module


@pytest.mark.parametrize("family", MODULES)
def test_a_module_equals_transformers(family: str, tmp_path: Path) -> None:
    settings = {**FAMILIES[family]}
    settings.pop("num_mtp_layers", None)
    model = save_tiny(tmp_path, family, **settings)
    module = _theirs(family, model)
    layers = model.model.layers
    config_path = tmp_path / "config.json"
    raw = json.loads(config_path.read_text())
    last = raw["num_hidden_layers"]
    # Save the model once more with the module's block in the place of a layer like it, to see it under its own names.
    place = module.mtp_block.self_attn.layer_idx
    original, layers[place] = layers[place], module.mtp_block
    (tmp_path / "again").mkdir()
    model.save_pretrained(tmp_path / "again")
    layers[place] = original
    block = {
        name.removeprefix(f"model.layers.{place}."): tensor
        for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items()
        if name.startswith(f"model.layers.{place}.")
    }
    extras = {"enorm": module.enorm, "hnorm": module.hnorm, "eh_proj": module.eh_proj, "post_norm": module.post_norm}
    if family.startswith("Qwen"):
        names = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "post_norm": "norm"}
        weights = {f"mtp.{names[name]}.weight": part.weight for name, part in extras.items()}
        weights |= {f"mtp.layers.0.{name}": tensor for name, tensor in block.items()}
        raw["mtp_num_hidden_layers"] = 1
    else:
        names = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "post_norm": "shared_head.norm"}
        weights = {f"model.layers.{last}.{names[name]}.weight": part.weight for name, part in extras.items()}
        weights |= {f"model.layers.{last}.{name}": tensor for name, tensor in block.items()}
        raw["num_nextn_predict_layers"] = 1
    config_path.write_text(json.dumps(raw))
    main = load_file(tmp_path / "model.safetensors")
    merged = {**main, **{name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}}
    save_file(merged, tmp_path / "model.safetensors", metadata={"format": "pt"})

    load_ours(tmp_path)  # the model passes the module over
    config = load_config(tmp_path)
    (ours,) = prediction_modules(config, torch.float32, CPU)
    load(SafetensorsWeights(tmp_path), ours.checkpoint_names(), ignore=list(main))

    count = 11
    embedded, hidden = (
        torch.randn(count, config.hidden_size, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )
    positions = torch.arange(count)
    caches = [v for m in ours.modules() for v in vars(m).values() if isinstance(v, LayerCache)]
    for cache in caches:
        cache.allocate(1, 64, CPU)
    rotary = RotaryEmbedding(LayerContext(torch.float32, CPU), config.rope, config.head_dim, 64)
    with torch.inference_mode():
        batch = AttentionBatch.build([[0]], [0], [count], 64, CPU)
        got = ours(embedded, hidden, positions, batch, rotary.table)
        mask = torch.full((count, count), float("-inf")).triu(1).view(1, 1, count, count)
        turns = model.model.rotary_emb(hidden.unsqueeze(0), positions.view(1, -1))
        expected = module(embedded.unsqueeze(0), hidden.unsqueeze(0), turns, mask, positions.view(1, -1), None)
    torch.testing.assert_close(got, expected[0], rtol=0, atol=1e-4)
    assert len(caches) == 1


def test_most_checkpoints_have_none(tmp_path: Path) -> None:
    save_tiny(tmp_path, "Llama")
    assert prediction_modules(load_config(tmp_path), torch.float32, CPU) == []
