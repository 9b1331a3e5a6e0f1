"""FP8 linears with what makes their input: attention, or the other linear of an MLP.

For GPUs: what makes the input can then quantize it as well, which saves a launch and a way through memory. A kernel
does so where it is the faster for the rows at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from skyline.ops import attention, fused, fused_linear
from skyline.ops.attention import BATCHES, make_batch, make_cache
from skyline.ops.batch import AttentionBatch
from skyline.ops.caches import KVCache
from skyline.ops.contract import Case, Cost, Op, randn, register
from skyline.ops.dense import linear_meta
from skyline.ops.fp8 import FP8_TOLERANCE, Fp8Weight, fp8_case_weight

_linear = fused_linear.fused_linear_fp8


def _gated_mlp_fp8(
    x: Tensor,
    gate_up: Fp8Weight,
    down: Fp8Weight,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """x [T, H] -> silu(gate) * up of its norm through gate_up [2 I, H], through down [N, I], plus residual, [T, N].

    Both products are `fused_linear_fp8`: norm [H] and residual [T, N] may be None.
    """
    hidden = _linear.reference(x, gate_up, None, True, norm, eps)
    result: Tensor = _linear.reference(hidden, down, None, False, None, 0.0, residual)
    return result


def _gated_mlp_fp8_cost(
    x: Tensor, gate_up: Any, down: Any, norm: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None
) -> Cost:
    hidden = x.new_empty((x.shape[0], down.shape[1]))
    first = _linear.cost(x, gate_up, None, True, norm, eps, None)
    return first + _linear.cost(hidden, down, None, False, None, 0.0, residual)


def _gated_mlp_fp8_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in (1, 3, 17, 70):
        for blocks in (False, True):
            x, residual = (randn((rows, 32), dtype, generator) for _ in range(2))
            gate_up, down = (fp8_case_weight(n, k, blocks, generator) for n, k in ((272, 32), (32, 136)))
            norm = 1 + randn((32,), dtype, generator, 0.1)
            name = f"T={rows} blocks={blocks}"
            yield Case(f"{name} norm residual", (x, gate_up, down, norm, 1e-6, residual))
            yield Case(name, (x, gate_up, down, None, 0.0, None))


gated_mlp_fp8 = register(
    Op(
        "gated_mlp_fp8",
        _gated_mlp_fp8,
        cost=_gated_mlp_fp8_cost,
        cases=_gated_mlp_fp8_cases,
        meta=lambda x, gate_up, down, *_: linear_meta(x, down, None, False),
        tolerance=FP8_TOLERANCE,
    )
)


def _attention_linear_fp8(
    q: Tensor,
    weight: Fp8Weight,
    cache: KVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    positions: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """`paged_attention` of q [T, Hq * D], through `fused_linear_fp8` of weight [N, Hq * D] -> [T, N].

    With positions and table q is [T, (Hq + 2 Hk) * D], and attention is `rope_attention`.
    """
    if positions is not None and table is not None:
        q = fused.rope_kv_write.reference(q, q_norm, k_norm, eps, positions, table, cache, batch)
    attended = attention.paged_attention.reference(q, cache, batch, scale, window, sinks, softcap)
    result: Tensor = _linear.reference(attended, weight, bias, False, None, 0.0, residual)
    return result


def _attention_linear_fp8_cost(
    q: Tensor,
    weight: Any,
    cache: KVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *turn: Any,
) -> Cost:
    attends = (cache, batch, scale, window, sinks, softcap)
    if turn and turn[-1] is not None:
        first = fused.rope_attention.cost(q, *turn, *attends)
        q = q.new_empty((q.shape[0], weight.shape[1]))
    else:
        first = attention.paged_attention.cost(q, *attends)
    return first + _linear.cost(q, weight, bias, False, None, 0.0, residual)


def _attention_linear_fp8_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for starts, lengths in BATCHES:
        for head_dim, blocks in ((8, False), (128, True), (128, False), (256, True)):
            batch, cache = make_batch(starts, lengths), make_cache(dtype, generator, 1, head_dim)
            rows, columns = sum(lengths), 2 * head_dim
            q, weight = randn((rows, columns), dtype, generator), fp8_case_weight(16, columns, blocks, generator)
            bias, residual = randn((16,), dtype, generator), randn((rows, 16), dtype, generator)
            fixed = (q, weight, cache, batch, head_dim**-0.5)
            name = f"starts={starts} lengths={lengths} D={head_dim} blocks={blocks}"
            yield Case(name, (*fixed, None, None, None, None, residual))
            sinks = randn((2,), dtype, generator)
            yield Case(f"{name} all", (*fixed, 4, sinks, 1.5, bias, residual))
            qkv = torch.cat((q, randn((rows, 2 * head_dim), dtype, generator)), 1)
            angles = torch.rand((40, head_dim // 2), generator=generator) * 6
            positions = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
            norms = [randn((head_dim,), dtype, generator) for _ in range(2)]
            turn = (*norms, 1e-6, positions, torch.cat((angles.cos(), angles.sin()), -1))
            mutable = make_cache(dtype, generator, 1, head_dim)
            fixed = (qkv, weight, mutable, batch, head_dim**-0.5)
            yield Case(f"{name} turned", (*fixed, None, None, None, None, residual, *turn), mutated=mutable.tensors)


attention_linear_fp8 = register(
    Op(
        "attention_linear_fp8",
        _attention_linear_fp8,
        cost=_attention_linear_fp8_cost,
        cases=_attention_linear_fp8_cases,
        meta=lambda q, weight, *_: linear_meta(q, weight, None, False),
        tolerance=FP8_TOLERANCE,
    )
)
