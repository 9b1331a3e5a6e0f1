"""Causal self-attention over paged KV memory."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from skyline import ops
from skyline.checkpoint.config import ModelConfig
from skyline.layers.basic import RMSNorm
from skyline.layers.context import LayerContext
from skyline.layers.linear import Linear, MergedLinear
from skyline.ops import AttentionBatch, KVCache


class Attention(nn.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245) with rotary positions. x [T, hidden] -> [T, hidden].

    `window`: sliding window in tokens, None for full attention. `qk_norm`: RMSNorm on q and k before they are rotated,
    on each head ("head") or on all of them together ("all"); `offset_norm`: as in RMSNorm. `sinks`: each head's softmax
    has one more logit, which is learned and attends to nothing. `gated`: what each head gives is multiplied by the
    sigmoid of a gate, which the checkpoint's q_proj holds behind each head's query. `scale`: of q . k, by default
    head_dim ** -0.5. `cache` is this layer's KV memory; it has no tensors until the runner allocates them.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: LayerContext,
        *,
        window: int | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm: Literal["head", "all"] | None = None,
        offset_norm: bool = False,
        sinks: bool = False,
        gated: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        size, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = size
        self.scale = size**-0.5 if scale is None else scale
        self.window = window
        self.gated = gated
        q_size, kv_size = heads * size, kv_heads * size
        self.sizes = (q_size, kv_size, kv_size)
        outputs = {"q_proj": 2 * q_size if gated else q_size, "k_proj": kv_size, "v_proj": kv_size}
        places = None
        if gated:  # q | k | v | gate here
            gate = q_size + 2 * kv_size
            runs = [run for head in range(heads) for run in ((head * size, size), (gate + head * size, size))]
            places = {"q_proj": runs, "k_proj": [(q_size, kv_size)], "v_proj": [(q_size + kv_size, kv_size)]}
        self.qkv_proj = MergedLinear(context, config.hidden_size, outputs, qkv_bias, places)

        def norm(whole: int) -> RMSNorm | None:
            each = qk_norm == "head"
            width = size if each else whole
            return RMSNorm(context, width, config.rms_norm_eps, each, offset_norm) if qk_norm is not None else None

        self.q_norm, self.k_norm = norm(q_size), norm(kv_size)
        self.sinks = context.parameter(heads) if sinks else None
        self.o_proj = Linear(context, q_size, config.hidden_size, output_bias)
        self.cache = KVCache(kv_heads, size, context.dtype, window=window)

    def forward(self, x: Tensor, positions: Tensor, batch: AttentionBatch, rope_table: Tensor) -> Tensor:
        projected = self.qkv_proj(x)
        gate = None
        if self.gated:
            projected, gate = ops.split(projected, (sum(self.sizes), self.sizes[0]))
        q, k, v = ops.split(projected, self.sizes)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = ops.rope(q, k, positions, rope_table, self.head_dim)
        ops.kv_write(k, v, self.cache, batch)
        heads = ops.paged_attention(q, self.cache, batch, self.scale, self.window, self.sinks)
        if gate is not None:
            heads = ops.sigmoid_mul(heads, gate)
        attended: Tensor = self.o_proj(heads)
        return attended
