"""Causal self-attention over paged KV memory."""

from __future__ import annotations

from torch import Tensor, nn

from skyline import ops
from skyline.checkpoint.config import ModelConfig
from skyline.layers.basic import RMSNorm
from skyline.layers.context import LayerContext
from skyline.layers.linear import Linear, MergedLinear
from skyline.ops import AttentionBatch, KVCache


class Attention(nn.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245) with rotary positions. x [T, hidden] -> [T, hidden].

    `window`: sliding window in tokens, None for full attention. `qk_norm`: RMSNorm on each head of q and k before they
    are rotated. `cache` is this layer's KV memory; it has no tensors until the runner allocates them.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: LayerContext,
        *,
        window: int | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.window = window
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.sizes = (q_size, kv_size, kv_size)
        self.qkv_proj = MergedLinear(
            context, config.hidden_size, {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}, qkv_bias
        )
        self.q_norm = RMSNorm(context, config.head_dim, config.rms_norm_eps, per_head=True) if qk_norm else None
        self.k_norm = RMSNorm(context, config.head_dim, config.rms_norm_eps, per_head=True) if qk_norm else None
        self.o_proj = Linear(context, q_size, config.hidden_size, output_bias)
        self.cache = KVCache(config.num_key_value_heads, config.head_dim, context.dtype)

    def forward(self, x: Tensor, positions: Tensor, batch: AttentionBatch, rope_table: Tensor) -> Tensor:
        q, k, v = ops.split(self.qkv_proj(x), self.sizes)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = ops.rope(q, k, positions, rope_table, self.head_dim)
        ops.kv_write(k, v, self.cache, batch)
        attended: Tensor = self.o_proj(ops.paged_attention(q, self.cache, batch, self.scale, self.window))
        return attended
