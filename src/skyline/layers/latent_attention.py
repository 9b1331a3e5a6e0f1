"""Multi-head latent attention (MLA), and the indexer that makes it sparse."""

from __future__ import annotations

from torch import Tensor, nn

from skyline import ops
from skyline.checkpoint.config import ModelConfig
from skyline.layers.basic import LayerNorm, RMSNorm
from skyline.layers.context import LayerContext
from skyline.layers.linear import Linear, MergedLinear
from skyline.layers.rotary import logit_factor
from skyline.ops import AttentionBatch, IndexCache, LatentCache

_EPS = 1e-6  # of the norms in here, whatever the config says of the others


class LatentAttention(nn.Module):
    """x [T, hidden] -> [T, hidden] (DeepSeek-V2, arXiv:2405.04434, section 2.1). Names as in the checkpoint.

    Queries come from a latent of q_lora_rank, where there is one; keys and values from one of kv_lora_rank, which is
    what is cached. `indexer`: each query sees only the tokens that the lightning indexer chooses for it.
    """

    def __init__(self, config: ModelConfig, context: LayerContext, indexer: bool = False) -> None:
        super().__init__()
        fields = config.fields()
        hidden, self.heads = config.hidden_size, config.num_attention_heads
        self.rank = fields.integer("kv_lora_rank", 1, 2**16)
        self.rope_dim = fields.integer("qk_rope_head_dim", 2, 2**14)
        plain = fields.integer("qk_nope_head_dim", 1, 2**14)
        self.value_dim = fields.integer("v_head_dim", 1, 2**14)
        self.interleaved = fields.boolean("rope_interleave", True)
        self.q_rank = fields.optional_integer("q_lora_rank", 1, 2**20)
        self.head_dim = plain + self.rope_dim
        self.scale = self.head_dim**-0.5 * logit_factor(config.rope)
        bias = config.attention_bias
        # What reads the same input is one product. That of x stays dense in a quantized model with an indexer, whose
        # weights are in it (skyline.graph.quantize): some bytes more, and a launch and a quantization of x less.
        inputs = {"kv_a_proj_with_mqa": self.rank + self.rope_dim}
        queries = {"q_b_proj": self.heads * self.head_dim}
        self.indexer = Indexer(config, context) if indexer else None
        if self.indexer is not None:
            if self.q_rank is None:
                raise fields.error("q_lora_rank", "is missing; the indexer needs it")
            if bias:
                raise fields.error("attention_bias", "is not supported beside an indexer, whose projections have none")
            inputs |= {"indexer.wk": self.indexer.size, "indexer.weights_proj": self.indexer.heads}
            queries |= {"indexer.wq_b": self.indexer.heads * self.indexer.size}
        if self.q_rank is None:
            self.q_proj = Linear(context, hidden, self.heads * self.head_dim)
            self.kv_a_proj = MergedLinear(context, hidden, inputs, bias)
        else:
            self.qkv_a_proj = MergedLinear(context, hidden, {"q_a_proj": self.q_rank, **inputs}, bias)
            self.q_a_layernorm = RMSNorm(context, self.q_rank, _EPS)
            self.q_b_proj = MergedLinear(context, self.q_rank, queries)
        self.kv_a_layernorm = RMSNorm(context, self.rank, _EPS)
        self.kv_b_proj = Linear(context, self.rank, self.heads * (plain + self.value_dim))
        self.o_proj = Linear(context, self.heads * self.value_dim, hidden, bias)
        self.cache = LatentCache(self.rank, self.rope_dim, context.dtype)

    def forward(self, x: Tensor, positions: Tensor, batch: AttentionBatch, rope_table: Tensor) -> Tensor:
        chosen = None
        if self.q_rank is None:
            q = self.q_proj(x)
            latent, k = ops.split(self.kv_a_proj(x), (self.rank, self.rope_dim))
        elif self.indexer is None:
            q_latent, latent, k = ops.split(self.qkv_a_proj(x), (self.q_rank, self.rank, self.rope_dim))
            q = self.q_b_proj(self.q_a_layernorm(q_latent))
        else:
            size, heads = self.indexer.size, self.indexer.heads
            parts = (self.q_rank, self.rank, self.rope_dim, size, heads)
            q_latent, latent, k, index_k, index_weights = ops.split(self.qkv_a_proj(x), parts)
            both = self.q_b_proj(self.q_a_layernorm(q_latent))
            q, index_q = ops.split(both, (self.heads * self.head_dim, heads * size))
            chosen = self.indexer(index_q, index_k, index_weights, positions, batch, rope_table)
        q = ops.latent_rope_write(
            q, self.kv_a_layernorm(latent), k, positions, rope_table, self.head_dim, self.cache, batch, self.interleaved
        )
        found = ops.latent_attention(
            q, self.kv_b_proj.weight, self.cache, batch, self.heads, self.value_dim, self.scale, chosen
        )
        attended: Tensor = self.o_proj(found)
        return attended


class Indexer(nn.Module):
    """q [T, heads * size], k [T, size], weights [T, heads] -> the positions to attend to, [T, index_topk] int32.

    Its projections are rows of those of the attention it belongs to.
    """

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__()
        fields = config.fields()
        self.heads = fields.integer("index_n_heads", 1, 2**12)
        self.size = fields.integer("index_head_dim", 2, 2**14)
        self.top_k = fields.integer("index_topk", 1, 2**24)
        if self.size < config.head_dim:
            raise fields.error("index_head_dim", f"({self.size}) must be at least qk_rope_head_dim ({config.head_dim})")
        self.scale = (self.size * self.heads) ** -0.5
        self.k_norm = LayerNorm(context, self.size, _EPS)
        self.cache = IndexCache(self.size, context.dtype)

    def forward(
        self, q: Tensor, k: Tensor, weights: Tensor, positions: Tensor, batch: AttentionBatch, rope_table: Tensor
    ) -> Tensor:
        chosen: Tensor = ops.index_topk(
            q, self.k_norm(k), weights, positions, rope_table, self.cache, batch, self.top_k, self.scale
        )
        return chosen
