"""Logits equal those of transformers on tiny random checkpoints that transformers saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from skyline.graph import capture, lower

from .families import FAMILIES
from .harness import CPU, PagedRunner, load_ours, save_tiny

_MOE = dict(head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
_YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)

_GEMMA_ROPES = dict(
    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
    sliding_attention=dict(rope_type="default", rope_theta=1e4),
)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama attention_bias mlp_bias": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama gqa 1": ("Llama", dict(num_key_value_heads=4)),
    "llama gqa 4, head_dim 16": ("Llama", dict(num_key_value_heads=1, head_dim=16)),
    "llama rope llama3": ("Llama", dict(head_dim=32, rope_parameters=_LLAMA3)),
    "llama rope linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=5000.0, factor=3.0))),
    "llama rope dynamic": ("Llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))),
    "llama rope yarn": ("Llama", dict(head_dim=32, rope_parameters=_YARN)),
    "llama rope yarn, all keys": (
        "Llama",
        dict(head_dim=32, rope_parameters=dict(**_YARN, beta_fast=8.0, beta_slow=0.5, attention_factor=1.3)),
    ),
    "llama rope yarn, mscale, not truncated": (
        "Llama",
        dict(head_dim=32, rope_parameters=dict(**_YARN, mscale=1.2, mscale_all_dim=0.7, truncate=False)),
    ),
    "mistral window": ("Mistral", dict(sliding_window=6)),
    "mistral full, head_dim 16": ("Mistral", dict(sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied yarn": ("Qwen2", dict(tie_word_embeddings=True, rope_parameters=_YARN)),
    "qwen2 window from layer 1": ("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3 tied, attention_bias": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True, attention_bias=True)),
    "qwen3 window from layer 2": (
        "Qwen3",
        dict(head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    ),
    "qwen3_moe": ("Qwen3Moe", _MOE),
    "qwen3_moe norm_topk_prob, tied": ("Qwen3Moe", dict(**_MOE, norm_topk_prob=True, tie_word_embeddings=True)),
    "qwen3_moe dense layer 1": ("Qwen3Moe", dict(**_MOE, mlp_only_layers=[1])),
    "qwen3_moe every 2nd layer": ("Qwen3Moe", dict(**_MOE, decoder_sparse_step=2)),
    "qwen3_moe window": ("Qwen3Moe", dict(**_MOE, use_sliding_window=True, sliding_window=5)),
    "gpt_oss": ("GptOss", FAMILIES["GptOss"]),
    "gpt_oss yarn": (
        "GptOss",
        dict(**FAMILIES["GptOss"], rope_parameters=dict(**_YARN, truncate=False), swiglu_alpha=1.5, swiglu_limit=0.5),
    ),
    "deepseek_v3": ("DeepseekV3", FAMILIES["DeepseekV3"]),
    "deepseek_v3 yarn": (
        "DeepseekV3",
        dict(**FAMILIES["DeepseekV3"], rope_parameters=dict(**_YARN, mscale=1.0, mscale_all_dim=0.7)),
    ),
    "deepseek_v3 no q latent, not interleaved, biases": (
        "DeepseekV3",
        {
            **FAMILIES["DeepseekV3"],
            "q_lora_rank": None,
            "rope_interleave": False,
            "attention_bias": True,
            "norm_topk_prob": False,
        },
    ),
    "deepseek_v32": ("DeepseekV32", FAMILIES["DeepseekV32"]),
    "qwen3_next": ("Qwen3Next", FAMILIES["Qwen3Next"]),
    "qwen3_next dense layer 1": ("Qwen3Next", dict(**FAMILIES["Qwen3Next"], mlp_only_layers=[1])),
    "qwen3_5": ("Qwen3_5", FAMILIES["Qwen3_5"]),
    "qwen3_5 tied": ("Qwen3_5", dict(**FAMILIES["Qwen3_5"], tie_word_embeddings=True)),
    "qwen3_5_moe": ("Qwen3_5Moe", FAMILIES["Qwen3_5Moe"]),
    "minimax_m2": ("MiniMaxM2", FAMILIES["MiniMaxM2"]),
    "mixtral": ("Mixtral", FAMILIES["Mixtral"]),
    "glm4_moe": ("Glm4Moe", FAMILIES["Glm4Moe"]),
    "glm4_moe biases, qk_norm": ("Glm4Moe", dict(**FAMILIES["Glm4Moe"], use_qk_norm=True, attention_bias=True)),
    "gemma3": ("Gemma3", FAMILIES["Gemma3"]),
    "gemma3 linear": (
        "Gemma3",
        dict(
            head_dim=16,
            sliding_window=6,
            rope_parameters=_GEMMA_ROPES,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
}

# Three requests; the longest reaches beyond the original context of the stretched rotary embeddings.
PROMPTS = {
    name: torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for name, length in (("a", 13), ("b", 1), ("c", 70))
}


def expected_logits(theirs: Any) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return {name: theirs(torch.tensor([tokens])).logits[0] for name, tokens in PROMPTS.items()}


def whole_prompts(runner: PagedRunner) -> dict[str, torch.Tensor]:
    return dict(zip(PROMPTS, runner.step(*PROMPTS.items()), strict=True))


def uneven_chunks(runner: PagedRunner) -> dict[str, torch.Tensor]:
    """Prefill of `a` and `c` in chunks that respect no block boundary, mixed in one batch."""
    got: dict[str, list[torch.Tensor]] = {"a": [], "c": []}
    done = {"a": 0, "c": 0}
    for sizes in ((3, 17), (1, 2), (8, 31), (1, 20)):
        work = [(n, PROMPTS[n][done[n] : done[n] + size]) for n, size in zip(("a", "c"), sizes, strict=True)]
        for (name, tokens), logits in zip(work, runner.step(*work), strict=True):
            got[name].append(logits)
            done[name] += len(tokens)
    return {name: torch.cat(parts) for name, parts in got.items()}


def decode_beside_prefill(runner: PagedRunner) -> dict[str, torch.Tensor]:
    """`a` decodes token by token while `c` is prefilled in chunks, and `b` comes and goes."""
    a, c = PROMPTS["a"], PROMPTS["c"]
    got_a, got_c = [runner.step(("a", a[:4]))[0]], []
    got_b = None
    for i in range(9):
        work = [("c", c[8 * i : 8 * i + 8]), ("a", a[4 + i : 5 + i])]
        if i == 5:
            work.insert(0, ("b", PROMPTS["b"]))
            got_b, logits_c, logits_a = runner.step(*work)
        else:
            logits_c, logits_a = runner.step(*work)
        got_c.append(logits_c)
        got_a.append(logits_a)
    assert got_b is not None
    return {"a": torch.cat(got_a), "b": got_b, "c": torch.cat(got_c)}


def max_error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert all(logits.shape == expected[name].shape for name, logits in got.items())
    return max((logits - expected[name]).abs().max().item() for name, logits in got.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, tmp_path: Path, record_property: Any) -> None:
    family, settings = VARIANTS[variant]
    expected = expected_logits(save_tiny(tmp_path, family, **settings))
    assert expected["c"].std() > 0.1, "the test model says nothing"
    ours = load_ours(tmp_path)
    ways = (whole_prompts, uneven_chunks, decode_beside_prefill)
    errors = {way.__name__: max_error(way(PagedRunner(ours)), expected) for way in ways}
    record_property("max_error", max(errors.values()))
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("variant", ["llama rope llama3", "qwen2", "qwen3_moe norm_topk_prob, tied"])
def test_bfloat16_is_as_exact_as_transformers(variant: str, tmp_path: Path) -> None:
    """Neither implementation is the truth in bfloat16: both are measured against the same weights in float32."""
    family, settings = VARIANTS[variant]
    theirs = save_tiny(tmp_path, family, dtype=torch.bfloat16, **settings)
    their_logits = expected_logits(theirs)
    truth = expected_logits(theirs.float())
    ours = whole_prompts(PagedRunner(load_ours(tmp_path, torch.bfloat16)))
    assert all(logits.dtype == torch.bfloat16 for logits in ours.values())
    assert _rms_error(ours, truth) < 1.5 * _rms_error(their_logits, truth) < 0.2


def _rms_error(got: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    return torch.cat([(got[name].float() - truth[name]).flatten() for name in truth]).square().mean().sqrt().item()


@pytest.mark.parametrize("family, settings", [("Llama", {}), ("Qwen3Moe", dict(**_MOE, mlp_only_layers=[0]))])
def test_captured_program_equals_eager(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    save_tiny(tmp_path, family, **settings)
    model = load_ours(tmp_path)
    program = lower(capture(model), model, CPU, torch.float32)
    eager = decode_beside_prefill(PagedRunner(model))
    replayed = decode_beside_prefill(PagedRunner(model, run=program))
    assert all(torch.equal(logits, eager[name]) for name, logits in replayed.items())


def test_logits_only_of_the_rows_asked_for(tmp_path: Path) -> None:
    expected = expected_logits(save_tiny(tmp_path, "Qwen3", head_dim=8))
    runner = PagedRunner(load_ours(tmp_path))
    (logits,) = runner.step(*PROMPTS.items(), rows=[13 + 1 + 69, 4])
    torch.testing.assert_close(logits, torch.stack((expected["c"][69], expected["a"][4])), rtol=0, atol=1e-4)


def test_rotary_table_may_be_longer_than_the_config_says(tmp_path: Path) -> None:
    """Qwen2.5 with YaRN: max_position_embeddings stays at the original length, the context may be `factor` times it."""
    rope = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
    theirs = save_tiny(tmp_path, "Qwen2", max_position_embeddings=32, rope_parameters=rope)
    runner = PagedRunner(load_ours(tmp_path, max_positions=128))
    assert max_error(whole_prompts(runner), expected_logits(theirs)) < 1e-4
