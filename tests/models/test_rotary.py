"""The rotary table against transformers', with the settings of published checkpoints and at their longest positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from skyline.checkpoint.rope import read_rope
from skyline.layers import LayerContext, RotaryEmbedding

PUBLISHED: dict[str, tuple[int, int, dict[str, Any]]] = {  # head_dim, max_position_embeddings, rope_parameters
    "Llama-3": (128, 8192, dict(rope_type="default", rope_theta=500000.0)),
    "Llama-3.1-8B": (
        128,
        131072,
        dict(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "Llama-3.2-1B": (
        64,
        131072,
        dict(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "Qwen2.5-7B YaRN": (
        128,
        131072,
        dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768),
    ),
    "Qwen3-0.6B": (128, 40960, dict(rope_type="default", rope_theta=1e6)),
    "deepseek-coder linear": (128, 16384, dict(rope_type="linear", rope_theta=1e5, factor=4.0)),
    "gpt-oss YaRN": (
        64,
        131072,
        dict(
            rope_type="yarn",
            rope_theta=150000.0,
            factor=32.0,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
            original_max_position_embeddings=4096,
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_table_equals_transformers(name: str) -> None:
    head_dim, length, parameters = PUBLISHED[name]
    rope = read_rope({"rope_parameters": parameters}, "config.json", length)
    table = RotaryEmbedding(LayerContext(torch.float32, torch.device("cpu")), rope, head_dim, length).table
    assert table.shape == (length, head_dim) and table.dtype == torch.float32

    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=length, rope_parameters=parameters)
    positions = torch.cat((torch.arange(300), torch.arange(300, length, 997), torch.tensor([length - 1])))
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(0), positions.unsqueeze(0))
    expected = torch.cat((cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]), dim=-1)
    # One unit in the last place of a frequency is 1e-7 of the angle, which is up to the position itself.
    error = (table[positions] - expected).abs().amax(-1)
    assert torch.all(error <= 1e-6 + 1.2e-7 * positions), error.max()
    assert error[:300].max() < 2e-5
