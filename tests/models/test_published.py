"""Published models, by the sizes that transformers' configurations have by default: they are recognised, and whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from skyline.checkpoint.config import load_config
from skyline.models import create_model, kv_caches

# Configuration, settings that it lacks, parameters in billions, bytes that a token takes in all layers (bfloat16).
PUBLISHED: dict[str, tuple[dict[str, Any], float, int]] = {
    "GptOss": ({}, 116.8, 36 * 2 * 8 * 64 * 2),  # gpt-oss-120b
    "DeepseekV3": ({}, 671.0, 61 * (512 + 64) * 2),
    "DeepseekV32": ({}, 671.9, 61 * (512 + 64 + 128) * 2),
    "MiniMaxM2": ({}, 228.7, 62 * 2 * 8 * 128 * 2),
    "Glm4Moe": ({"head_dim": 128}, 106.9, 46 * 2 * 8 * 128 * 2),  # GLM-4.5-Air
    "Qwen3Next": ({}, 79.7, 12 * 2 * 2 * 256 * 2),  # Qwen3-Next-80B-A3B
    "Qwen3_5Text": ({}, 9.0, 8 * 2 * 4 * 256 * 2),  # Qwen3.5-9B
    "Qwen3_5MoeText": ({}, 34.7, 10 * 2 * 2 * 256 * 2),  # Qwen3.5-35B-A3B
    "Gemma3Text": ({}, 2.6, 26 * 2 * 4 * 256 * 2),
    "Mixtral": ({}, 46.7, 32 * 2 * 8 * 128 * 2),  # Mixtral-8x7B
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_memory(name: str, tmp_path: Path) -> None:
    import transformers

    settings, billions, bytes_per_token = PUBLISHED[name]
    config = getattr(transformers, f"{name}Config")(**settings)
    config.architectures = [f"{name.removesuffix('Text')}ForCausalLM"]
    config.save_pretrained(tmp_path)
    model = create_model(load_config(tmp_path), torch.bfloat16, "meta", max_positions=64)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.06)
    assert sum(cache.bytes_per_token() for cache in kv_caches(model)) == bytes_per_token
