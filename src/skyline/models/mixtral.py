"""Mixtral (https://arxiv.org/abs/2401.04088): Mistral whose MLP is a mixture of experts."""

from __future__ import annotations

from torch import nn

from skyline.checkpoint.config import ModelConfig
from skyline.layers import Attention, LayerContext, MoE
from skyline.models.llama import LlamaForCausalLM
from skyline.models.minimax_m2 import MiniMaxM2DecoderLayer


class MixtralDecoderLayer(MiniMaxM2DecoderLayer):
    def attention(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        return Attention(config, context, window=config.layer_windows[index])

    def feed_forward(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        fields = config.fields()
        num_experts = fields.integer("num_local_experts", 1, 2**16)
        top_k = fields.integer("num_experts_per_tok", 1, num_experts)
        inner = config.intermediate_size
        return MoE(context, config.hidden_size, inner, num_experts, top_k, renormalize=True, names=("w1", "w3", "w2"))


class MixtralForCausalLM(LlamaForCausalLM):
    layer_class = MixtralDecoderLayer
