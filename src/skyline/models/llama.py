"""Llama 3.x (https://arxiv.org/abs/2407.21783), and the skeleton of every decoder like it.

A token's row runs down the page: embedding, then in each layer attention and MLP, both fed by a norm and added to the
residual stream, then a last norm and the output head. A related architecture subclasses the decoder layer, overrides
`attention` or `feed_forward`, and names its layer class in the model. Module paths are the checkpoint's tensor names.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from skyline import ops
from skyline.checkpoint.config import ModelConfig
from skyline.layers import MLP, Attention, Embedding, LayerContext, Linear, RMSNorm, RotaryEmbedding
from skyline.ops import AttentionBatch


class LlamaDecoderLayer(nn.Module):
    """x [T, hidden] -> [T, hidden]."""

    def __init__(self, config: ModelConfig, index: int, context: LayerContext) -> None:
        super().__init__()
        self.input_layernorm = self.norm(config, context)
        self.self_attn = self.attention(config, index, context)
        self.post_attention_layernorm = self.norm(config, context)
        self.mlp = self.feed_forward(config, index, context)

    def norm(self, config: ModelConfig, context: LayerContext) -> RMSNorm:
        return RMSNorm(context, config.hidden_size, config.rms_norm_eps)

    def attention(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        bias = config.attention_bias
        return Attention(config, context, window=config.layer_windows[index], qkv_bias=bias, output_bias=bias)

    def feed_forward(self, config: ModelConfig, index: int, context: LayerContext) -> nn.Module:
        return MLP(context, config.hidden_size, config.intermediate_size, config.mlp_bias)

    def forward(self, x: Tensor, positions: Tensor, batch: AttentionBatch, rope_table: Tensor) -> Tensor:
        x = ops.add(x, self.self_attn(self.input_layernorm(x), positions, batch, rope_table))
        x = ops.add(x, self.mlp(self.post_attention_layernorm(x)))
        return x


class LlamaModel(nn.Module):
    """Everything below the output head. `max_positions`: rows of the rotary tables."""

    def __init__(
        self,
        config: ModelConfig,
        context: LayerContext,
        max_positions: int,
        layer_class: type[LlamaDecoderLayer],
        embedding_scale: float | None,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(context, config.vocab_size, config.hidden_size, embedding_scale)
        self.rotary_emb = RotaryEmbedding(context, config.rope, config.head_dim, max_positions)
        self.rotary_emb_local = None  # of layers with a window, where it is another one
        if config.local_rope is not None:
            self.rotary_emb_local = RotaryEmbedding(context, config.local_rope, config.head_dim, max_positions)
        self.local = [kind == "sliding_attention" for kind in config.layer_kinds]
        self.layers = nn.ModuleList(layer_class(config, index, context) for index in range(config.num_hidden_layers))
        first = self.layers[0]
        assert isinstance(first, LlamaDecoderLayer)
        self.norm = first.norm(config, context)

    def forward(self, input_ids: Tensor, positions: Tensor, batch: AttentionBatch, logit_rows: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(input_ids)
        for layer, local in zip(self.layers, self.local, strict=True):
            rotary = self.rotary_emb_local if local and self.rotary_emb_local is not None else self.rotary_emb
            x = layer(x, positions, batch, rotary.table)
        x = self.norm(ops.select_rows(x, logit_rows))  # nobody needs the other rows any more
        return x


class LlamaForCausalLM(nn.Module):
    """Token ids to logits.

    layer_class: makes the layers, and says what is between them. layer_kinds: what `layer_types` of config.json may
    name. activations: what `hidden_act` may. ignored: fnmatch patterns of checkpoint tensors that are not for this.
    """

    layer_class: ClassVar[type[LlamaDecoderLayer]] = LlamaDecoderLayer
    layer_kinds: ClassVar[tuple[str, ...]] = ("full_attention", "sliding_attention")
    activations: ClassVar[tuple[str, ...]] = ("silu", "swish")  # two names of one function
    ignored: tuple[str, ...] = ()

    def __init__(self, config: ModelConfig, context: LayerContext, max_positions: int) -> None:
        super().__init__()
        scale = self.embedding_scale(config)
        self.model = LlamaModel(config, context, max_positions, self.layer_class, scale)
        tied = self.model.embed_tokens.weight if config.tie_word_embeddings else None
        self.lm_head = Linear(context, config.hidden_size, config.vocab_size, weight=tied)

    def embedding_scale(self, config: ModelConfig) -> float | None:
        return None

    def forward(self, input_ids: Tensor, positions: Tensor, batch: AttentionBatch, logit_rows: Tensor) -> Tensor:
        """input_ids, positions [T] int64, logit_rows [R] int64 (which of the T tokens) -> logits [R, vocab]."""
        logits: Tensor = self.lm_head(self.model(input_ids, positions, batch, logit_rows))
        return logits
