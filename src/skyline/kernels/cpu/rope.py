"""Rotary position embedding, alone and together with the norm before it and the cache write after it."""

from __future__ import annotations

from torch import Tensor

from skyline.kernels.cpu.native import cached, library, provide
from skyline.ops import AttentionBatch, KVCache


def _rope(q_out: Tensor, k_out: Tensor, q: Tensor, k: Tensor, positions: Tensor, table: Tensor, head_dim: int) -> None:
    library().rope(q_out, k_out, q, k, positions, table, head_dim)


def _rope_kv_write(
    out: Tensor,
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    table: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
) -> None:
    keys, values = cache.tensors
    scales = cache.k_scale, cache.v_scale
    library().rope_kv_write(
        out, qkv, q_norm, k_norm, eps, positions, table, keys, values, *scales, batch.of(cache).slot_mapping
    )


provide("rope", _rope)
provide("rope_kv_write", _rope_kv_write, cached)
