"""Ops on rows of activations: embedding, linear, norm, activation, residual."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.ops.contract import Case, Cost, Op, nbytes, randn, register
from skyline.ops.formats import plain_bytes

_ROWS = (1, 3, 17)


def _embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """ids [T] int, weight [V, H] -> [T, H]. Rows of the table."""
    return F.embedding(ids, weight)


def _embedding_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in _ROWS:
        ids = torch.randint(0, 50, (rows,), generator=generator, dtype=torch.int32)
        yield Case(f"T={rows}", (ids, randn((50, 24), dtype, generator)))


embedding = register(
    Op(
        "embedding",
        _embedding,
        cost=lambda ids, weight: Cost(nbytes(ids) + 2 * ids.numel() * weight.shape[1] * weight.element_size(), 0),
        cases=_embedding_cases,
        meta=lambda ids, weight: weight.new_empty((*ids.shape, weight.shape[1])),
    )
)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H], weight [H] -> x / sqrt(mean(x^2) + eps) * weight. Statistics in float32 (arXiv:1910.07467)."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def _rms_norm_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for shape in ((1, 32), (5, 33), (3, 4, 16)):
        weight = randn(shape[-1:], dtype, generator)
        yield Case(f"shape={shape}", (randn(shape, dtype, generator, 3.0), weight, 1e-6))
        yield Case(f"shape={shape} large eps", (randn(shape, dtype, generator), weight, 0.5))


rms_norm = register(
    Op(
        "rms_norm",
        _rms_norm,
        cost=lambda x, weight, eps: Cost(2 * nbytes(x) + nbytes(weight), 4 * x.numel()),
        cases=_rms_norm_cases,
        meta=lambda x, weight, eps: x.new_empty(x.shape),
    )
)


def _head_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, heads * D], weight [D] -> rms_norm of each head by itself, [T, heads * D]: the norm of queries and keys."""
    return _rms_norm(x.reshape(*x.shape[:-1], x.shape[-1] // weight.shape[0], weight.shape[0]), weight, eps).flatten(-2)


def _head_rms_norm_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    weight = randn((8,), dtype, generator)
    for rows in _ROWS:
        yield Case(f"T={rows}", (randn((rows, 24), dtype, generator, 3.0), weight, 0.5))
        # Queries arrive as columns of the merged projection.
        yield Case(f"T={rows} strided", (randn((rows, 40), dtype, generator, 3.0)[:, 8:24], weight, 1e-6))


head_rms_norm = register(
    Op(
        "head_rms_norm",
        _head_rms_norm,
        cost=lambda x, weight, eps: Cost(2 * nbytes(x) + nbytes(weight), 4 * x.numel()),
        cases=_head_rms_norm_cases,
        meta=lambda x, weight, eps: x.new_empty(x.shape),
    )
)


def _silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2I] = gate | up -> silu(gate) * up, [T, I] (SwiGLU, arXiv:2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _silu_mul_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in _ROWS:
        yield Case(f"T={rows}", (randn((rows, 36), dtype, generator),))


silu_mul = register(
    Op(
        "silu_mul",
        _silu_mul,
        cost=lambda x: Cost(nbytes(x) * 3 // 2, 3 * x.numel()),
        cases=_silu_mul_cases,
        meta=lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
    )
)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    """x [T, K], weight [N, K], bias [N] -> x @ weight.T + bias, [T, N] in x's dtype.

    With `silu_mul`, that goes through the op of this name, [T, N / 2]: the first half of the rows of weight is gate.
    """
    y = F.linear(x, weight, bias)
    return _silu_mul(y) if silu_mul else y


def linear_cost(x: Tensor, weight: Any, bias: Tensor | None = None, silu_mul: bool = False) -> Cost:
    """`weight`: a matrix [N, K], or anything else that has its `shape` and tells its `nbytes`."""
    rows, (n, k) = x.numel() // x.shape[-1], weight.shape
    out = rows * (n // 2 if silu_mul else n) * x.element_size()
    return Cost(nbytes(x, bias) + plain_bytes(weight) + out, 2 * rows * n * k)


def linear_meta(x: Tensor, weight: Any, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    n = weight.shape[0]
    return x.new_empty((x.shape[0], n // 2 if silu_mul else n))


def _linear_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in (*_ROWS, 33, 70):
        for n, k in ((40, 24), (34, 7), (130, 200)):
            x, weight = randn((rows, k), dtype, generator), randn((n, k), dtype, generator, k**-0.5)
            yield Case(f"T={rows} N={n} K={k}", (x, weight))
            yield Case(f"T={rows} N={n} K={k} bias", (x, weight, randn((n,), dtype, generator)))
            yield Case(f"T={rows} N={n} K={k} silu_mul", (x, weight, None, True))


linear = register(Op("linear", _linear, cost=linear_cost, cases=_linear_cases, meta=linear_meta))


def _add(x: Tensor, y: Tensor) -> Tensor:
    """x, y [T, H] -> x + y: the residual stream."""
    return x + y


def _add_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in _ROWS:
        yield Case(f"T={rows}", (randn((rows, 20), dtype, generator), randn((rows, 20), dtype, generator)))


add = register(
    Op(
        "add",
        _add,
        cost=lambda x, y: Cost(3 * nbytes(x), x.numel()),
        cases=_add_cases,
        meta=lambda x, y: x.new_empty(x.shape),
    )
)


def _split(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """x [T, sum(sizes)] -> views [T, size] of its columns. Costs nothing."""
    return torch.split(x, list(sizes), dim=-1)


def _split_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in _ROWS:
        yield Case(f"T={rows}", (randn((rows, 12), dtype, generator), (6, 4, 2)))


split = register(
    Op("split", _split, cost=lambda x, sizes: Cost(0, 0), cases=_split_cases, num_outputs=lambda x, sizes: len(sizes))
)


def _select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [T, H], rows [R] int64 -> x[rows], [R, H]: only sampled positions need logits."""
    return x.index_select(0, rows)


def _select_rows_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for picked in ([0], [3, 1, 4], []):
        yield Case(f"rows={picked}", (randn((5, 20), dtype, generator), torch.tensor(picked, dtype=torch.int64)))


select_rows = register(
    Op(
        "select_rows",
        _select_rows,
        cost=lambda x, rows: Cost(2 * rows.numel() * x.shape[1] * x.element_size(), 0),
        cases=_select_rows_cases,
        meta=lambda x, rows: x.new_empty((rows.shape[0], x.shape[1])),
    )
)
