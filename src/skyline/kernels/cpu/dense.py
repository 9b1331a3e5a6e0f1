"""Ops on rows of activations."""

from __future__ import annotations

from torch import Tensor

from skyline.kernels.cpu.native import library, provide


def _rows(x: Tensor) -> Tensor:
    """x [..., H] as a matrix."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _silu_mul(out: Tensor, gate_up: Tensor) -> None:
    library().silu_mul(_rows(out), _rows(gate_up))


def _add(out: Tensor, x: Tensor, y: Tensor) -> None:
    library().add(_rows(out), _rows(x), _rows(y))


def _rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    if x.shape[-1] != weight.shape[0]:
        raise ValueError(f"rms_norm: rows of {x.shape[-1]} and a weight of {weight.shape[0]}")
    library().rms_norm(_rows(out), _rows(x), weight, eps)


def _head_rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    library().rms_norm(_rows(out), _rows(x), weight, eps)


def _add_rms_norm(out: Tensor, total: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    library().add_rms_norm(_rows(out), _rows(total), _rows(x), _rows(residual), weight, eps)


def _select_rows(out: Tensor, x: Tensor, rows: Tensor) -> None:
    library().select_rows(out, x, rows)


def _topk_router(weights: Tensor, ids: Tensor, logits: Tensor, top_k: int, renormalize: bool) -> None:
    library().topk_router(weights, ids, logits, top_k, renormalize)


provide("silu_mul", _silu_mul)
provide("add", _add)
provide("rms_norm", _rms_norm)
provide("head_rms_norm", _head_rms_norm)
provide("add_rms_norm", _add_rms_norm)
provide("select_rows", _select_rows)
provide("topk_router", _topk_router)
