"""Which class is which architecture, and what a checkpoint may ask of it."""

from __future__ import annotations

import difflib
import importlib

import torch
from torch import nn

from skyline.checkpoint.config import ModelConfig
from skyline.checkpoint.errors import CheckpointError
from skyline.layers import LayerContext
from skyline.models.llama import LlamaForCausalLM
from skyline.ops import LayerCache

# Name in config.json's "architectures" -> "module:Class". Imported only when a checkpoint asks for it.
MODELS: dict[str, str] = {
    "DeepseekV3ForCausalLM": "skyline.models.deepseek_v3:DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM": "skyline.models.deepseek_v32:DeepseekV32ForCausalLM",
    "Gemma3ForCausalLM": "skyline.models.gemma3:Gemma3ForCausalLM",
    "Glm4MoeForCausalLM": "skyline.models.glm4_moe:Glm4MoeForCausalLM",
    "GptOssForCausalLM": "skyline.models.gpt_oss:GptOssForCausalLM",
    "LlamaForCausalLM": "skyline.models.llama:LlamaForCausalLM",
    "MiniMaxM2ForCausalLM": "skyline.models.minimax_m2:MiniMaxM2ForCausalLM",
    "MistralForCausalLM": "skyline.models.mistral:MistralForCausalLM",
    "MixtralForCausalLM": "skyline.models.mixtral:MixtralForCausalLM",
    "Qwen2ForCausalLM": "skyline.models.qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "skyline.models.qwen3:Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "skyline.models.qwen3_moe:Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM": "skyline.models.qwen3_next:Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM": "skyline.models.qwen3_5:Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM": "skyline.models.qwen3_5:Qwen3_5MoeForCausalLM",
}


class UnsupportedModelError(CheckpointError):
    """The checkpoint is fine, but this version of Skyline cannot run it. The message says what stands in the way."""


def resolve(config: ModelConfig) -> type[LlamaForCausalLM]:
    """The model class of config.architecture. Raises UnsupportedModelError, naming the nearest, if there is none."""
    target = MODELS.get(config.architecture)
    if target is None:
        nearest = difflib.get_close_matches(config.architecture, MODELS, n=1, cutoff=0.0)[0]
        raise UnsupportedModelError(
            f"architecture {config.architecture!r} is not supported; the nearest supported one is {nearest}. "
            f"Supported: {', '.join(MODELS)}"
        )
    module, _, name = target.partition(":")
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, type) and issubclass(found, LlamaForCausalLM)
    return found


def create_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    max_positions: int | None = None,
    allocate: bool = True,
) -> nn.Module:
    """The model with uninitialised parameters; fill them by `load(weights, destinations(model))` or `randomize(model)`.

    Its forward takes (input_ids [T] int64, positions [T] int64, AttentionBatch, logit_rows [R] int64) and returns
    logits [R, vocab]. Positions must be below `max_positions` (default: the checkpoint's max_position_embeddings); more
    may be asked for, where the rotary embedding allows it. Device "meta" gives shapes without memory; `allocate` False
    gives everything but the parameters, which are then on the meta device.

    Raises UnsupportedModelError if the config asks for something that this version would have to ignore.
    """
    model_class = resolve(config)
    positions = max_positions or config.max_position_embeddings
    _refuse_unsupported(config, model_class, positions)
    model: nn.Module = model_class(config, LayerContext(dtype, torch.device(device), allocate), positions)
    return model.eval()


def kv_caches(model: nn.Module) -> list[LayerCache]:
    """Every cache of every layer, in the order of the layers. Their `allocate` is still to be called."""
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, LayerCache)]


def _refuse_unsupported(config: ModelConfig, model_class: type[LlamaForCausalLM], positions: int) -> None:
    if config.hidden_act not in model_class.activations:
        raise UnsupportedModelError(
            f"hidden_act {config.hidden_act!r} is not supported for {config.architecture}; only "
            f"{model_class.activations[0]} is"
        )
    for kind in config.layer_kinds:
        if kind not in model_class.layer_kinds:
            raise UnsupportedModelError(f"layers of {kind} are not supported for {config.architecture}")
    if config.rope.type == "dynamic" and positions > config.max_position_embeddings:
        raise UnsupportedModelError(
            f"rope type 'dynamic' is supported up to max_position_embeddings = {config.max_position_embeddings} "
            f"positions, not {positions}: beyond that, old keys would have to be rotated anew for every new length"
        )
