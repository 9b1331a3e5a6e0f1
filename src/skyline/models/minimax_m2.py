"""MiniMax-M2 and M2.5 (https://www.minimax.io/news/minimax-m2): queries and keys normalised over all heads at once,
part of each head rotated, experts chosen by sigmoid and correction.
"""

from __future__ import annotations

from torch import Tensor, nn

from skyline import ops
from skyline.checkpoint.config import ModelConfig
from skyline.checkpoint.weights import Destination
from skyline.layers import Attention, Experts, LayerContext, Router
from skyline.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from skyline.ops import AttentionBatch


class MiniMaxM2DecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: ModelConfig, index: int, context: LayerContext) -> None:
        super().__init__(config, index, context)
        self.block_sparse_moe = self.mlp  # its name in the checkpoint
        del self.mlp

    def attention(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        return Attention(config, context, window=config.layer_windows[index], qk_norm="all")

    def feed_forward(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        return MiniMaxM2MoE(config, context)

    def forward(self, x: Tensor, positions: Tensor, batch: AttentionBatch, rope_table: Tensor) -> Tensor:
        x = ops.add(x, self.self_attn(self.input_layernorm(x), positions, batch, rope_table))
        x = ops.add(x, self.block_sparse_moe(self.post_attention_layernorm(x)))
        return x


class MiniMaxM2MoE(nn.Module):
    """x [T, hidden] -> [T, hidden]."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__()
        fields = config.fields()
        num_experts = fields.integer("num_local_experts", 1, 2**16)
        top_k = fields.integer("num_experts_per_tok", 1, num_experts)
        self.gate = _Router(
            context, config.hidden_size, num_experts, top_k, "sigmoid", renormalize=True, correction=True
        )
        names = ("w1", "w3", "w2")
        self.experts = Experts(context, config.hidden_size, config.intermediate_size, num_experts, names)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.experts(x, *self.gate(x))
        return result


class _Router(Router):
    """The checkpoint has the correction beside the router, not in it."""

    def checkpoint_tensors(self, path: str) -> dict[str, Destination]:
        assert self.e_score_correction_bias is not None
        block = path.rpartition(".")[0]
        return {
            f"{path}.weight": Destination(self.weight),
            f"{block}.e_score_correction_bias": Destination(self.e_score_correction_bias),
        }


class MiniMaxM2ForCausalLM(LlamaForCausalLM):
    layer_class = MiniMaxM2DecoderLayer
