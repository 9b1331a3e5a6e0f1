"""Writes a checkpoint that transformers saved as GGUF, with the package gguf and what llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from safetensors.numpy import load_file

from skyline.checkpoint.gguf.types import GGML_TYPES

LLAMA3_FACTORS = "rope_freqs"

# The K types, which the package cannot write, with the middle of their levels where these are not signed.
_STEPS = {Type.Q2_K: 1.5, Type.Q3_K: 0.0, Type.Q4_K: 7.5, Type.Q5_K: 15.5, Type.Q6_K: 0.0}


def random_blocks(shape: tuple[int, ...], kind: Type) -> NDArray[np.uint8]:
    """Values of some 0.05, around zero, for a tensor of that shape."""
    layout = GGML_TYPES[kind.value]
    *lead, k = shape
    generator = np.random.default_rng(k)
    data = generator.integers(0, 256, (*lead, k // layout.block_size * layout.block_bytes), dtype=np.uint8)
    fields = data.reshape(-1, layout.block_bytes).view(layout.block)
    assert layout.block is not None and layout.block.names is not None
    fields["d"] = 1.0
    if "dmin" in layout.block.names:
        fields["dmin"] = 1.0
    found = layout.levels(data.reshape(-1, data.shape[-1]))
    fields["d"] = 0.05 / (np.abs(found.group_scales()).mean() * (found.levels - _STEPS[kind]).std())
    if "dmin" in layout.block.names:
        fields["dmin"] = fields["d"] * _STEPS[kind]
    return data


def convert(
    folder: Path,
    target: Path,
    architecture: gguf.MODEL_ARCH,
    kind: Callable[[str], Type] = lambda name: Type.F32,
    pre: str = "gpt-2",
    **extra: Any,
) -> dict[str, NDArray[Any]]:
    """`folder` as `target`; `kind` chooses the type of each matrix by its GGUF name. Returns the data as written.

    `extra`: further keys of the architecture, or None to leave one out.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture])
    for key, value in {**architecture_keys(config), **extra}.items():
        add(writer, f"{writer.arch}.{key}", value)
    if (folder / "tokenizer.json").exists():
        add_tokenizer(writer, folder, config["vocab_size"], pre)
    written = {}
    for name, data in named(folder, config, architecture).items():
        chosen = kind(name) if data.ndim > 1 and "_inp" not in name and ".bias" not in name else Type.F32
        written[name] = random_blocks(data.shape, chosen) if chosen in _STEPS else gguf.quants.quantize(data, chosen)
        writer.add_tensor(name, written[name], raw_dtype=chosen)
    finish(writer)
    return written


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def architecture_keys(config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    keys = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if config.get("head_dim"):
        keys |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    if experts := config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts"):
        keys |= {
            "expert_count": experts,
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config.get("moe_intermediate_size") or config["intermediate_size"],
        }
    if config["model_type"] in ("gpt_oss", "gemma3_text"):
        keys["attention.sliding_window"] = config["sliding_window"]
    return keys


def permuted(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """LlamaModel.permute of llama.cpp's conversion/llama.py."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def named(folder: Path, config: dict[str, Any], architecture: gguf.MODEL_ARCH) -> dict[str, NDArray[np.float32]]:
    """The tensors under their GGUF names, by the package's own table, with experts put together."""
    layers = config["num_hidden_layers"]
    table = gguf.get_tensor_name_map(architecture, layers)
    tensors = {
        name: data
        for part in load_file(folder / "model.safetensors").items()
        for name, data in prepared(*part, architecture)
    }
    stacks: dict[str, list[str]] = {}
    found: dict[str, NDArray[np.float32]] = {}
    for name, data in tensors.items():
        parts = name.split(".")
        if "experts" in parts and parts[parts.index("experts") + 1].isdigit():
            at = parts.index("experts") + 1
            stacks.setdefault(".".join(parts[:at] + parts[at + 1 :]), []).append(name)
            continue
        if architecture == gguf.MODEL_ARCH.LLAMA and parts[-2] in ("q_proj", "k_proj"):
            heads = config["num_attention_heads" if parts[-2] == "q_proj" else "num_key_value_heads"]
            data = permuted(data, heads)
        found[_mapped(table, name)] = np.ascontiguousarray(data, np.float32)
    for name, members in stacks.items():
        members.sort(key=lambda member: int(member.split("experts.")[1].split(".")[0]))
        found[_mapped(table, name)] = np.stack([tensors[member] for member in members]).astype(np.float32)
    return found


def prepared(name: str, data: NDArray[Any], architecture: gguf.MODEL_ARCH) -> list[tuple[str, NDArray[Any]]]:
    """What GptOssModel, Gemma3Model and the base class of llama.cpp's converters do before they look names up."""
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    if architecture == gguf.MODEL_ARCH.GEMMA3 and name.endswith("norm.weight"):
        return [(name, data + np.float32(1))]
    if architecture != gguf.MODEL_ARCH.GPT_OSS:
        return [(name, data)]
    suffix = "bias" if name.endswith("_bias") else "weight"
    turned = data.swapaxes(-1, -2) if data.ndim == 3 else data
    if "down_proj" in name:
        return [(name.removesuffix("_bias") + "." + suffix, turned)]
    if "gate_up_proj" in name:
        gate, up = (turned[:, 0::2], turned[:, 1::2])
        stem = name.removesuffix("_bias")
        return [
            (stem.replace("gate_up", "gate") + f".{suffix}", gate),
            (stem.replace("gate_up", "up") + f".{suffix}", up),
        ]
    return [(name + ".weight" if name.endswith("sinks") else name, data)]


def _mapped(table: Any, name: str) -> str:
    mapped = table.get_name(name, try_suffixes=(".weight", ".bias"))
    assert mapped is not None, name
    return str(mapped)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, size: int, pre: str) -> None:
    """Byte-level BPE as llama.cpp's _set_vocab_gpt2 writes it, padded to the rows of the embedding."""
    content = json.loads((folder / "tokenizer.json").read_text())
    tokens = {number: token for token, number in content["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for token in content["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([kinds.get(i, gguf.TokenType.UNUSED) for i in range(size)])
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer)
