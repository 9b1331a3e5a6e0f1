"""Mistral (https://arxiv.org/abs/2310.06825): Llama without biases, with a sliding window in every layer.

Later checkpoints (Mistral 7B v0.2 and on, Nemo) turn the window off, and Nemo's heads are smaller than hidden / heads;
both come from the config.
"""

from __future__ import annotations

from torch import nn

from skyline.checkpoint.config import ModelConfig
from skyline.layers import MLP, Attention, LayerContext
from skyline.models.llama import LlamaDecoderLayer, LlamaForCausalLM


class MistralDecoderLayer(LlamaDecoderLayer):
    def attention(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        return Attention(config, context, window=config.layer_windows[index])

    def feed_forward(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        return MLP(context, config.hidden_size, config.intermediate_size)


class MistralForCausalLM(LlamaForCausalLM):
    layer_class = MistralDecoderLayer
