"""DeepSeek V3, V3.1 and R1 (https://arxiv.org/abs/2412.19437): latent attention, and experts chosen by groups.

Every token also goes through the shared experts, which are one MLP. The first layers are dense. The checkpoint's last
layer, beyond num_hidden_layers, is the module that predicts one more token; it is not part of this model.
"""

from __future__ import annotations

from torch import Tensor, nn

from skyline import ops
from skyline.checkpoint.config import ModelConfig
from skyline.layers import MLP, Experts, LatentAttention, LayerContext, Router
from skyline.models.llama import LlamaDecoderLayer, LlamaForCausalLM


class DeepseekV3DecoderLayer(LlamaDecoderLayer):
    def attention(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        return LatentAttention(config, context)

    def feed_forward(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        if index < config.fields().integer("first_k_dense_replace", 0, 2**16, 0):
            return MLP(context, config.hidden_size, config.intermediate_size)
        return DeepseekV3MoE(config, context)


class DeepseekV3MoE(nn.Module):
    """x [T, hidden] -> [T, hidden]."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__()
        fields = config.fields()
        num_experts = fields.integer("n_routed_experts", 1, 2**16)
        inner = fields.integer("moe_intermediate_size", 1, 2**24)
        groups = fields.integer("n_group", 1, num_experts, 1)
        if num_experts % groups:
            raise fields.error("n_routed_experts", f"({num_experts}) must be a multiple of n_group ({groups})")
        self.gate = Router(
            context,
            config.hidden_size,
            num_experts,
            fields.integer("num_experts_per_tok", 1, num_experts),
            "sigmoid",
            renormalize=fields.boolean("norm_topk_prob", True),
            correction=True,
            factor=fields.number("routed_scaling_factor", 0.0, 1e6, 1.0),
            groups=groups,
            top_groups=fields.integer("topk_group", 1, groups, groups),
        )
        self.experts = Experts(context, config.hidden_size, inner, num_experts)
        shared = fields.integer("n_shared_experts", 0, 2**10, 0)
        self.shared_experts = MLP(context, config.hidden_size, shared * inner) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        chosen: Tensor = self.experts(x, *self.gate(x))
        return chosen if self.shared_experts is None else ops.add(chosen, self.shared_experts(x))


class DeepseekV3ForCausalLM(LlamaForCausalLM):
    layer_class = DeepseekV3DecoderLayer

    def __init__(self, config: ModelConfig, context: LayerContext, max_positions: int) -> None:
        super().__init__(config, context, max_positions)
        further = config.fields().integer("num_nextn_predict_layers", 0, 64, 0)
        last = config.num_hidden_layers
        self.ignored = tuple(f"model.layers.{layer}.*" for layer in range(last, last + further))
