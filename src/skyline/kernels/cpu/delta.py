"""Linear attention by the gated delta rule."""

from __future__ import annotations

from torch import Tensor

from skyline.kernels.cpu.native import library, provide
from skyline.ops import AttentionBatch, StateCache


def _states(batch: AttentionBatch) -> tuple[Tensor, Tensor, Tensor]:
    reads, writes = batch.device_states()
    return batch.query_starts, reads, writes


def _causal_conv(out: Tensor, x: Tensor, weight: Tensor, cache: StateCache, batch: AttentionBatch) -> None:
    library().causal_conv(out, x, weight, cache.tensors[0], *_states(batch))


def _gated_delta_rule(
    out: Tensor,
    qkv: Tensor,
    b: Tensor,
    a: Tensor,
    decay: Tensor,
    dt_bias: Tensor,
    key_heads: int,
    cache: StateCache,
    batch: AttentionBatch,
) -> None:
    library().gated_delta_rule(out, qkv, b, a, decay, dt_bias, key_heads, cache.tensors[1], *_states(batch))


provide("causal_conv", _causal_conv)
provide("gated_delta_rule", _gated_delta_rule)
