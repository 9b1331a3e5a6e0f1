"""gpt-oss (https://arxiv.org/abs/2508.10925): windows in every other layer, sinks, and experts with biases.

A router's weights are the softmax over the chosen experts alone. The experts' activation is a SwiGLU that is clamped.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skyline import ops
from skyline.checkpoint.config import ModelConfig
from skyline.checkpoint.weights import Destination
from skyline.layers import Attention, LayerContext, Router
from skyline.models.llama import LlamaDecoderLayer, LlamaForCausalLM


class GptOssDecoderLayer(LlamaDecoderLayer):
    def attention(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        bias = config.attention_bias
        window = config.layer_windows[index]
        return Attention(config, context, window=window, qkv_bias=bias, output_bias=bias, sinks=True)

    def feed_forward(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        return GptOssMLP(config, context)


class GptOssMLP(nn.Module):
    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__()
        fields = config.fields()
        num_experts = fields.integer("num_local_experts", 1, 2**16)
        top_k = fields.integer("num_experts_per_tok", 1, num_experts)
        self.router = Router(context, config.hidden_size, num_experts, top_k, "softmax of the chosen", bias=True)
        self.experts = GptOssExperts(config, context, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.experts(x, *self.router(x))
        return result


class GptOssExperts(nn.Module):
    """`gate_up` [E, 2 * intermediate, hidden], gate first, `down` [E, hidden, intermediate], and their biases.

    The checkpoint has all experts in one tensor, transposed, with gate and up in turns: `gate_up_proj` [E, hidden,
    2 * intermediate] and `gate_up_proj_bias`, `down_proj` [E, intermediate, hidden] and `down_proj_bias`.
    """

    def __init__(self, config: ModelConfig, context: LayerContext, num_experts: int) -> None:
        super().__init__()
        fields = config.fields()
        self.alpha = fields.number("swiglu_alpha", 0.0, 1e3, 1.702)
        self.limit = fields.number("swiglu_limit", 0.0, 1e6, 7.0)
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = context.parameter(num_experts, 2 * inner, hidden)
        self.gate_up_bias = context.parameter(num_experts, 2 * inner)
        self.down = context.parameter(num_experts, hidden, inner)
        self.down_bias = context.parameter(num_experts, hidden)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        result: Tensor = ops.moe_experts_clamped(
            x, self.gate_up, self.gate_up_bias, self.down, self.down_bias, weights, ids, self.alpha, self.limit
        )
        return result

    def checkpoint_tensors(self, path: str) -> dict[str, Destination]:
        def sorted_rows(entry: Tensor) -> Tensor:
            """[hidden, 2I] or [2I], gate and up in turns -> [2I, hidden] or [2I], gate first."""
            rows = entry.t() if entry.dim() == 2 else entry
            return torch.cat((rows[0::2], rows[1::2]))

        return {
            f"{path}.gate_up_proj": Destination(self.gate_up, sorted_rows, by_entry=True),
            f"{path}.gate_up_proj_bias": Destination(self.gate_up_bias, sorted_rows, by_entry=True),
            f"{path}.down_proj": Destination(self.down, lambda entry: entry.t(), by_entry=True),
            f"{path}.down_proj_bias": Destination(self.down_bias),
        }


class GptOssForCausalLM(LlamaForCausalLM):
    layer_class = GptOssDecoderLayer
