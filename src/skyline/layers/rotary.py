"""Rotary position embedding: the table of cosines and sines, for every way of stretching it to longer contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from skyline.checkpoint.rope import RopeConfig
from skyline.layers.context import LayerContext


class RotaryEmbedding(nn.Module):
    """Holds `table` [max_positions, R] float32, cos | sin, of the R of head_dim that are rotated, for many layers.

    The angles are computed in float32, in the order of transformers' operations: that is what models were trained with,
    and at position 100,000 the last bit of a frequency is already visible in the angle.
    """

    table: Tensor

    def __init__(self, context: LayerContext, rope: RopeConfig, head_dim: int, max_positions: int) -> None:
        super().__init__()
        rotary = int(head_dim * rope.partial_rotary_factor) // 2 * 2
        if context.device.type == "meta":
            table = torch.empty((max_positions, rotary), dtype=torch.float32, device="meta")
        else:
            frequencies, scale = inverse_frequencies(rope, rotary)
            angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
            table = torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(scale).to(context.device)
        self.register_buffer("table", table, persistent=False)  # checkpoints do not hold it


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Radians a position for each of the head_dim / 2 planes, float32 on the CPU, and the factor on cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.type == "linear":
        return plain / rope.factor, 1.0
    if rope.type == "llama3":
        return _llama3(plain, rope), 1.0
    if rope.type == "yarn":
        return _yarn(plain, rope, head_dim), _yarn_attention_factor(rope)
    # "dynamic" changes theta only for sequences beyond max_position_embeddings, and the registry allows none of those.
    return plain, 1.0


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: slow planes are stretched by `factor`, fast ones kept, those between are interpolated.

    https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py
    """
    turns = rope.original_max_position_embeddings * plain / (2 * math.pi)  # within the original context
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(plain: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN (https://arxiv.org/abs/2309.00071, section 3.2): like llama3, with a ramp over the planes' indices."""

    def plane_with(turns: float) -> float:
        """The (fractional) index of the plane that makes so many turns within the original context."""
        length = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = plane_with(rope.beta_fast), plane_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # transformers' way around a ramp of no width
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return plain / rope.factor * stretched + plain * (1 - stretched)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """Both q and k carry it, so attention logits grow by its square (YaRN, section 3.4)."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:  # DeepSeek's way of writing it
        return _mscale(rope, rope.mscale) / _mscale(rope, rope.mscale_all_dim)
    return _mscale(rope, 1.0)


def logit_factor(rope: RopeConfig) -> float:
    """By what DeepSeek's attention logits grow, rotated part or not, where the context is stretched."""
    return 1.0 if rope.type == "default" or not rope.mscale_all_dim else _mscale(rope, rope.mscale_all_dim) ** 2


def _mscale(rope: RopeConfig, weight: float) -> float:
    return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0
