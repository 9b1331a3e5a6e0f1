"""Qwen3 (https://arxiv.org/abs/2505.09388): each head of q and k is normalised before it is rotated; no biases."""

from __future__ import annotations

from torch import nn

from skyline.checkpoint.config import ModelConfig
from skyline.layers import MLP, Attention, LayerContext
from skyline.models.llama import LlamaDecoderLayer, LlamaForCausalLM


class Qwen3DecoderLayer(LlamaDecoderLayer):
    def attention(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        bias = config.attention_bias  # false in every published checkpoint
        window = config.layer_windows[index]
        return Attention(config, context, window=window, qkv_bias=bias, output_bias=bias, qk_norm="head")

    def feed_forward(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        return MLP(context, config.hidden_size, config.intermediate_size)


class Qwen3ForCausalLM(LlamaForCausalLM):
    layer_class = Qwen3DecoderLayer
