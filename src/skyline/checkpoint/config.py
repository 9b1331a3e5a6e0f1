"""config.json and generation_config.json as typed, validated values.

Format: the files that transformers' `save_pretrained` writes, of version 4 and of version 5. Nothing here runs code of
the checkpoint: `auto_map` is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyline.checkpoint.fields import Fields, read_json_object
from skyline.checkpoint.rope import MAX_POSITIONS, RopeConfig, read_local_rope, read_rope

# What transformers' own config classes take for a key that is absent, where it is not the rule used for all.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096},
    "qwen3": {"head_dim": 128},
    "gpt_oss": {"head_dim": 64, "attention_bias": True, "sliding_window": 128, "rope_theta": 150_000.0},
    "gemma3_text": {  # the published checkpoints leave out whatever is as in here
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "head_dim": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    "glm4_moe": {"partial_rotary_factor": 0.5},
    "minimax_m2": {"head_dim": 128, "rope_theta": 5_000_000.0},
    "qwen3_next": {"head_dim": 256, "partial_rotary_factor": 0.25},
    "qwen3_5_text": {"head_dim": 256, "partial_rotary_factor": 0.25},
    "qwen3_5_moe_text": {"head_dim": 256, "partial_rotary_factor": 0.25},
    "deepseek_v3": {"qk_rope_head_dim": 64},
    "deepseek_v32": {"qk_rope_head_dim": 64},
}
# Whose rotary embedding has the size of its own key rather than of head_dim.
_LATENT_ATTENTION = ("deepseek_v3", "deepseek_v32")
# How layers alternate where `layer_types` is absent: (key of the period, its default, kind of the layers in between).
_PERIODS = {
    "gpt_oss": ("", 2, "sliding_attention"),
    "gemma3_text": ("sliding_window_pattern", 6, "sliding_attention"),
    "qwen3_next": ("full_attention_interval", 4, "linear_attention"),
    "qwen3_5_text": ("full_attention_interval", 4, "linear_attention"),
    "qwen3_5_moe_text": ("full_attention_interval", 4, "linear_attention"),
}
# Checkpoints that also see, and what the language model in them is.
_TEXT_ARCHITECTURES = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Qwen3_5ForConditionalGeneration": "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3_5MoeForCausalLM",
}
_LAYER_KINDS = ("full_attention", "sliding_attention", "linear_attention", "indexed_attention")
_DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class ModelConfig:
    """What every decoder needs to know of config.json; `get` reaches the keys that only some architectures have."""

    architecture: str  # "Qwen3ForCausalLM"
    model_type: str  # "qwen3"
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # rows of the embedding; the tokenizer may have fewer
    max_position_embeddings: int  # tokens
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    attention_bias: bool  # as written; Qwen2 has biases on q, k and v whatever this says
    mlp_bias: bool
    dtype: str | None  # "bfloat16", "float16", "float32", "float64", or None where the checkpoint does not say
    rope: RopeConfig
    local_rope: RopeConfig | None  # of layers with a window, where it is another one
    layer_kinds: list[str]  # per layer: "full_attention", "sliding_attention", "linear_attention", "indexed_attention"
    layer_windows: list[int | None]  # per layer: sliding attention window in tokens, None = full attention
    eos_token_ids: list[int]
    bos_token_id: int | None
    pad_token_id: int | None
    quantization_config: dict[str, Any] | None
    raw: dict[str, Any] = field(repr=False)  # config.json, with what its family takes for granted filled in

    @property
    def sliding_window(self) -> int | None:
        """The window in tokens if any layer uses one, else None."""
        return next((window for window in self.layer_windows if window is not None), None)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of any key of config.json as written (null counts as absent); the caller validates it."""
        value = self.raw.get(key)
        return default if value is None else value

    def fields(self) -> Fields:
        """Checked access to any key: `config.fields().integer("num_experts", 1, 4096)` raises CheckpointError."""
        return Fields(self.raw, "config.json")


@dataclass(frozen=True)
class GenerationDefaults:
    """What generation_config.json recommends; None where it says nothing. Ranges are those of SamplingParams."""

    temperature: float | None = None  # 0.0 where the checkpoint says do_sample=false
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: list[int] | None = None  # None: those of config.json hold


