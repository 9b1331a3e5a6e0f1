"""Qwen2 and Qwen2.5 (https://arxiv.org/abs/2412.15115): Llama with biases on q, k and v only.

The biases are part of the architecture; no config key asks for them. A sliding window, where a checkpoint uses one,
holds for the layers from `max_window_layers` on.
"""

from __future__ import annotations

from torch import nn

from skyline.checkpoint.config import ModelConfig
from skyline.layers import MLP, Attention, LayerContext
from skyline.models.llama import LlamaDecoderLayer, LlamaForCausalLM


class Qwen2DecoderLayer(LlamaDecoderLayer):
    def attention(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        return Attention(config, context, window=config.layer_windows[index], qkv_bias=True)

    def feed_forward(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        return MLP(context, config.hidden_size, config.intermediate_size)


class Qwen2ForCausalLM(LlamaForCausalLM):
    layer_class = Qwen2DecoderLayer
