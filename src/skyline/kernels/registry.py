"""Kernels: providers of ops, and the choice among them.

Choosing is a pure function of the op, the hardware description and the options, so that it can be explained, and asked
for hardware that is not there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from skyline.ops import Op


@dataclass(frozen=True, slots=True)
class Request:
    """What a kernel is asked to support."""

    op: Op
    device: str  # "cpu" or "cuda"
    dtype: torch.dtype  # of the activations
    batch_invariant: bool = False


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op. `run` has the signature of the op's reference.

    `supports` returns None, or the reason why it cannot serve the request.
    """

    op: str
    provider: str
    run: Callable[..., Any]
    supports: Callable[[Request], str | None]


@dataclass(frozen=True, slots=True)
class Choice:
    kernel: Kernel
    reason: str
    rejected: tuple[tuple[str, str], ...]  # (provider, why not)


class NoKernelError(RuntimeError):
    """No provider supports an op under these options."""


# Fastest first. Registered in `skyline.kernels`; the torch reference is always the last resort.
_KERNELS: dict[str, list[Kernel]] = {}


def register(kernel: Kernel) -> None:
    _KERNELS.setdefault(kernel.op, []).append(kernel)


def candidates(op: str) -> list[Kernel]:
    return list(_KERNELS.get(op, ()))


def choose(request: Request) -> Choice:
    """The first kernel in order of preference that supports the request."""
    rejected: list[tuple[str, str]] = []
    for kernel in candidates(request.op.name):
        why_not = kernel.supports(request)
        if why_not is None:
            reason = "first in order of preference that supports the case" if rejected else "preferred provider"
            return Choice(kernel, reason, tuple(rejected))
        rejected.append((kernel.provider, why_not))
    tried = "; ".join(f"{provider}: {why}" for provider, why in rejected) or "none is registered"
    raise NoKernelError(f"no kernel for op {request.op.name} on {request.device} ({tried})")