def load_config(folder: Path) -> ModelConfig:
    """Read and validate `folder`/config.json.

    Raises CheckpointError, naming the file and the key, if it is missing, above 10 MiB, not a JSON object, or if a
    value is absent, of the wrong type or out of range.
    """
    path = folder / "config.json"
    raw = _text_part(read_json_object(path), str(path))
    model_type = Fields(raw, str(path)).text("model_type", "")
    # A null counts as absent, except that it switches a window off.
    written = {key: value for key, value in raw.items() if value is not None or key == "sliding_window"}
    raw = {**_FAMILY_DEFAULTS.get(model_type, {}), **written}
    fields = Fields(raw, str(path))

    hidden_size = fields.integer("hidden_size", 1, 2**20)
    layers = fields.integer("num_hidden_layers", 1, 4096)
    heads = fields.integer("num_attention_heads", 1, 2**16)
    kv_heads = fields.integer("num_key_value_heads", 1, 2**16, heads)
    if heads % kv_heads:
        raise fields.error("num_attention_heads", f"({heads}) must be a multiple of num_key_value_heads ({kv_heads})")
    if model_type in _LATENT_ATTENTION:
        head_dim = fields.integer("qk_rope_head_dim", 2, 2**14)
    else:
        if "head_dim" not in fields and hidden_size % heads:
            raise fields.error("hidden_size", f"({hidden_size}) must be a multiple of num_attention_heads ({heads})")
        head_dim = fields.integer("head_dim", 2, 2**14, hidden_size // heads)
    if head_dim % 2:
        raise fields.error("head_dim", f"must be even for rotary embeddings, not {head_dim}")
    positions = fields.integer("max_position_embeddings", 1, MAX_POSITIONS)
    if model_type == "minimax_m2" and "rotary_dim" in fields:
        raw["partial_rotary_factor"] = fields.integer("rotary_dim", 2, head_dim) / head_dim
    kinds = _layer_kinds(fields, layers)
    bos, pad = fields.token_ids("bos_token_id"), fields.token_ids("pad_token_id")

    return ModelConfig(
        architecture=_architecture(fields),
        model_type=model_type,
        hidden_size=hidden_size,
        # Where all layers are mixtures of experts there may be none but theirs.
        intermediate_size=fields.integer(
            "intermediate_size", 1, 2**24, fields.optional_integer("moe_intermediate_size", 1, 2**24)
        ),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size", 1, 2**24),
        max_position_embeddings=positions,
        rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, 1e-6),
        hidden_act=fields.text("hidden_act", fields.text("hidden_activation", "silu")),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
        dtype=_dtype(fields),
        rope=read_rope(raw, str(path), positions),
        local_rope=read_local_rope(raw, str(path), positions),
        layer_kinds=kinds,
        layer_windows=_layer_windows(fields, kinds),
        eos_token_ids=fields.token_ids("eos_token_id"),
        bos_token_id=bos[0] if bos else None,
        pad_token_id=pad[0] if pad else None,
        quantization_config=fields.optional_object("quantization_config")
        or fields.optional_object("compression_config"),  # compressed-tensors' first name for it
        raw=raw,
    )


def _text_part(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """config.json of a checkpoint that also sees, reduced to its language model; any other as it is."""
    fields = Fields(raw, where)
    text = fields.optional_object("text_config")
    if text is None or "hidden_size" in fields:
        return raw
    architecture = _architecture(fields)
    if architecture not in _TEXT_ARCHITECTURES:
        raise fields.error(
            "text_config",
            f"marks a multimodal checkpoint, of which only {', '.join(_TEXT_ARCHITECTURES)} are supported, for text",
        )
    outer = {key: value for key, value in raw.items() if key not in ("text_config", "vision_config", "model_type")}
    return {**outer, **text, "architectures": [_TEXT_ARCHITECTURES[architecture]]}


def load_generation_defaults(folder: Path) -> GenerationDefaults:
    """Read `folder`/generation_config.json; an absent file gives empty defaults, an invalid one a CheckpointError."""
    path = folder / "generation_config.json"
    if not path.exists():
        return GenerationDefaults()
    fields = Fields(read_json_object(path), str(path))
    greedy = "do_sample" in fields and not fields.boolean("do_sample", True)
    return GenerationDefaults(
        temperature=0.0 if greedy else fields.optional_number("temperature", 0.0, 100.0),
        top_k=fields.optional_integer("top_k", -1, 2**31 - 1),
        top_p=fields.optional_number("top_p", 0.0, 1.0),
        min_p=fields.optional_number("min_p", 0.0, 1.0),
        repetition_penalty=fields.optional_number("repetition_penalty", 0.0, 100.0),
        eos_token_ids=fields.token_ids("eos_token_id") or None,
    )


def effective_eos_token_ids(config: ModelConfig, defaults: GenerationDefaults) -> list[int]:
    """The token ids that end a sequence: those of generation_config.json if it names any, else config.json's."""
    return config.eos_token_ids if defaults.eos_token_ids is None else defaults.eos_token_ids


def _architecture(fields: Fields) -> str:
    names = fields.values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise fields.error("architectures", 'must name the model class, as in ["LlamaForCausalLM"]')
    return names[0]


def _dtype(fields: Fields) -> str | None:
    key = "dtype" if "dtype" in fields else "torch_dtype"
    if key not in fields:
        return None
    name = fields.text(key).removeprefix("torch.")
    if name == "auto":
        return None
    if name not in _DTYPES:
        raise fields.error(key, f"must be one of {', '.join(_DTYPES)}, not {name!r}")
    return name


def _layer_kinds(fields: Fields, layers: int) -> list[str]:
    """Each layer's kind of attention: `layer_types` where it is given, else as the family alternates them."""
    types = fields.values.get("layer_types")
    model_type = fields.text("model_type", "")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise fields.error("layer_types", f"must be a list of num_hidden_layers = {layers} names")
        unknown = [name for name in types if name not in _LAYER_KINDS]
        if unknown:
            raise fields.error("layer_types", f"holds {unknown[0]!r}; supported are {', '.join(_LAYER_KINDS)}")
        return list(types)
    if model_type in _PERIODS:
        key, default, between = _PERIODS[model_type]
        period = fields.integer(key, 1, 2**16, default) if key else default
        return ["full_attention" if (layer + 1) % period == 0 else between for layer in range(layers)]
    # transformers slides only the layers from max_window_layers on, except in Qwen3-MoE, where all of them slide.
    full = fields.integer("max_window_layers", 0, 2**16, 28) if model_type in ("qwen2", "qwen3") else 0
    return ["sliding_attention" if layer >= full else "full_attention" for layer in range(layers)]


def _layer_windows(fields: Fields, kinds: list[str]) -> list[int | None]:
    # Qwen checkpoints carry a sliding_window that is off unless use_sliding_window says otherwise; Llama has none.
    model_type = fields.text("model_type", "")
    used = model_type != "llama" and fields.boolean("use_sliding_window", not model_type.startswith("qwen"))
    window = fields.optional_integer("sliding_window", 1, MAX_POSITIONS) if used else None
    return [window if kind == "sliding_attention" else None for kind in kinds]
