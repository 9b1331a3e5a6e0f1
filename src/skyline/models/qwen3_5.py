"""Qwen3.5 (https://qwen.ai/blog?id=qwen3.5), dense and MoE: Qwen3-Next with the delta-net's projections kept apart.

The checkpoints also see; what is built here is their language model.
"""

from __future__ import annotations

from torch import nn

from skyline.checkpoint.config import ModelConfig
from skyline.layers import MLP, LayerContext
from skyline.models.qwen3_next import Qwen3NextDecoderLayer, Qwen3NextForCausalLM, Qwen3NextMoE


class Qwen3_5DecoderLayer(Qwen3NextDecoderLayer):
    grouped = False

    def feed_forward(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        return MLP(context, config.hidden_size, config.intermediate_size)


class Qwen3_5ForCausalLM(Qwen3NextForCausalLM):
    layer_class = Qwen3_5DecoderLayer


class Qwen3_5MoeDecoderLayer(Qwen3_5DecoderLayer):
    def feed_forward(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        return Qwen3NextMoE(config, context, config.fields().integer("num_experts", 1, 2**16))


class Qwen3_5MoeForCausalLM(Qwen3_5ForCausalLM):
    layer_class = Qwen3_5MoeDecoderLayer
