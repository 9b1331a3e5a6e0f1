"""Modules that predict one token more (MTP, DeepSeek-V3, arXiv:2412.19437, section 2.2), for a speculator to call.

Some checkpoints hold them beside the model: DeepSeek and GLM as further layers, Qwen3-Next and Qwen3.5 under `mtp.`.
The model itself passes them over.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from skyline.checkpoint.config import ModelConfig
from skyline.checkpoint.weights import Destination
from skyline.layers import LayerContext, Linear, destinations
from skyline.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from skyline.models.registry import resolve
from skyline.ops import AttentionBatch

_QWEN = {"enorm.": "pre_fc_norm_embedding.", "hnorm.": "pre_fc_norm_hidden.", "eh_proj.": "fc.", "post_norm.": "norm."}


class PredictionModule(nn.Module):
    """embedded [T, hidden], of each position's next token, and what the model made of it, [T, hidden] -> [T, hidden].

    The output goes through the model's own head, and is what a further module takes for the second. It has a cache of
    its own, of the kind that the model's layers have.
    """

    def __init__(self, config: ModelConfig, context: LayerContext, layer: type[LlamaDecoderLayer], index: int) -> None:
        super().__init__()
        # Its own layer is like the model's last.
        longer = dataclasses.replace(
            config,
            num_hidden_layers=index + 1,
            layer_kinds=[*config.layer_kinds, *["full_attention"] * (index + 1 - len(config.layer_kinds))],
            layer_windows=[*config.layer_windows, *[None] * (index + 1 - len(config.layer_windows))],
        )
        self.index = index
        self.block = layer(longer, index, context)
        self.enorm, self.hnorm, self.post_norm = (self.block.norm(config, context) for _ in range(3))
        self.eh_proj = Linear(context, 2 * config.hidden_size, config.hidden_size)
        self.named_as_qwen = config.model_type.startswith("qwen")
        self.first = config.num_hidden_layers

    def forward(
        self, embedded: Tensor, hidden: Tensor, positions: Tensor, batch: AttentionBatch, rope_table: Tensor
    ) -> Tensor:
        both = torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1)
        result: Tensor = self.post_norm(self.block(self.eh_proj(both), positions, batch, rope_table))
        return result

    def checkpoint_names(self) -> dict[str, Destination]:
        """Checkpoint name -> place in this module."""
        found = {}
        for name, place in destinations(self).items():
            if self.named_as_qwen:
                start = next((part for part in _QWEN if name.startswith(part)), None)
                inner = name.replace("block.", f"layers.{self.index - self.first}.", 1)
                found["mtp." + (_QWEN[start] + name.removeprefix(start) if start else inner)] = place
            else:
                inner = name.removeprefix("block.").replace("post_norm.", "shared_head.norm.")
                found[f"model.layers.{self.index}.{inner}"] = place
        return found


def prediction_modules(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> list[PredictionModule]:
    """The modules that a checkpoint with this config has, uninitialised; [] if it has none.

    Raises UnsupportedModelError for an architecture that is not supported.
    """
    model_class: type[LlamaForCausalLM] = resolve(config)
    fields = config.fields()
    count = fields.integer("num_nextn_predict_layers", 0, 64, fields.integer("mtp_num_hidden_layers", 0, 64, 0))
    context = LayerContext(dtype, torch.device(device))
    first = config.num_hidden_layers
    return [PredictionModule(config, context, model_class.layer_class, first + index).eval() for index in range(count)]
