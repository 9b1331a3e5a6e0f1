"""A Qwen3 or Qwen3-MoE checkpoint as a GGUF file, which llama.cpp reads. Numbers are copied, never changed: bfloat16
stays bfloat16; vectors and routers become float32, which llama.cpp wants of them and which loses nothing.

    python -I to_gguf.py CHECKPOINT FILE

Formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and https://huggingface.co/docs/safetensors. Tensor
names: llama.cpp's src/llama-arch.cpp. It is a program of its own so that its memory is given back; it needs numpy only.
Ends with status 1 and a line on stderr if the checkpoint is none of these.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ARCHITECTURES = {"qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
# The one way of splitting text that llama.cpp calls qwen2 and that Qwen2's and Qwen3's tokenizer.json have.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# numpy's type for the bytes, and GGML's number for the type.
DTYPES: dict[str, tuple[np.dtype[Any], int]] = {
    "F32": (np.dtype("<f4"), 0),
    "F16": (np.dtype("<f2"), 1),
    "BF16": (np.dtype("<u2"), 30),
}
ALIGNMENT = 32
UINT32, FLOAT32, BOOL, STRING, ARRAY, INT32 = 4, 6, 7, 8, 9, 5
TOKEN_NORMAL, TOKEN_CONTROL, TOKEN_USER, TOKEN_UNUSED = 1, 3, 4, 5
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}


class Unconvertible(ValueError):
    pass


class Checkpoint:
    """Tensors of the folder's safetensors files, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                header = json.loads(opened.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    self._where[name] = (file, 8 + length, entry)
        if not self._where:
            raise Unconvertible(f"there are no *.safetensors in {folder}")

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> tuple[np.ndarray[Any, Any], str]:
        """The tensor (bfloat16 as its 16 bits) and its type."""
        if name not in self._where:
            raise Unconvertible(f"the checkpoint has no tensor {name}")
        file, begin, entry = self._where[name]
        kind = entry["dtype"]
        if kind not in DTYPES:
            raise Unconvertible(f"{name} is {kind}; only F32, F16 and BF16 can be converted")
        start = begin + entry["data_offsets"][0]
        return np.memmap(file, DTYPES[kind][0], "r", start, tuple(entry["shape"])), kind


def main() -> int:
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except (Unconvertible, OSError, ValueError, KeyError) as error:
        print(f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error, file=sys.stderr)
        return 1
    return 0


