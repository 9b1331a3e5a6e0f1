"""Ops on rows of activations that only some architectures need: other norms, other activations, gates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.ops.contract import Case, Cost, Op, nbytes, randn, register

_ROWS = (1, 3, 17)


def _offset_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H], weight [H] -> x / sqrt(mean(x^2) + eps) * (1 + weight): Gemma's norm.

    All in float32, rounded once.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.float())).to(x.dtype)


def _offset_head_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, heads * D], weight [D] -> offset_rms_norm of each head by itself, [T, heads * D]."""
    return _offset_rms_norm(
        x.reshape(*x.shape[:-1], x.shape[-1] // weight.shape[0], weight.shape[0]), weight, eps
    ).flatten(-2)


def _norm_cost(x: Tensor, weight: Tensor, eps: float) -> Cost:
    return Cost(2 * nbytes(x) + nbytes(weight), 4 * x.numel())


def _offset_rms_norm_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in _ROWS:
        x, weight = randn((rows, 33), dtype, generator, 3.0), randn((33,), dtype, generator)
        yield Case(f"T={rows}", (x, weight, 1e-6))
        yield Case(f"T={rows} large eps", (x, weight, 0.5))


def _offset_head_rms_norm_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    weight = randn((8,), dtype, generator)
    for rows in _ROWS:
        yield Case(f"T={rows} strided", (randn((rows, 40), dtype, generator, 3.0)[:, 8:24], weight, 1e-6))


offset_rms_norm = register(
    Op(
        "offset_rms_norm",
        _offset_rms_norm,
        cost=_norm_cost,
        cases=_offset_rms_norm_cases,
        meta=lambda x, weight, eps: x.new_empty(x.shape),
    )
)
offset_head_rms_norm = register(
    Op(
        "offset_head_rms_norm",
        _offset_head_rms_norm,
        cost=_norm_cost,
        cases=_offset_head_rms_norm_cases,
        meta=lambda x, weight, eps: x.new_empty(x.shape),
    )
)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [T, H], weight and bias [H] -> (x - mean) / sqrt(variance + eps) * weight + bias (arXiv:1607.06450)."""
    return F.layer_norm(x.float(), (x.shape[-1],), weight.float(), bias.float(), eps).to(x.dtype)


def _layer_norm_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in _ROWS:
        weight, bias = (randn((32,), dtype, generator) for _ in range(2))
        yield Case(f"T={rows}", (randn((rows, 32), dtype, generator, 3.0), weight, bias, 1e-6))


layer_norm = register(
    Op(
        "layer_norm",
        _layer_norm,
        cost=lambda x, weight, bias, eps: Cost(2 * nbytes(x) + nbytes(weight, bias), 7 * x.numel()),
        cases=_layer_norm_cases,
        meta=lambda x, weight, bias, eps: x.new_empty(x.shape),
    )
)


def _gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x, gate [T, heads * D], weight [D] -> rms_norm of each head of x, times silu(gate), [T, heads * D].

    The norm is rounded to x's dtype before it meets the gate, which is activated in float32.
    """
    heads = (*x.shape[:-1], x.shape[-1] // weight.shape[0], weight.shape[0])
    wide = x.reshape(heads).float()
    normed = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (normed.float() * F.silu(gate.reshape(heads).float())).to(x.dtype).flatten(-2)


def _gated_rms_norm_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    weight = randn((8,), dtype, generator)
    for rows in _ROWS:
        x, gate = randn((rows, 24), dtype, generator, 3.0), randn((rows, 40), dtype, generator)[:, 16:]
        yield Case(f"T={rows}", (x, gate, weight, 1e-6))


gated_rms_norm = register(
    Op(
        "gated_rms_norm",
        _gated_rms_norm,
        cost=lambda x, gate, weight, eps: Cost(2 * nbytes(x) + nbytes(gate, weight), 8 * x.numel()),
        cases=_gated_rms_norm_cases,
        meta=lambda x, gate, weight, eps: x.new_empty(x.shape),
    )
)


def _gelu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2I] = gate | up -> gelu(gate) * up, [T, I], with the tanh form of gelu (arXiv:1606.08415)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def _gelu_mul_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in _ROWS:
        yield Case(f"T={rows}", (randn((rows, 36), dtype, generator),))


gelu_mul = register(
    Op(
        "gelu_mul",
        _gelu_mul,
        cost=lambda x: Cost(nbytes(x) * 3 // 2, 8 * x.numel()),
        cases=_gelu_mul_cases,
        meta=lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
    )
)


def _sigmoid_mul(x: Tensor, gate: Tensor) -> Tensor:
    """x [T, H], gate [T, H] or [T, 1] -> x * sigmoid(gate), [T, H]."""
    return x * torch.sigmoid(gate)


def _sigmoid_mul_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in _ROWS:
        yield Case(f"T={rows}", (randn((rows, 20), dtype, generator), randn((rows, 20), dtype, generator)))
        yield Case(f"T={rows} one gate", (randn((rows, 20), dtype, generator), randn((rows, 1), dtype, generator)))


sigmoid_mul = register(
    Op(
        "sigmoid_mul",
        _sigmoid_mul,
        cost=lambda x, gate: Cost(2 * nbytes(x) + nbytes(gate), 5 * x.numel()),
        cases=_sigmoid_mul_cases,
        meta=lambda x, gate: x.new_empty(x.shape),
    )
)


def _scale(x: Tensor, factor: float) -> Tensor:
    """x [T, H] -> x * factor. The factor is rounded to x's dtype first, as it is in the models that use it."""
    return x * torch.tensor(factor, dtype=x.dtype, device=x.device)


def _scale_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in _ROWS:
        yield Case(f"T={rows}", (randn((rows, 20), dtype, generator), 5.657))


scale = register(
    Op(
        "scale",
        _scale,
        cost=lambda x, factor: Cost(2 * nbytes(x), x.numel()),
        cases=_scale_cases,
        meta=lambda x, factor: x.new_empty(x.shape),
    )
)
