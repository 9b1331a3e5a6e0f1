"""Ops that do the work of several, which the graph passes introduce. Their references are made of what they replace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from skyline.ops import attention, dense
from skyline.ops.batch import AttentionBatch
from skyline.ops.caches import KVCache
from skyline.ops.contract import DEFAULT_TOLERANCE, Case, Cost, Op, nbytes, randn, register


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [T, H], weight [H] -> rms_norm(x + residual, weight, eps) [T, H], and x + residual [T, H]."""
    total = dense.add.reference(x, residual)
    return dense.rms_norm.reference(total, weight, eps), total


def _add_rms_norm_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows, columns in ((1, 32), (5, 33), (17, 48)):
        x, residual = (randn((rows, columns), dtype, generator, 3.0) for _ in range(2))
        yield Case(f"T={rows} H={columns}", (x, residual, randn((columns,), dtype, generator), 1e-6))


add_rms_norm = register(
    Op(
        "add_rms_norm",
        _add_rms_norm,
        cost=lambda x, residual, weight, eps: Cost(4 * nbytes(x) + nbytes(weight), 5 * x.numel()),
        cases=_add_rms_norm_cases,
        meta=lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
        num_outputs=2,
    )
)


def _rope_kv_write(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    table: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
) -> Tensor:
    """qkv [T, (Hq + 2 Hk) * D] -> q [T, Hq * D], normalised and rotated; k, so too, and v go into the cache.

    q_norm, k_norm [D]: weights of the heads' RMSNorm, or both None for no norm. The rest as in `rope` and `kv_write`;
    Hk and D are the cache's.
    """
    kv_size = cache.num_kv_heads * cache.head_dim
    q, k, v = torch.split(qkv, [qkv.shape[1] - 2 * kv_size, kv_size, kv_size], dim=-1)
    if q_norm is not None and k_norm is not None:
        q, k = dense.head_rms_norm.reference(q, q_norm, eps), dense.head_rms_norm.reference(k, k_norm, eps)
    q, k = attention.rope.reference(q, k, positions, table, cache.head_dim)
    attention.kv_write.reference(k, v, cache, batch)
    rotated: Tensor = q
    return rotated


def _rope_kv_write_meta(qkv: Tensor, *rest: object) -> Tensor:
    cache = rest[5]
    assert isinstance(cache, KVCache)
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] - 2 * cache.num_kv_heads * cache.head_dim))


def _rope_kv_write_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for head_dim, rotary in ((8, 8), (32, 32), (32, 16)):
        angles = torch.rand((40, rotary // 2), generator=generator) * 6
        table = torch.cat((angles.cos(), angles.sin()), dim=-1)
        for starts, lengths in attention.BATCHES:
            for norm in (False, True):
                batch = attention.make_batch(starts, lengths)
                cache = attention.make_cache(dtype, generator, head_dim=head_dim)
                qkv = randn((sum(lengths), 8 * head_dim), dtype, generator)
                weights = [randn((head_dim,), dtype, generator) if norm else None for _ in range(2)]
                positions = torch.cat(
                    [torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]
                )
                yield Case(
                    f"starts={starts} lengths={lengths} D={head_dim} R={rotary} norm={norm}",
                    (qkv, *weights, 1e-6, positions, table, cache, batch),
                    mutated=cache.tensors,
                )


rope_kv_write = register(
    Op(
        "rope_kv_write",
        _rope_kv_write,
        cost=lambda qkv, q_norm, k_norm, eps, positions, table, cache, batch: Cost(
            2 * nbytes(qkv)
            + nbytes(batch.of(cache).slot_mapping)
            + positions.numel() * table.shape[1] * table.element_size()
            + nbytes(q_norm, k_norm),
            7 * qkv.numel(),
        ),
        cases=_rope_kv_write_cases,
        # The sum of two products can be near zero where each has been rounded at its own, larger magnitude.
        tolerance={**DEFAULT_TOLERANCE, torch.bfloat16: (1.6e-2, 3e-2)},
        meta=_rope_kv_write_meta,
    )
)


def _rope_attention(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    table: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`paged_attention` of what `rope_kv_write` makes of qkv [T, (Hq + 2 Hk) * D] -> [T, Hq * D]."""
    q = _rope_kv_write(qkv, q_norm, k_norm, eps, positions, table, cache, batch)
    result: Tensor = attention.paged_attention.reference(q, cache, batch, scale, window, sinks, softcap)
    return result


def _rope_attention_cost(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    table: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
    *rest: Any,
) -> Cost:
    q = _rope_kv_write_meta(qkv, q_norm, k_norm, eps, positions, table, cache, batch)
    first = rope_kv_write.cost(qkv, q_norm, k_norm, eps, positions, table, cache, batch)
    return first + attention.paged_attention.cost(q, cache, batch, *rest) + Cost(-2 * nbytes(q), 0)


def _rope_attention_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    """Those of `rope_kv_write`, in turns with a window, sinks and a limit of scores."""
    options: tuple[tuple[int | None, bool, float | None], ...] = ((None, False, None), (4, True, 1.5), (1, False, None))
    for index, case in enumerate(_rope_kv_write_cases(dtype, generator)):
        window, sink, softcap = options[index % len(options)]
        cache = case.args[6]
        assert isinstance(cache, KVCache)
        sinks = randn((case.args[0].shape[1] // cache.head_dim - 4,), dtype, generator) if sink else None
        yield Case(
            f"{case.label} W={window} sinks={sink} softcap={softcap}",
            (*case.args, 0.3, window, sinks, softcap),
            mutated=case.mutated,
        )


rope_attention = register(
    Op(
        "rope_attention",
        _rope_attention,
        cost=_rope_attention_cost,
        cases=_rope_attention_cases,
        tolerance=rope_kv_write.tolerance,
        meta=_rope_kv_write_meta,
    )
)
