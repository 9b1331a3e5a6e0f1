"""config.json and generation_config.json: equal to what transformers reads, and clear about what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from skyline.checkpoint import CheckpointError, effective_eos_token_ids, load_config, load_generation_defaults
from skyline.checkpoint.fields import MAX_JSON_BYTES

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "eos_token_id": [128001, 128009],
    "bos_token_id": 128000,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def write(folder: Path, **changes: Any) -> Path:
    values = {**LLAMA, **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return folder


def test_llama(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert (config.architecture, config.model_type) == ("LlamaForCausalLM", "llama")
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 2, 8)
    assert config.dtype == "bfloat16"
    assert config.rms_norm_eps == 1e-5
    assert config.eos_token_ids == [128001, 128009]
    assert (config.bos_token_id, config.pad_token_id) == (128000, None)
    assert config.layer_windows == [None] * 4 and config.sliding_window is None
    assert not config.tie_word_embeddings and not config.attention_bias and config.quantization_config is None
    assert (config.rope.type, config.rope.theta, config.rope.factor) == ("default", 10_000.0, 1.0)
    assert config.get("num_experts", 7) == 7 and config.get("vocab_size") == 1000
    assert config.fields().integer("num_hidden_layers", 1, 10) == 4


def test_defaults_and_spellings(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, num_key_value_heads=..., dtype="torch.float16", torch_dtype=..., head_dim=32, pad_token_id=-1)
    )
    assert (config.num_key_value_heads, config.dtype, config.head_dim, config.pad_token_id) == (8, "float16", 32, None)
    assert load_config(write(tmp_path, torch_dtype=...)).dtype is None
    assert load_config(write(tmp_path, torch_dtype="auto")).dtype is None


@pytest.mark.parametrize("inside", [False, True])
def test_rope_in_both_formats(tmp_path: Path, inside: bool) -> None:
    if inside:
        write(tmp_path, rope_parameters={**LLAMA3_SCALING, "rope_theta": 500000.0})
    else:
        write(tmp_path, rope_theta=500000.0, rope_scaling=LLAMA3_SCALING)
    rope = load_config(tmp_path).rope
    assert (rope.type, rope.theta, rope.factor) == ("llama3", 500000.0, 8.0)
    assert (rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings) == (1.0, 4.0, 8192)


def test_rope_old_type_key_and_yarn(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 0.5}
    rope = load_config(write(tmp_path, rope_scaling=scaling)).rope
    assert (rope.type, rope.beta_fast, rope.beta_slow, rope.attention_factor) == ("yarn", 32.0, 1.0, 0.5)
    assert rope.original_max_position_embeddings == 1024
    rope = load_config(write(tmp_path, rope_scaling={"type": "linear", "factor": 2})).rope
    assert (rope.type, rope.factor, rope.original_max_position_embeddings) == ("linear", 2.0, 4096)


WINDOWED = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3, "num_hidden_layers": 4}

EVERY_FAMILY_HAS = [
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "tie_word_embeddings",
]


@pytest.mark.parametrize(
    "saved",
    [
        LlamaConfig(rope_parameters={**LLAMA3_SCALING, "rope_theta": 5e5}, tie_word_embeddings=True),
        LlamaConfig(head_dim=64, num_attention_heads=4, num_key_value_heads=1, attention_bias=True, mlp_bias=True),
        Qwen2Config(sliding_window=32, num_hidden_layers=4, dtype="bfloat16"),
        Qwen2Config(**WINDOWED),
        Qwen3Config(**WINDOWED, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}),
        Qwen3Config(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, eos_token_id=3),
        Qwen3MoeConfig(num_hidden_layers=2, use_sliding_window=True, sliding_window=16),
        MistralConfig(num_hidden_layers=2, sliding_window=None),
        MistralConfig(num_hidden_layers=2, sliding_window=128, head_dim=96),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_equal_to_transformers(tmp_path: Path, saved: Any) -> None:
    saved.architectures = ["X"]
    saved.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    for key in EVERY_FAMILY_HAS:
        assert getattr(config, key) == getattr(saved, key), key
    assert config.head_dim == (getattr(saved, "head_dim", None) or saved.hidden_size // saved.num_attention_heads)
    assert config.attention_bias == getattr(saved, "attention_bias", False)
    assert config.mlp_bias == getattr(saved, "mlp_bias", False)
    assert config.dtype == (str(saved.dtype).removeprefix("torch.") if saved.dtype else None)
    rope = {"rope_theta": 10_000.0, "rope_type": "default", **saved.rope_parameters}
    assert (config.rope.type, config.rope.theta) == (rope["rope_type"], rope["rope_theta"])
    assert config.rope.factor == rope.get("factor", 1.0)
    window = getattr(saved, "sliding_window", None)
    kinds = getattr(saved, "layer_types", None) or ["sliding_attention"] * saved.num_hidden_layers
    assert config.layer_windows == [window if kind == "sliding_attention" else None for kind in kinds]
    eos = saved.eos_token_id
    assert config.eos_token_ids == ([] if eos is None else eos if isinstance(eos, list) else [eos])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size must be an integer from 1"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"hidden_size": 2**40}, "hidden_size must be an integer"),
        ({"hidden_size": 65}, "hidden_size .* multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads .* multiple of num_key_value_heads"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"hidden_act": 3}, "hidden_act must be a string"),
        ({"architectures": []}, "architectures must name"),
        ({"architectures": ...}, "architectures must name"),
        ({"torch_dtype": "int4"}, "torch_dtype must be one of"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id"),
        ({"quantization_config": []}, "quantization_config must be an object"),
        ({"rope_scaling": 3}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 1.0}}, "high_freq_factor must be above"),
        ({"rope_parameters": {"full_attention": {}, "linear_attention": {}}}, "differs between full_attention, linear"),
        ({"rope_theta": 0}, "rope_theta must be"),
        ({"model_type": "mistral", "layer_types": ["full_attention"]}, "layer_types must be a list of"),
        ({"model_type": "mistral", "layer_types": ["mamba"] * 4}, "mamba"),
        ({"hidden_size": ..., "text_config": {"hidden_size": 1}}, "multimodal"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_config(write(tmp_path, **changes))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_config(tmp_path)
    path = tmp_path / "config.json"
    for content in (b"{", b"\xff\xfe\xfa", b"[" * 100_000, b""):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not valid JSON"):
            load_config(tmp_path)
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        load_config(tmp_path)
    path.write_bytes(b" " * (MAX_JSON_BYTES + 1))
    with pytest.raises(CheckpointError, match="larger than 10 MiB"):
        load_config(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_config(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KEYS = [*LLAMA, "rope_scaling", "rope_parameters", "rope_theta", "sliding_window", "layer_types", "use_sliding_window"]


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_any_value_loads_or_is_refused(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> None:
    folder = write(tmp_path_factory.mktemp("config"), **changes)
    try:
        load_config(folder)
    except CheckpointError as error:
        assert "config.json" in str(error)


def test_generation_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    absent = load_generation_defaults(tmp_path)
    assert absent.temperature is None and effective_eos_token_ids(config, absent) == [128001, 128009]

    path = tmp_path / "generation_config.json"
    path.write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [5, 6, 5]})
    )
    defaults = load_generation_defaults(tmp_path)
    assert (defaults.temperature, defaults.top_k, defaults.top_p, defaults.min_p) == (0.6, 20, 0.95, None)
    assert effective_eos_token_ids(config, defaults) == [5, 6]

    path.write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert load_generation_defaults(tmp_path).temperature == 0.0
    path.write_text(json.dumps({"top_p": 2}))
    with pytest.raises(CheckpointError, match=r"generation_config.json: top_p must be a number from 0 to 1"):
        load_generation_defaults(tmp_path)


def test_gemma_3_as_it_is_published(tmp_path: Path) -> None:
    """google/gemma-3-4b-it says little of its language model; what it leaves out is what transformers takes for it."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps({**outer, "text_config": text, "vision_config": {}}))
    config = load_config(tmp_path)
    assert config.architecture == "Gemma3ForCausalLM" and config.eos_token_ids == [1, 106]
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings) == (262_208, 131_072, True)
    assert config.layer_windows[:6] == [1024] * 5 + [None] and config.hidden_act == "gelu_pytorch_tanh"
    assert (config.rope.type, config.rope.factor, config.rope.theta) == ("linear", 8.0, 1e6)
    assert config.local_rope is not None and (config.local_rope.type, config.local_rope.theta) == ("default", 1e4)


def test_experts_alone_need_no_size_of_an_mlp(tmp_path: Path) -> None:
    """Qwen3.5-MoE has no intermediate_size."""
    raw = {**LLAMA, "moe_intermediate_size": 24}
    del raw["intermediate_size"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_config(tmp_path).intermediate_size == 24


def test_the_first_name_of_compressed_tensors_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "compression_config": {"quant_method": "x"}}))
    assert load_config(tmp_path).quantization_config == {"quant_method": "x"}
