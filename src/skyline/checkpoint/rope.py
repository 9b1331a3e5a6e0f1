"""The rotary position embedding's settings, in both of the forms that config.json uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from skyline.checkpoint.fields import Fields

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]

MAX_POSITIONS = 2**27


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding (https://arxiv.org/abs/2104.09864) and how it is stretched to longer contexts.

    `factor` is the ratio of the stretched to the original context (1.0 for "default"). Only "llama3" uses
    `low_freq_factor` and `high_freq_factor`; only "yarn" (https://arxiv.org/abs/2309.00071) uses `beta_fast`,
    `beta_slow`, `attention_factor`, `mscale`, `mscale_all_dim` (None or 0: infer from `factor`) and `truncate`.
    `original_max_position_embeddings` is the context in tokens that the model was first trained on; where the
    checkpoint does not say, it is max_position_embeddings.
    """

    type: RopeType
    theta: float
    original_max_position_embeddings: int
    factor: float = 1.0
    partial_rotary_factor: float = 1.0  # share of head_dim that is rotated
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def read_local_rope(config: Mapping[str, Any], where: str, max_position_embeddings: int) -> RopeConfig | None:
    """Of the layers with a sliding window, where the config tells them apart (Gemma 3 does); else None.

    transformers 5 writes `rope_parameters` by kind of layer, before it was `rope_local_base_freq`, never stretched.
    """
    fields = Fields(config, where)
    values = (fields.optional_object("rope_parameters") or {}).get("sliding_attention")
    if isinstance(values, dict):
        return read_rope({"rope_parameters": values}, where, max_position_embeddings)
    theta = fields.optional_number("rope_local_base_freq", 1.0, 1e12)
    return None if theta is None else RopeConfig("default", theta, max_position_embeddings)


def _of_full_attention(values: Mapping[str, Any], outer: Fields, key: str) -> dict[str, Any]:
    """What holds for full attention, of settings by kind of layer."""
    if not values.keys() <= {"full_attention", "sliding_attention"}:
        raise outer.error(key, f"differs between {', '.join(values)}; supported are full_attention, sliding_attention")
    found = values.get("full_attention")
    if not isinstance(found, dict):
        raise outer.error(key, "says nothing of full_attention")
    return found


def read_rope(config: Mapping[str, Any], where: str, max_position_embeddings: int) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before); CheckpointError if invalid.

    Precedence follows transformers: `rope_scaling` over `rope_parameters`, and a theta inside over the one beside it.
    """
    outer = Fields(config, where)
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = outer.optional_object(key) or {}
    if any(isinstance(value, dict) for value in values.values()):
        values = _of_full_attention(values, outer, key)
    inner = Fields(values, f"{where}: {key}")

    rope_type = inner.text("rope_type", inner.text("type", "default"))
    if rope_type not in get_args(RopeType):
        raise inner.error("rope_type", f"{rope_type!r} is not supported; supported are {', '.join(get_args(RopeType))}")

    original = inner.integer("original_max_position_embeddings", 1, MAX_POSITIONS, max_position_embeddings)
    if rope_type in ("llama3", "yarn"):
        original = outer.integer("original_max_position_embeddings", 1, MAX_POSITIONS, original)
    theta = inner.number("rope_theta", 1.0, 1e12, outer.number("rope_theta", 1.0, 1e12, 10_000.0))
    partial = outer.number("partial_rotary_factor", 0.0, 1.0, 1.0)
    rope = RopeConfig(
        type=cast(RopeType, rope_type),
        theta=theta,
        original_max_position_embeddings=original,
        factor=1.0 if rope_type == "default" else inner.number("factor", 1e-3, 1e6),
        partial_rotary_factor=inner.number("partial_rotary_factor", 0.0, 1.0, partial),
        low_freq_factor=inner.number("low_freq_factor", 1e-6, 1e6, None if rope_type == "llama3" else 1.0),
        high_freq_factor=inner.number("high_freq_factor", 1e-6, 1e6, None if rope_type == "llama3" else 4.0),
        beta_fast=inner.number("beta_fast", 1e-6, 1e6, 32.0),
        beta_slow=inner.number("beta_slow", 1e-6, 1e6, 1.0),
        attention_factor=inner.optional_number("attention_factor", 0.0, 1e6),
        mscale=inner.optional_number("mscale", 0.0, 1e6),
        mscale_all_dim=inner.optional_number("mscale_all_dim", 0.0, 1e6),
        truncate=inner.boolean("truncate", True),
    )
    if rope.type == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise inner.error("high_freq_factor", f"must be above low_freq_factor ({rope.low_freq_factor:g})")
    return rope
