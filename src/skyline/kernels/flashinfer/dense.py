"""Norm and activation."""

from __future__ import annotations

from typing import cast

import flashinfer
from torch import Tensor

from skyline.kernels.flashinfer import calls
from skyline.kernels.flashinfer.trials import checked
from skyline.kernels.triton import activations, norms


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not x.shape[0]:
        return x.new_empty(x.shape)

    def foreign() -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return cast(Tensor, flashinfer.rmsnorm(**calls.rmsnorm(rows, weight, eps))).view(x.shape)

    return checked(("rms_norm of", x.shape[-1], x.dtype), foreign, lambda: norms.rms_norm(x, weight, eps))


def silu_mul(gate_up: Tensor) -> Tensor:
    if not gate_up.shape[0]:
        return gate_up.new_empty((0, gate_up.shape[-1] // 2))
    return checked(
        ("silu_mul of", gate_up.shape[-1], gate_up.dtype),
        lambda: cast(Tensor, flashinfer.silu_and_mul(**calls.silu_and_mul(gate_up.contiguous()))),
        lambda: activations.silu_mul(gate_up),
    )
