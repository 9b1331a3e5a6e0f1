"""Attention over paged KV memory, and the write to it."""

from __future__ import annotations

from torch import Tensor

from skyline.kernels.cpu.native import cached, library, provide
from skyline.ops import AttentionBatch, KVCache


def _paged_attention(
    out: Tensor,
    q: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    softcap: float | None,
) -> None:
    if window is not None and window < 1:
        raise ValueError(f"paged_attention: a window of {window} tokens")
    library().paged_attention(
        out,
        q,
        *cache.tensors,
        cache.k_scale,
        cache.v_scale,
        batch.of(cache).block_tables,
        batch.query_starts,
        batch.context_lens,
        scale,
        window or 0,
        sinks,
        softcap or 0.0,
    )


def _kv_write(k: Tensor, v: Tensor, cache: KVCache, batch: AttentionBatch) -> None:
    library().kv_write(k, v, *cache.tensors, cache.k_scale, cache.v_scale, batch.of(cache).slot_mapping)


provide("paged_attention", _paged_attention, cached)
provide("kv_write", _kv_write, cached)
