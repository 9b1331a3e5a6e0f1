"""Norms, activations and gates that only some architectures use."""

from __future__ import annotations

from torch import Tensor

from skyline.kernels.cpu.native import library, provide


def _offset_rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    if x.shape[-1] != weight.shape[0]:
        raise ValueError(f"offset_rms_norm: rows of {x.shape[-1]} and a weight of {weight.shape[0]}")
    library().offset_rms_norm(out, x, weight, eps)


def _offset_head_rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    library().offset_rms_norm(out, x, weight, eps)


def _layer_norm(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    library().layer_norm(out, x, weight, bias, eps)


def _gated_rms_norm(out: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> None:
    library().gated_rms_norm(out, x, gate, weight, eps)


def _gelu_mul(out: Tensor, gate_up: Tensor) -> None:
    library().gelu_mul(out, gate_up)


def _sigmoid_mul(out: Tensor, x: Tensor, gate: Tensor) -> None:
    library().sigmoid_mul(out, x, gate)


def _scale(out: Tensor, x: Tensor, factor: float) -> None:
    library().scale_rows(out, x, factor)


provide("offset_rms_norm", _offset_rms_norm)
provide("offset_head_rms_norm", _offset_head_rms_norm)
provide("layer_norm", _layer_norm)
provide("gated_rms_norm", _gated_rms_norm)
provide("gelu_mul", _gelu_mul)
provide("sigmoid_mul", _sigmoid_mul)
provide("scale", _scale)
