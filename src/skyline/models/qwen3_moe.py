"""Qwen3-MoE (https://arxiv.org/abs/2505.09388): Qwen3 whose MLP is a mixture of experts in all or some layers."""

from __future__ import annotations

from torch import nn

from skyline.checkpoint.config import ModelConfig
from skyline.layers import MLP, LayerContext, MoE
from skyline.models.llama import LlamaForCausalLM
from skyline.models.qwen3 import Qwen3DecoderLayer


class Qwen3MoeDecoderLayer(Qwen3DecoderLayer):
    def feed_forward(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        fields = config.fields()
        # transformers 5 writes num_local_experts, the checkpoints on the hub have num_experts.
        experts_key = "num_experts" if "num_experts" in fields else "num_local_experts"
        num_experts = fields.integer(experts_key, 0, 2**16)
        every = fields.integer("decoder_sparse_step", 1, 2**16, 1)
        dense_layers = config.get("mlp_only_layers", [])
        if not isinstance(dense_layers, list):
            raise fields.error("mlp_only_layers", "must be a list of layer numbers")
        if index in dense_layers or num_experts == 0 or (index + 1) % every:
            return MLP(context, config.hidden_size, config.intermediate_size)
        return self.moe(config, context, num_experts)

    def moe(self, config: ModelConfig, context: LayerContext, num_experts: int) -> nn.Module:
        fields = config.fields()
        return MoE(
            context,
            config.hidden_size,
            intermediate_size=fields.integer("moe_intermediate_size", 1, 2**24),
            num_experts=num_experts,
            top_k=fields.integer("num_experts_per_tok", 1, num_experts),
            renormalize=fields.boolean("norm_topk_prob", False),
        )


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    layer_class = Qwen3MoeDecoderLayer
