"""Qwen3-Next (https://qwen.ai/blog?id=qwen3-next): three layers of gated delta-net to one of gated attention.

Norm weights are stored less one, a quarter of each head is rotated, and the experts have a shared one with a gate.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from skyline import ops
from skyline.checkpoint.config import ModelConfig
from skyline.layers import MLP, Attention, GatedDeltaNet, LayerContext, Linear, MoE, RMSNorm
from skyline.models.llama import LlamaForCausalLM
from skyline.models.qwen3_moe import Qwen3MoeDecoderLayer
from skyline.ops import AttentionBatch


class Qwen3NextDecoderLayer(Qwen3MoeDecoderLayer):
    grouped: ClassVar[bool] = True  # the rows of the delta-net's projections are sorted by key head

    def __init__(self, config: ModelConfig, index: int, context: LayerContext) -> None:
        super().__init__(config, index, context)
        self.linear = config.layer_kinds[index] == "linear_attention"
        if self.linear:
            self.linear_attn = self.self_attn  # its name in the checkpoint
            del self.self_attn

    def norm(self, config: ModelConfig, context: LayerContext) -> RMSNorm:
        return RMSNorm(context, config.hidden_size, config.rms_norm_eps, offset=True)

    def attention(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        if config.layer_kinds[index] == "linear_attention":
            return GatedDeltaNet(config, context, self.grouped)
        bias = config.attention_bias
        return Attention(config, context, qkv_bias=bias, output_bias=bias, qk_norm="head", offset_norm=True, gated=True)

    def moe(self, config: ModelConfig, context: LayerContext, num_experts: int) -> nn.Module:
        return Qwen3NextMoE(config, context, num_experts)

    def forward(self, x: Tensor, positions: Tensor, batch: AttentionBatch, rope_table: Tensor) -> Tensor:
        mixer = self.linear_attn if self.linear else self.self_attn
        x = ops.add(x, mixer(self.input_layernorm(x), positions, batch, rope_table))
        x = ops.add(x, self.mlp(self.post_attention_layernorm(x)))
        return x


class Qwen3NextMoE(MoE):
    """x [T, hidden] -> [T, hidden]: the chosen experts, and a shared one times the sigmoid of its own gate."""

    def __init__(self, config: ModelConfig, context: LayerContext, num_experts: int) -> None:
        fields = config.fields()
        super().__init__(
            context,
            config.hidden_size,
            intermediate_size=fields.integer("moe_intermediate_size", 1, 2**24),
            num_experts=num_experts,
            top_k=fields.integer("num_experts_per_tok", 1, num_experts),
            renormalize=fields.boolean("norm_topk_prob", True),
        )
        inner = fields.integer("shared_expert_intermediate_size", 1, 2**24)
        self.shared_expert = MLP(context, config.hidden_size, inner)
        self.shared_expert_gate = Linear(context, config.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        shared = ops.sigmoid_mul(self.shared_expert(x), self.shared_expert_gate(x))
        result: Tensor = ops.add(super().forward(x), shared)
        return result


class Qwen3NextForCausalLM(LlamaForCausalLM):
    layer_class = Qwen3NextDecoderLayer
    layer_kinds = ("full_attention", "linear_attention")
    ignored: tuple[str, ...] = ("mtp.*",)
