"""The folder that is made of a GGUF file, against the checkpoint that the file was converted from."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import MODEL_ARCH
from gguf import GGMLQuantizationType as Type

from skyline.checkpoint import CheckpointError
from skyline.checkpoint.chat_template import load_chat_template
from skyline.checkpoint.config import load_config, load_generation_defaults
from skyline.checkpoint.gguf import materialize
from skyline.checkpoint.tokenizer import Tokenizer
from tests.checkpoint.gguf.convert import add, convert, finish
from tests.models.harness import save_tiny
from tests.tiny import make_tiny_checkpoint, make_tokenizer

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SKYLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rope_factors(head_dim: int) -> np.ndarray:
    """What LlamaModel.generate_extra_tensors of llama.cpp's conversion/llama.py writes for LLAMA3."""
    factors = []
    for pair in range(0, head_dim, 2):
        wavelength = 2 * np.pi * LLAMA3["rope_theta"] ** (pair / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(factors, np.float32)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
GLM = {"n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GLM |= {"first_k_dense_replace": 1, "norm_topk_prob": False, "routed_scaling_factor": 2.5, "n_group": 2}
GLM |= {"topk_group": 1, "use_qk_norm": True, "attention_bias": True}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
# Architecture, transformers' class, settings of the checkpoint, keys of the file.
CASES: dict[str, tuple[MODEL_ARCH, str, dict[str, Any], dict[str, Any]]] = {
    "llama": (MODEL_ARCH.LLAMA, "Llama", {"tie_word_embeddings": False}, {"rope.dimension_count": 16}),
    "llama, biases": (MODEL_ARCH.LLAMA, "Llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama, linear": (
        MODEL_ARCH.LLAMA,
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
    ),
    "qwen2": (MODEL_ARCH.QWEN2, "Qwen2", {}, {}),
    "qwen3": (MODEL_ARCH.QWEN3, "Qwen3", {"head_dim": 32, "tie_word_embeddings": True}, {}),
    "qwen3, yarn": (
        MODEL_ARCH.QWEN3,
        "Qwen3",
        {"rope_parameters": YARN},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
    ),
    "qwen3moe": (MODEL_ARCH.QWEN3MOE, "Qwen3Moe", MOE, {}),
    "glm4moe": (
        MODEL_ARCH.GLM4_MOE,
        "Glm4Moe",
        GLM,
        {
            "leading_dense_block_count": 1,
            "expert_shared_count": 2,
            "expert_weights_norm": False,
            "expert_weights_scale": 2.5,
            "expert_group_count": 2,
            "expert_group_used_count": 1,
            "rope.dimension_count": 8,
        },
    ),
    "minimax-m2": (
        MODEL_ARCH.MINIMAXM2,
        "MiniMaxM2",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": HALF},
        {"rope.dimension_count": 8, "expert_gating_func": 2},
    ),
    "gpt-oss": (
        MODEL_ARCH.GPT_OSS,
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
        | {"rope_parameters": {**YARN, "beta_fast": 30.0, "beta_slow": 2.0, "truncate": False}},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
        | {"rope.scaling.yarn_beta_fast": 30.0, "rope.scaling.yarn_beta_slow": 2.0},
    ),
    "gemma3": (
        MODEL_ARCH.GEMMA3,
        "Gemma3",
        {"num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
        {"rope.freq_base_swa": 10000.0},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_is_that_of_the_checkpoint(tmp_path: Path, case: str) -> None:
    architecture, family, settings, keys = CASES[case]
    original = tmp_path / "original"
    sizes = {"vocab_size": 512, "hidden_size": 64, "head_dim": 16, "eos_token_id": 2, "pad_token_id": 0}
    save_tiny(original, family, **{**sizes, **settings})
    make_tokenizer(original)
    convert(original, tmp_path / "m.gguf", architecture, **keys)
    ours, theirs = load_config(materialize(tmp_path / "m.gguf")), load_config(original)
    names = {field.name for field in dataclasses.fields(ours)} - {"raw", "eos_token_ids"}
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    # As for llama.cpp, <|endoftext|> ends an answer too.
    assert ours.eos_token_ids == [*theirs.eos_token_ids, 0]
    for name in settings.keys() - {"rope_parameters"}:
        assert ours.get(name) == settings[name], name


def small(path: Path, tensors: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """A Llama of one layer, all header. `changes`: keys, with __ for dots; None leaves one out."""
    keys: dict[str, Any] = {
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.block_count": 1,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
    }
    architecture = changes.pop("architecture", "llama")
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**keys, **{name.replace("__", "."): value for name, value in changes.items()}}.items():
        add(writer, name, value)
    for name, data in (tensors or {"token_embd.weight": np.zeros((4, 32), np.float32)}).items():
        writer.add_tensor(name, data)
    finish(writer)
    return path


def test_llama_3_is_recognised_by_its_factors(tmp_path: Path) -> None:
    embedding = {"token_embd.weight": np.zeros((4, 128), np.float32)}
    sizes = {"llama__embedding_length": 128, "llama__rope__freq_base": LLAMA3["rope_theta"]}
    factors = rope_factors(64)
    assert {1.0, 8.0} < set(factors.tolist())
    path = small(tmp_path / "a.gguf", {**embedding, "rope_freqs.weight": factors}, **sizes)
    rope = load_config(materialize(path)).rope
    said = {key: value for key, value in LLAMA3.items() if key not in ("rope_type", "rope_theta")}
    assert {key: getattr(rope, key) for key in said} == said
    assert (rope.type, rope.theta) == ("llama3", LLAMA3["rope_theta"])
    path = small(tmp_path / "b.gguf", {**embedding, "rope_freqs.weight": np.ones(32, np.float32)}, **sizes)
    assert load_config(materialize(path)).rope.type == "default"
    path = small(tmp_path / "c.gguf", {**embedding, "rope_freqs.weight": factors**0.5}, **sizes)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight does not stretch"):
        materialize(path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "mamba"}, "'mamba' is not supported; supported are llama, qwen2"),
    "mixtral": ({"llama__expert_count": 8}, "Mixtral"),
    "no size": ({"llama__embedding_length": None}, "embedding_length is missing"),
    "size of text": ({"llama__embedding_length": "32"}, "must be an integer"),
    "layers that differ": ({"llama__attention__head_count": [2, 4]}, "differs between layers"),
    "array for a number": ({"split__count": [1, 2]}, "split.count must be an integer"),
    "array for a setting": ({"general__sampling__temp": [0.5, 1.0]}, "general.sampling.temp must be a number"),
    "longrope": ({"llama__rope__scaling__type": "longrope", "llama__rope__scaling__factor": 2.0}, "'longrope'"),
    "yarn's factor": (
        {
            "llama__rope__scaling__type": "yarn",
            "llama__rope__scaling__factor": 2.0,
            "llama__rope__scaling__yarn_attn_factor": 2.0,
        },
        "yarn_attn_factor is supported only as 1",
    ),
    "other tokenizer": ({"tokenizer__ggml__model": "bert"}, "'bert' is not supported"),
    "no tokenizer": ({"tokenizer__ggml__model": None}, "tokenizer.ggml.model is missing"),
    "other pre-tokenizer": ({"tokenizer__ggml__pre": "klingon"}, "'klingon' is not supported; supported are llama-bpe"),
    "no pre-tokenizer": ({"tokenizer__ggml__pre": None}, "convert the model again"),
    "no tokens": ({"tokenizer__ggml__tokens": None}, "tokens is missing"),
    "token twice": ({"tokenizer__ggml__tokens": ["a", "a", "ab", "<s>"]}, "holds 'a' twice"),
    "merge of one part": ({"tokenizer__ggml__merges": ["ab"]}, "not two parts"),
    "too few types": ({"tokenizer__ggml__token_type": [1]}, "does not hold 4 numbers"),
    "no scores": ({"tokenizer__ggml__model": "llama"}, "scores is missing"),
    "long piece": (
        {
            "tokenizer__ggml__model": "llama",
            "tokenizer__ggml__tokens": ["a", "b", "ab", "x" * 10**6],
            "tokenizer__ggml__token_type": [1, 1, 1, 1],
            "tokenizer__ggml__scores": [0.0] * 4,
        },
        "of 1000000 characters",
    ),
    "no embedding": ({"tensors": {"x": np.zeros(4, np.float32)}}, "no tensor 'token_embd.weight'"),
    "other experts": (
        {
            "architecture": "qwen3moe",
            **{f"qwen3moe__{key}": 32 for key in ("context_length", "embedding_length", "feed_forward_length")},
            "qwen3moe__block_count": 1,
            "qwen3moe__attention__head_count": 2,
            "qwen3moe__attention__layer_norm_rms_epsilon": 1e-5,
            "qwen3moe__expert_count": 60000,
            "qwen3moe__expert_used_count": 2,
            "tensors": {
                "token_embd.weight": np.zeros((4, 32), np.float32),
                "blk.0.ffn_gate_inp.weight": np.zeros((4, 32), np.float32),
                "blk.0.ffn_gate_exps.weight": np.zeros((4, 32, 32), np.float32),
            },
        },
        r"\[4, 32, 32\] is not of 60000 experts",
    ),
    "rows of heads": (
        {
            "tensors": {
                "token_embd.weight": np.zeros((4, 32), np.float32),
                "blk.0.attn_q.weight": np.zeros((30, 32), np.float32),
            },
        },
        "cannot have the rows of 2 heads",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, cache: Path, case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        materialize(small(tmp_path / "m.gguf", **changes))
    assert "m.gguf" in str(caught.value)
    assert not cache.exists()


def test_the_folder_is_made_once_and_again_for_another_file(tmp_path: Path, cache: Path) -> None:
    path = small(tmp_path / "m.gguf", general__sampling__temp=0.5, general__sampling__top_k=20)
    folder = materialize(path)
    assert folder.parent == cache / "gguf" and (folder / "model.gguf").resolve() == path.resolve()
    assert (load_generation_defaults(folder).temperature, load_generation_defaults(folder).top_k) == (0.5, 20)
    made = (folder / "config.json").stat().st_mtime_ns
    assert materialize(path) == folder and (folder / "config.json").stat().st_mtime_ns == made
    os.utime(path, ns=(1, 1))
    other = materialize(path)
    assert other != folder and len(list((cache / "gguf").iterdir())) == 2
    with pytest.raises(CheckpointError, match=r"nothing\.gguf cannot be read"):
        materialize(tmp_path / "nothing.gguf")


def test_random_damage_gives_nothing_but_checkpoint_errors(tmp_path: Path) -> None:
    good = np.fromfile(small(tmp_path / "m.gguf", general__sampling__temp=0.5), np.uint8)
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = good.copy()
        damaged[generator.integers(0, len(good) - 4 * 32 * 4)] = generator.choice([0, 1, 8, 127, 255])
        damaged.tofile(tmp_path / "damaged.gguf")
        try:
            folder = materialize(tmp_path / "damaged.gguf")
            load_config(folder)
            load_generation_defaults(folder)
            load_chat_template(Tokenizer(folder))
        except CheckpointError:
            refused += 1
    assert 50 < refused < 190


def test_several_may_ask_for_it_together(tmp_path: Path, cache: Path) -> None:
    path = small(tmp_path / "m.gguf")
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(materialize, [path] * 32))
    assert len(folders) == 1 and list((cache / "gguf").iterdir()) == list(folders)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SKYLINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="set SKYLINE_CACHE"):
        materialize(small(tmp_path / "m.gguf"))


def test_no_torch_is_imported(tmp_path: Path) -> None:
    path = small(tmp_path / "m.gguf")
    code = f"""import sys, pathlib
from skyline.checkpoint.gguf import materialize
from skyline.checkpoint.tokenizer import Tokenizer
materialize(pathlib.Path({str(path)!r}))
assert "torch" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_dtype_is_that_of_the_matrices(tmp_path: Path) -> None:
    original = make_tiny_checkpoint(tmp_path / "original", "llama")
    expected = {Type.F32: "float32", Type.F16: "float16", Type.BF16: "bfloat16", Type.Q8_0: "bfloat16"}
    for kind, dtype in expected.items():
        path = tmp_path / f"{kind.name}.gguf"
        convert(original, path, MODEL_ARCH.LLAMA, lambda name, kind=kind: kind)
        assert load_config(materialize(path)).dtype == dtype
    config = json.loads((materialize(path) / "config.json").read_text())
    assert config["vocab_size"] == 512
