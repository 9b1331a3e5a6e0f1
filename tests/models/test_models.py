"""What is around the architectures: choosing one, refusing what cannot be run, and getting weights into it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from skyline.checkpoint.config import ModelConfig, load_config
from skyline.checkpoint.errors import CheckpointError
from skyline.graph import capture
from skyline.models import (
    MODELS,
    UnsupportedModelError,
    create_model,
    destinations,
    ignorable,
    kv_caches,
    randomize,
    resolve,
)

from .families import FAMILIES
from .harness import CPU, PagedRunner, load_ours, save_tiny

_MOE = dict(head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[0])
_FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": dict(attention_bias=True, mlp_bias=True),
    "Mistral": {},
    "Qwen2": dict(tie_word_embeddings=True),
    "Qwen3": dict(head_dim=16),
    "Qwen3Moe": _MOE,
    **FAMILIES,
}


@pytest.fixture
def llama(tmp_path: Path) -> ModelConfig:
    save_tiny(tmp_path, "Llama")
    return load_config(tmp_path)


# Choosing and refusing


def test_every_registered_model_resolves(llama: ModelConfig) -> None:
    for architecture in MODELS:
        assert resolve(dataclasses.replace(llama, architecture=architecture)).__name__ == architecture


@pytest.mark.parametrize(
    "asked, nearest",
    [
        ("Qwen2MoeForCausalLM", "Qwen"),
        ("Ministral3ForCausalLM", "Mistral"),
        ("T5", ""),
        ("LlamaModel", "Llama"),
        ("", ""),
    ],
)
def test_unknown_architecture_names_the_nearest_and_all(asked: str, nearest: str, llama: ModelConfig) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        resolve(dataclasses.replace(llama, architecture=asked))
    message = str(error.value)
    assert repr(asked) in message and f"nearest supported one is {nearest}" in message
    assert all(name in message for name in MODELS)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    ],
)
def test_unsupported_features_are_refused(changes: dict[str, Any], complaint: str, llama: ModelConfig) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        create_model(dataclasses.replace(llama, **changes), torch.float32, CPU)
    assert complaint in str(error.value)


def test_unsupported_rope_is_refused(llama: ModelConfig) -> None:
    dynamic = dataclasses.replace(llama, rope=dataclasses.replace(llama.rope, type="dynamic", factor=2.0))
    create_model(dynamic, torch.float32, CPU)
    with pytest.raises(UnsupportedModelError, match="up to max_position_embeddings = 256"):
        create_model(dynamic, torch.float32, CPU, max_positions=257)


@pytest.mark.parametrize(
    "key, value",
    [("num_experts_per_tok", 7), ("num_local_experts", -1), ("mlp_only_layers", "0"), ("norm_topk_prob", 3)],
)
def test_nonsense_in_moe_config_is_named(key: str, value: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path, "Qwen3Moe", **_MOE)
    config = load_config(tmp_path)
    config.raw[key] = value
    with pytest.raises(CheckpointError, match=key):
        create_model(config, torch.float32, CPU)


def test_moe_accepts_the_hub_name_of_num_experts(tmp_path: Path) -> None:
    save_tiny(tmp_path, "Qwen3Moe", **_MOE)
    config = load_config(tmp_path)
    config.raw["num_experts"] = config.raw.pop("num_local_experts")
    model = create_model(config, torch.float32, torch.device("meta"))
    assert model.get_parameter("model.layers.1.mlp.experts.down").shape == (6, 32, 24)


# Shapes without memory


@pytest.mark.parametrize("family", _FAMILIES)
def test_meta_device(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family, **_FAMILIES[family])
    config = load_config(tmp_path)
    model = create_model(config, torch.bfloat16, "meta")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    caches = kv_caches(model)
    assert len(caches) == config.num_hidden_layers * (2 if family == "DeepseekV32" else 1)
    for cache in caches:
        assert cache.dtype == torch.bfloat16  # type: ignore[attr-defined]
        with pytest.raises(AssertionError, match="before it was allocated"):
            _ = cache.tensors
    assert capture(model).find_nodes(op="output")
    randomize(model)  # nothing to fill, no error


# Where the weights go


@pytest.mark.parametrize("family", _FAMILIES)
def test_destinations_cover_every_element_once(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family, **_FAMILIES[family])
    model = create_model(load_config(tmp_path), torch.float32, CPU)
    for parameter in model.parameters():
        parameter.zero_()
        assert not parameter.requires_grad
    places = destinations(model)
    for destination in places.values():
        for tensor in (destination.tensor, *destination.others):
            tensor.add_(1)
    assert all(torch.all(parameter == 1) for parameter in model.parameters())
    saved = load_file(tmp_path / "model.safetensors")
    assert places.keys() == saved.keys()
    assert all(place.transform or place.shape == saved[name].shape for name, place in places.items())


def _rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, "Qwen3Moe", **_MOE)

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
        tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(3, 32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)

    _rewrite(tmp_path, damage)
    with pytest.raises(CheckpointError) as error:
        load_ours(tmp_path)
    missing, surplus, shapes = str(error.value).split("\n  ", 1)[1].split("\n  1 ")
    assert "missing" in missing and "model.layers.2.mlp.experts.5.up_proj.weight [24, 32]" in missing
    assert "no place" in surplus and "model.layers.0.self_attn.q_proj.bias [64]" in surplus
    assert "shape" in shapes and "model.layers.0.self_attn.k_proj.weight: expected [32, 32], found [3, 32]" in shapes


def test_harmless_surplus_is_accepted(tmp_path: Path) -> None:
    """A copy of the tied head, and frequencies that old exporters stored; but not the head of an untied model."""
    theirs = save_tiny(tmp_path, "Llama", tie_word_embeddings=True)
    with torch.inference_mode():
        expected = theirs(torch.tensor([[1, 2, 3]])).logits[0]

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    _rewrite(tmp_path, add)
    model = load_ours(tmp_path)
    torch.testing.assert_close(PagedRunner(model).step(("a", [1, 2, 3]))[0], expected, rtol=0, atol=1e-4)
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    assert "lm_head.weight" in ignorable(model)

    save_tiny(tmp_path, "Llama", tie_word_embeddings=False)
    _rewrite(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"missing.*\n +lm_head\.weight"):
        load_ours(tmp_path)


# Random weights


@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_are_sane_and_repeatable(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny(tmp_path, family, **_FAMILIES[family])
    config = load_config(tmp_path)

    def logits(seed: int) -> torch.Tensor:
        model = create_model(config, dtype, CPU)
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        randomize(model, seed)
        return PagedRunner(model).step(("a", list(range(40))))[0]

    first = logits(1)
    assert torch.equal(first, logits(1)) and not torch.equal(first, logits(2))
    assert first.isfinite().all() and 0.3 < first.float().std() < 3.0


def test_random_weights_do_not_repeat_and_are_fast(llama: ModelConfig) -> None:
    """100 million parameters in about 0.1 s on a free core; the bar leaves room for a machine that is busy."""
    large = dataclasses.replace(llama, hidden_size=1024, intermediate_size=3072, vocab_size=64_000, head_dim=256)
    model = create_model(large, torch.bfloat16, CPU)
    for parameter in model.parameters():
        parameter.zero_()  # the first touch of the memory is not at issue
    started = time.process_time()
    randomize(model)
    assert time.process_time() - started < 1.5
    first, second = (model.get_parameter(f"model.layers.{i}.mlp.down_proj.weight")[:64].float() for i in (0, 1))
    assert torch.corrcoef(torch.cat((first, second))).fill_diagonal_(0).abs().max() < 0.2, "rows repeat each other"
