"""Gemma 3 (https://arxiv.org/abs/2503.19786): five layers with a window to one without, each with four norms.

Norm weights are stored less one; embeddings are scaled by the root of their size. Layers with a window have a rotary
embedding of their own, which is never stretched.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from skyline import ops
from skyline.checkpoint.config import ModelConfig
from skyline.layers import MLP, Attention, LayerContext, RMSNorm
from skyline.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from skyline.ops import AttentionBatch


class Gemma3DecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: ModelConfig, index: int, context: LayerContext) -> None:
        super().__init__(config, index, context)
        self.pre_feedforward_layernorm = self.norm(config, context)
        self.post_feedforward_layernorm = self.norm(config, context)

    def norm(self, config: ModelConfig, context: LayerContext) -> RMSNorm:
        return RMSNorm(context, config.hidden_size, config.rms_norm_eps, offset=True)

    def attention(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        fields = config.fields()
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if key in fields:
                raise fields.error(key, "is not supported; Gemma 3 has none")
        if fields.boolean("use_bidirectional_attention", False):
            raise fields.error("use_bidirectional_attention", "is not supported: this is a decoder")
        bias = config.attention_bias
        return Attention(
            config,
            context,
            window=config.layer_windows[index],
            qkv_bias=bias,
            output_bias=bias,
            qk_norm="head",
            offset_norm=True,
            scale=fields.number("query_pre_attn_scalar", 1.0, 1e6, 256.0) ** -0.5,
        )

    def feed_forward(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        return MLP(context, config.hidden_size, config.intermediate_size, gelu=True)

    def forward(self, x: Tensor, positions: Tensor, batch: AttentionBatch, rope_table: Tensor) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), positions, batch, rope_table)
        x = ops.add(x, self.post_attention_layernorm(attended))
        x = ops.add(x, self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))))
        return x


class Gemma3ForCausalLM(LlamaForCausalLM):
    layer_class = Gemma3DecoderLayer
    activations = ("gelu_pytorch_tanh",)

    def embedding_scale(self, config: ModelConfig) -> float | None:
        return math.sqrt(config.hidden_size)
