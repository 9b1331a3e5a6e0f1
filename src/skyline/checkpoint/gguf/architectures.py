"""The architectures that are read from GGUF: config.json out of the metadata, and the names of the tensors.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Names of tensors: MODEL_TENSORS and tensor_mapping.py
of llama.cpp's package gguf. What is not in the metadata is as in llama.cpp's src/models/*.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.fields import Fields
from skyline.checkpoint.gguf.reader import GGUFFile, GGUFTensor
from skyline.checkpoint.gguf.rope import rope_parameters

MAX_LAYERS = 4096
_SIGMOID = 2  # llama.cpp's enum llama_expert_gating_func_type

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_FFN_NORM = {"ffn_norm": "post_attention_layernorm"}
_POST_NORM = {"post_attention_norm": "post_attention_layernorm"}
_MLP = {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
_MOE = {
    "ffn_gate_inp": "mlp.gate",
    **{f"ffn_{part}_exps": f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")},
}
_GLM4_MOE = {
    **{f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")},
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}
_MINIMAX_M2 = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}
_GPT_OSS = {
    "attn_sinks.weight": "self_attn.sinks",
    "ffn_gate_inp": "mlp.router",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
    "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
    # Of these two the checkpoint has one.
    "ffn_gate_exps.weight": "mlp.experts.gate_proj",
    "ffn_gate_exps.bias": "mlp.experts.gate_proj_bias",
    "ffn_up_exps.weight": "mlp.experts.up_proj",
    "ffn_up_exps.bias": "mlp.experts.up_proj_bias",
}
_GEMMA3 = {"ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}


class Header(Fields):
    """Checked access to the metadata and the tensors of a model, of all its files."""

    def __init__(self, files: list[GGUFFile]) -> None:
        super().__init__(files[0].metadata, str(files[0].path))
        self.architecture = self.text("general.architecture")
        self.files: dict[str, GGUFFile] = {}
        for file in files:
            for name in file.tensors:
                if name in self.files:
                    raise CheckpointError(f"tensor {name!r} is in both {self.files[name].path} and {file.path}")
                self.files[name] = file

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def size(self, name: str, high: int, default: int | None = None) -> int:
        """A number of the architecture, of all layers alike: some files give one for each layer."""
        key = self.key(name)
        value = self.values.get(key)
        if isinstance(value, np.ndarray) and value.size:
            if (value != value[0]).any():
                raise self.error(key, "differs between layers, which is not supported")
            return Fields({key: value[0].item()}, self.where).integer(key, 1, high)
        return self.integer(key, 1, high, default)

    def tensor(self, name: str) -> GGUFTensor:
        if name not in self.files:
            raise CheckpointError(f"{self.where} holds no tensor {name!r}, so it is not a whole model")
        return self.files[name].tensors[name]


def _no_more(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """One that general.architecture can name.

    layer_names: of a layer's modules, or of single tensors, with {} for the number of an expert.
    interleaved: the rows of q and k that rotate together are neighbours in the file.
    joined_experts: gate and up of all experts are one tensor in the checkpoint, in turns, and transposed.
    norm_shift: what is added to every norm's weight.
    more: further keys of config.json, or others in place of the usual ones, which are given.
    """

    model_class: str
    model_type: str
    layer_names: Mapping[str, str]
    interleaved: bool = False
    joined_experts: bool = False
    norm_shift: float = 0.0
    more: Callable[[Header, dict[str, Any]], dict[str, Any]] = field(default=_no_more)


def make_config(header: Header) -> dict[str, Any]:
    """config.json, in transformers' names and without the ids of tokens.

    CheckpointError if the architecture is unknown, or a key is missing or wrong.
    """
    architecture = find(header)
    heads = header.size("attention.head_count", 2**16)
    hidden = header.size("embedding_length", 2**20)
    head_dim = header.size("attention.key_length", 2**14, max(1, hidden // heads))
    if header.size("attention.value_length", 2**14, head_dim) != head_dim:
        raise header.error(header.key("attention.value_length"), "differs from key_length, which is not supported")
    positions = header.size("context_length", 2**31)
    config: dict[str, Any] = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "vocab_size": header.tensor("token_embd.weight").shape[0],
        "hidden_size": hidden,
        "intermediate_size": header.size("feed_forward_length", 2**24),
        "num_hidden_layers": layer_count(header),
        "num_attention_heads": heads,
        "num_key_value_heads": header.size("attention.head_count_kv", 2**16, heads),
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        "rms_norm_eps": header.number(header.key("attention.layer_norm_rms_epsilon"), 0.0, 1.0),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in header.files,
        "attention_bias": "blk.0.attn_q.bias" in header.files,
        "mlp_bias": "blk.0.ffn_down.bias" in header.files,
        "rope_parameters": rope_parameters(header, header.architecture, head_dim, positions, _rope_factors(header)),
        "dtype": _dtype(header),
    }
    return {**config, **architecture.more(header, config)}


def find(header: Header) -> Architecture:
    """The architecture that the file names, or CheckpointError."""
    found = ARCHITECTURES.get(header.architecture)
    if found is None:
        raise header.error(
            "general.architecture",
            f"{header.architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}",
        )
    return found


def layer_count(header: Header) -> int:
    """Decoder layers, without those that only predict further tokens: these stand last."""
    further = header.integer(header.key("nextn_predict_layers"), 0, MAX_LAYERS, 0)
    layers = header.size("block_count", MAX_LAYERS) - further
    if layers < 1:
        raise header.error(header.key("nextn_predict_layers"), f"is {further}, which leaves no layer")
    return layers


def _rope_factors(header: Header) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """What the frequencies of each pair are divided by, if the file says so."""
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if name in header.files:
            raise CheckpointError(f"{header.where}: its rotary embedding is longrope ({name}), which is not supported")
    if "rope_freqs.weight" not in header.files:
        return None
    tensor = header.tensor("rope_freqs.weight")
    if tensor.type.name != "F32" or len(tensor.shape) != 1:
        raise CheckpointError(f"{header.where}: rope_freqs.weight must be a vector of F32")
    return header.files[tensor.name].rows(tensor).reshape(-1).view("<f4")


def _dtype(header: Header) -> str:
    """To compute in: that of the matrices, without routers, if they are all of one plain type, else bfloat16."""
    plain = {"F32": "float32", "F16": "float16"}
    tensors = [file.tensors[name] for name, file in header.files.items() if "_inp." not in name]
    kinds = {tensor.type.name for tensor in tensors if len(tensor.shape) > 1}
    return plain.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"


def _llama(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    if header.integer(header.key("expert_count"), 0, 2**16, 0):
        raise header.error(header.key("expert_count"), "makes it a Mixtral, which is not supported")
    return {}


def _qwen2(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    return {"attention_bias": False}  # it has biases on q, k and v whatever this says, and none on o


def _experts(header: Header, number: str, inner: str, first: int = 0) -> dict[str, Any]:
    """`number`, `inner`: the keys for how many there are and for their inner size. `first`: a layer that has them."""
    width = header.tensor(f"blk.{first}.ffn_gate_exps.weight").shape[-2:][0]
    return {
        number: header.size("expert_count", 2**16),
        "num_experts_per_tok": header.size("expert_used_count", 2**16),
        inner: header.size("expert_feed_forward_length", 2**24, width),
    }


def _qwen3_moe(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_experts(header, "num_experts", "moe_intermediate_size"),
        "norm_topk_prob": header.boolean(header.key("expert_weights_norm"), True),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _check_sigmoid(header: Header) -> None:
    key = header.key("expert_gating_func")
    if header.integer(key, 0, 255, _SIGMOID) not in (0, _SIGMOID):
        raise header.error(key, f"is not {_SIGMOID}, sigmoid, which alone is supported")


def _glm4_moe(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    _check_sigmoid(header)
    dense = header.integer(header.key("leading_dense_block_count"), 0, layer_count(header) - 1, 0)
    return {
        **_experts(header, "n_routed_experts", "moe_intermediate_size", dense),
        "norm_topk_prob": header.boolean(header.key("expert_weights_norm"), True),
        "n_shared_experts": header.integer(header.key("expert_shared_count"), 0, 2**10),
        "first_k_dense_replace": dense,
        "n_group": header.size("expert_group_count", 2**16, 1),
        "topk_group": header.size("expert_group_used_count", 2**16, 1),
        "routed_scaling_factor": header.number(header.key("expert_weights_scale"), 0.0, 1e6, 1.0),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in header.files,
    }


def _minimax_m2(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    _check_sigmoid(header)
    return _experts(header, "num_local_experts", "intermediate_size")


def _layer_types(header: Header, period: int) -> dict[str, Any]:
    """The layers' windows: all but every `period`-th have one, unless the file says otherwise."""
    key, layers = header.key("attention.sliding_window_pattern"), layer_count(header)
    value = header.values.get(key)
    if isinstance(value, np.ndarray):
        if len(value) < layers:
            raise header.error(key, f"does not hold {layers} values")
        has_window = [bool(entry) for entry in value[:layers]]
    else:
        period = header.integer(key, 1, 2**16, period)
        has_window = [bool((layer + 1) % period) for layer in range(layers)]
    return {
        "sliding_window": header.size("attention.sliding_window", 2**27),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in has_window],
    }


