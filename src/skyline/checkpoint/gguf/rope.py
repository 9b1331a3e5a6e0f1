"""The rotary embedding's settings in the metadata, as config.json's rope_parameters."""

from __future__ import annotations

from typing import Any

import numpy as np

from skyline.checkpoint.fields import Fields

# Of every published Llama 3.1 to 3.3; a GGUF file has only the factors that follow from them.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# What llama.cpp knows of yarn and config.json does not, and where it makes no difference.
_NEUTRAL = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}
_MAX_POSITIONS = 2**31


def rope_parameters(
    fields: Fields,
    architecture: str,
    head_dim: int,
    positions: int,
    factors: np.ndarray[Any, np.dtype[np.float32]] | None,
) -> dict[str, Any]:
    """`factors`: what the frequency of each pair of dimensions is divided by, which is how llama3 is written.

    Raises CheckpointError for what config.json cannot say.
    """
    prefix = f"{architecture}.rope."
    theta = fields.number(prefix + "freq_base", 1.0, 1e12, 10_000.0)
    rotated = fields.integer(prefix + "dimension_count", 1, head_dim, head_dim)
    # Always said, because some families have another default than 1.
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": theta,
        "partial_rotary_factor": rotated / head_dim,
    }
    scaling = prefix + "scaling."
    factor = fields.number(scaling + "factor", 0.0, 1e6, fields.number(prefix + "scale_linear", 0.0, 1e6, 0.0))
    # llama.cpp takes linear for a factor without a type, and no factor for 0 and 1.
    kind = fields.text(scaling + "type", "linear") if factor not in (0.0, 1.0) else "none"
    if kind not in ("none", "linear", "yarn"):
        raise fields.error(scaling + "type", f"{kind!r} is not supported; supported are none, linear and yarn")
    if factors is not None:
        if kind != "none":
            raise fields.error(scaling + "type", f"is {kind!r}, but the file has rope_freqs.weight as well")
        rope |= _llama3(fields, rotated, theta, factors)
    elif kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor, **_yarn(fields, scaling, positions)}
    return rope


def _yarn(fields: Fields, scaling: str, positions: int) -> dict[str, Any]:
    for name, neutral in _NEUTRAL.items():
        if fields.number(scaling + name, -1e6, 1e6, neutral) != neutral:
            raise fields.error(scaling + name, f"is supported only as {neutral:g}")
    return {
        "original_max_position_embeddings": fields.integer(
            scaling + "original_context_length", 1, _MAX_POSITIONS, positions
        ),
        "beta_fast": fields.number(scaling + "yarn_beta_fast", 1e-6, 1e6, 32.0),
        "beta_slow": fields.number(scaling + "yarn_beta_slow", 1e-6, 1e6, 1.0),
    }


def _llama3(
    fields: Fields, rotated: int, theta: float, factors: np.ndarray[Any, np.dtype[np.float32]]
) -> dict[str, Any]:
    """The settings that give these factors (the formula of transformers' _compute_llama3_parameters)."""
    if factors.shape != (rotated // 2,) or not np.isfinite(factors).all():
        raise fields.error("rope_freqs.weight", f"must hold {rotated // 2} finite numbers")
    factor = float(factors.max())
    if (factors == 1).all():
        return {}
    wavelengths = 2 * np.pi * theta ** (np.arange(0, rotated, 2) / rotated)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = np.clip((_LLAMA3["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise fields.error(
            "rope_freqs.weight", "does not stretch the rotary embedding as Llama 3 does; that is not supported"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
