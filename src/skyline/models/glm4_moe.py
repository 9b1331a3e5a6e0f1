"""GLM-4.5 and 4.6 (https://arxiv.org/abs/2508.06471): grouped-query attention, half of each head rotated, and the
experts of DeepSeek V3.
"""

from __future__ import annotations

from torch import nn

from skyline.checkpoint.config import ModelConfig
from skyline.layers import Attention, LayerContext
from skyline.models.deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3ForCausalLM


class Glm4MoeDecoderLayer(DeepseekV3DecoderLayer):
    def attention(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        norm = config.fields().boolean("use_qk_norm", False)
        return Attention(config, context, qkv_bias=config.attention_bias, qk_norm="head" if norm else None)


class Glm4MoeForCausalLM(DeepseekV3ForCausalLM):
    layer_class = Glm4MoeDecoderLayer