def convert(folder: Path, target: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if config.get("model_type") not in ARCHITECTURES:
        raise Unconvertible(f"its model_type is {config.get('model_type')!r}, not {' or '.join(ARCHITECTURES)}")
    if config.get("quantization_config"):
        raise Unconvertible("it is quantized")
    checkpoint = Checkpoint(folder)
    facts = [*metadata(config, checkpoint), *tokenizer(folder, config)]
    tensors = list(named(config, checkpoint))
    with target.open("wb") as out:
        out.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts)))
        for key, type_number, value in facts:
            out.write(text(key) + struct.pack("<I", type_number) + encoded(type_number, value))
        offset = 0
        for name, (data, kind) in tensors:
            out.write(text(name) + struct.pack("<I", data.ndim))
            out.write(struct.pack(f"<{data.ndim}Q", *reversed(data.shape)))
            out.write(struct.pack("<IQ", DTYPES[kind][1], offset))
            offset += -(-data.nbytes // ALIGNMENT) * ALIGNMENT
        pad(out)
        for _, (data, _) in tensors:
            # An expert at a time: a stack of all of them may not fit into memory twice.
            for part in data.parts if isinstance(data, Stack) else [data]:
                out.write(np.ascontiguousarray(part).tobytes())
            pad(out)


class Stack:
    """Several tensors of one shape as one, with their number in front."""

    def __init__(self, parts: list[np.ndarray[Any, Any]]) -> None:
        self.parts = parts
        self.shape = (len(parts), *parts[0].shape)
        self.ndim = len(self.shape)
        self.nbytes = sum(part.nbytes for part in parts)


def metadata(config: dict[str, Any], checkpoint: Checkpoint) -> Iterator[tuple[str, int, Any]]:
    name = ARCHITECTURES[config["model_type"]]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise Unconvertible("its rotary embedding is scaled")
    yield "general.architecture", STRING, name
    yield "general.alignment", UINT32, ALIGNMENT
    yield "general.file_type", UINT32, FILE_TYPES[checkpoint["model.embed_tokens.weight"][1]]
    yield f"{name}.context_length", UINT32, config["max_position_embeddings"]
    yield f"{name}.embedding_length", UINT32, config["hidden_size"]
    yield f"{name}.block_count", UINT32, config["num_hidden_layers"]
    yield f"{name}.feed_forward_length", UINT32, config["intermediate_size"]
    yield f"{name}.attention.head_count", UINT32, config["num_attention_heads"]
    yield f"{name}.attention.head_count_kv", UINT32, config["num_key_value_heads"]
    yield f"{name}.attention.key_length", UINT32, config["head_dim"]
    yield f"{name}.attention.value_length", UINT32, config["head_dim"]
    yield f"{name}.attention.layer_norm_rms_epsilon", FLOAT32, config["rms_norm_eps"]
    yield f"{name}.rope.freq_base", FLOAT32, config.get("rope_theta") or rope["rope_theta"]
    if name == "qwen3moe":
        yield f"{name}.expert_count", UINT32, config["num_experts"]
        yield f"{name}.expert_used_count", UINT32, config["num_experts_per_tok"]
        yield f"{name}.expert_feed_forward_length", UINT32, config["moe_intermediate_size"]


def tokenizer(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, int, Any]]:
    """The byte-level BPE of tokenizer.json, filled up to the size of the embedding."""
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    if content["model"].get("type", "BPE") != "BPE" or QWEN_SPLIT not in splits(content.get("pre_tokenizer")):
        raise Unconvertible("its tokenizer is not the byte-level BPE of Qwen2 and Qwen3")
    tokens = {number: token for token, number in content["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, TOKEN_NORMAL)
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = TOKEN_CONTROL if added["special"] else TOKEN_USER
    size = range(config["vocab_size"])
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    numbers = {token: number for number, token in tokens.items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    yield "tokenizer.ggml.model", STRING, "gpt2"
    yield "tokenizer.ggml.pre", STRING, "qwen2"
    yield "tokenizer.ggml.tokens", ARRAY, (STRING, [tokens.get(i, f"[unused {i}]") for i in size])
    yield "tokenizer.ggml.token_type", ARRAY, (INT32, [kinds.get(i, TOKEN_UNUSED) for i in size])
    yield "tokenizer.ggml.merges", ARRAY, (STRING, merges)
    yield "tokenizer.ggml.add_bos_token", BOOL, False
    for key, setting in (("eos_token_id", "eos_token"), ("padding_token_id", "pad_token")):
        token = settings.get(setting)
        token = token["content"] if isinstance(token, dict) else token
        if token in numbers:
            yield f"tokenizer.ggml.{key}", UINT32, numbers[token]
    template = folder / "chat_template.jinja"
    said = template.read_text("utf-8") if template.exists() else settings.get("chat_template")
    if isinstance(said, str):
        yield "tokenizer.chat_template", STRING, said


def splits(step: Any) -> list[str]:
    """Every regular expression of a pre-tokenizer."""
    if not isinstance(step, dict):
        return []
    found = [step["pattern"].get("Regex", "")] if isinstance(step.get("pattern"), dict) else []
    for inner in step.get("pretokenizers", []):
        found += splits(inner)
    return found


def named(config: dict[str, Any], checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[Any, str]]]:
    yield "token_embd.weight", checkpoint["model.embed_tokens.weight"]
    yield "output_norm.weight", plain(*checkpoint["model.norm.weight"])
    if not config.get("tie_word_embeddings"):
        yield "output.weight", checkpoint["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for theirs, ours in NAMES.items():
            if f"{prefix}{theirs}.weight" in checkpoint:
                data, kind = checkpoint[f"{prefix}{theirs}.weight"]
                is_plain = data.ndim == 1 or ours == "ffn_gate_inp"
                yield f"blk.{layer}.{ours}.weight", plain(data, kind) if is_plain else (data, kind)
        if f"{prefix}mlp.gate.weight" in checkpoint:
            for theirs, ours in EXPERTS.items():
                experts = [
                    checkpoint[f"{prefix}mlp.experts.{expert}.{theirs}.weight"]
                    for expert in range(config["num_experts"])
                ]
                yield f"blk.{layer}.{ours}.weight", (Stack([data for data, _ in experts]), experts[0][1])


def plain(data: np.ndarray[Any, Any], kind: str) -> tuple[np.ndarray[Any, Any], str]:
    """In float32. The bits of a bfloat16 are the upper half of that."""
    if kind == "BF16":
        return (data.astype("<u4") << 16).view("<f4"), "F32"
    return data.astype("<f4"), "F32"


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def encoded(kind: int, value: Any) -> bytes:
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(encoded(inner, item) for item in items)
    if kind == STRING:
        return text(value)
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}[kind], value)


def pad(out: BinaryIO) -> None:
    out.write(b"\0" * (-out.tell() % ALIGNMENT))


if __name__ == "__main__":
    sys.exit(main())
