"""DeepSeek V3.2 (https://arxiv.org/abs/2512.02556): V3 whose queries attend to the tokens that an indexer chooses."""

from __future__ import annotations

from torch import nn

from skyline.checkpoint.config import ModelConfig
from skyline.layers import LatentAttention, LayerContext
from skyline.models.deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3ForCausalLM


class DeepseekV32DecoderLayer(DeepseekV3DecoderLayer):
    def attention(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        return LatentAttention(config, context, indexer=True)


class DeepseekV32ForCausalLM(DeepseekV3ForCausalLM):
    layer_class = DeepseekV32DecoderLayer
    layer_kinds = ("full_attention", "sliding_attention", "indexed_attention")