def _gpt_oss(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_experts(header, "num_local_experts", "intermediate_size"),
        **_layer_types(header, 2),
        "rope_parameters": {**config["rope_parameters"], "truncate": False},
    }


def _gemma3(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    local = header.number(header.key("rope.freq_base_swa"), 1.0, 1e12, 10_000.0)
    # The size with 62 layers is the only one whose scale is not that of its heads.
    odd = config["num_hidden_layers"] == 62
    scalar = config["hidden_size"] // config["num_attention_heads"] if odd else config["head_dim"]
    return {
        **_layer_types(header, 6),
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": None,
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": header.optional_number(header.key("final_logit_softcapping"), 0.0, 1e6) or None,
    }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "LlamaForCausalLM", "llama", {**_ATTENTION, **_MLP, **_FFN_NORM}, interleaved=True, more=_llama
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", {**_ATTENTION, **_MLP, **_FFN_NORM}, more=_qwen2),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", {**_ATTENTION, **_MLP, **_FFN_NORM}),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM", "qwen3_moe", {**_ATTENTION, **_MOE, **_FFN_NORM}, more=_qwen3_moe),
    "glm4moe": Architecture(
        "Glm4MoeForCausalLM", "glm4_moe", {**_ATTENTION, **_MLP, **_MOE, **_GLM4_MOE, **_POST_NORM}, more=_glm4_moe
    ),
    "minimax-m2": Architecture(
        "MiniMaxM2ForCausalLM", "minimax_m2", {**_ATTENTION, **_MINIMAX_M2, **_FFN_NORM}, more=_minimax_m2
    ),
    "gpt-oss": Architecture(
        "GptOssForCausalLM", "gpt_oss", {**_ATTENTION, **_GPT_OSS, **_POST_NORM}, joined_experts=True, more=_gpt_oss
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        {**_ATTENTION, **_MLP, **_GEMMA3, **_POST_NORM},
        norm_shift=-1.0,
        more=_gemma3,
    ),
}
