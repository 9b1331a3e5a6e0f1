"""A Qwen3 or Qwen3-MoE safetensors checkpoint as a bfloat16 GGUF file (runs in the conversion environment).

    python to_gguf.py CHECKPOINT FILE

Matrices stay bfloat16, vectors become float32 and the router stays float32, as llama.cpp expects them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from safetensors import safe_open

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
EXPERT_NAMES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def main() -> None:
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    config = json.loads((folder / "config.json").read_text())
    moe = config["model_type"] == "qwen3_moe"
    writer = gguf.GGUFWriter(target, "qwen3moe" if moe else "qwen3")
    _metadata(writer, config, moe)
    _tokenizer(writer, folder, config["vocab_size"])
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        layers = config["num_hidden_layers"]
        _add(writer, "token_embd.weight", tensors.get_tensor("model.embed_tokens.weight"))
        _add(writer, "output_norm.weight", tensors.get_tensor("model.norm.weight"))
        if not config["tie_word_embeddings"]:
            _add(writer, "output.weight", tensors.get_tensor("lm_head.weight"))
        present = set(tensors.keys())
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            for theirs, ours in NAMES.items():
                if prefix + theirs + ".weight" in present:
                    _add(writer, f"blk.{layer}.{ours}.weight", tensors.get_tensor(prefix + theirs + ".weight"))
            for theirs, ours in EXPERT_NAMES.items() if moe else ():
                parts = [
                    tensors.get_tensor(f"{prefix}mlp.experts.{expert}.{theirs}.weight")
                    for expert in range(config["num_experts"])
                ]
                _add(writer, f"blk.{layer}.{ours}.weight", torch.stack(parts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(writer: Any, config: dict[str, Any], moe: bool) -> None:
    writer.add_name("random weights")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if moe:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _tokenizer(writer: Any, folder: Path, size: int) -> None:
    """The byte-level BPE of tokenizer.json, filled up to the size of the embedding."""
    content = json.loads((folder / "tokenizer.json").read_text())
    tokens = {token_id: token for token, token_id in content["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in content["added_tokens"]}
    tokens.update(special)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([tokens.get(index, f"unused{index}") for index in range(size)])
    writer.add_token_types([control if index in special else normal for index in range(size)])
    writer.add_token_merges(merges)
    end = next(index for index, token in special.items() if token == "<|im_end|>")
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


def _add(writer: Any, name: str, tensor: torch.Tensor) -> None:
    if tensor.dim() == 1 or name.endswith("ffn_gate_inp.weight"):
        writer.add_tensor(name, tensor.to(torch.float32).numpy())
        return
    raw = tensor.contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, numpy.ascontiguousarray(raw), raw_dtype=gguf.GGMLQuantizationType.BF16)


if __name__ == "__main__":
    main()
