"""Kernels: providers of ops, and the choice among them.

Choosing is a pure function of the op, the hardware description and the options, so that it can be explained, and asked
for hardware that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from skyline.kernels.gpu import Gpu
from skyline.ops import Op

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Request:
    """What a kernel is asked to support."""

    op: Op
    device: str  # "cpu" or "cuda"
    dtype: torch.dtype  # of the activations
    batch_invariant: bool = False
    kv_dtype: torch.dtype | None = None  # of cached keys and values; None: that of the activations
    isa: str = "none"  # of the CPU, as in skyline.kernels.cpu.isa; "none" as well where no kernels could be built
    gpu: Gpu | None = None  # of device "cuda"
    prefer: str | None = None  # the provider that goes before all others


class Layout(Protocol):
    """How a kernel wants a weight to lie in memory. The loader writes the checkpoint's rows there as it reads them.

    Layouts are compared by identity: kernels that share one share the weight.
    """

    name: str

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> Any:
        """Room on a device for a weight of this shape, [N, K] or [E, N, K]; the result has `shape` and `nbytes`.

        Device "meta" has no such thing: where nothing is computed, kernels are described by the plain weight.
        """
        ...

    def write(self, target: Any, first_row: int, rows: Any) -> None:
        """Put rows [n, K] of the weight at first_row (counted over all experts). Any thread may call it.

        A layout of integers also takes rows that are integers already, a QuantizedWeight of its own bits, group and
        zero points; one of FP8 likewise Fp8Rows.
        """
        ...


@runtime_checkable
class Finishing(Layout, Protocol):
    """A layout that has something to do when all rows of a weight are there."""

    def finish(self, target: Any) -> bool:
        """False if the weight turned out to fit another layout only, in which `target` then is.

        Rows are not written again after it.
        """
        ...


def finish_weight(layout: Layout, target: Any) -> bool:
    """To be called once all rows of a weight are written, and before it is used. False as of `Finishing.finish`."""
    return layout.finish(target) if isinstance(layout, Finishing) else True


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op. `run` has the signature of the op's reference.

    `supports` returns None, or the reason why it cannot serve the request. `into(*outputs, *arguments)`, where there is
    one, writes its results to tensors it is given, so that a Program can plan its memory. `layouts` maps the position
    of a weight among the arguments to the layout it must have, or to a function that tells it from all the arguments;
    `any_layout` are positions where a layout that some other op wants of the same weight is understood. `tactics`, of a
    kernel whose first arguments are rows and a weight, are what `into` takes as its keyword `tactic` for a number of
    rows, the default first: ways to the same bits, of which measuring tells the fastest (skyline.kernels.tuning).
    `launches(gpu, *arguments)` is the least number of kernels that a call launches on a GPU, told from shapes, the
    host's numbers and descriptions of weights; without it, one.
    """

    op: str
    provider: str
    run: Callable[..., Any]
    supports: Callable[[Request], str | None]
    into: Callable[..., None] | None = None
    layouts: Mapping[int, Layout | Callable[[tuple[Any, ...]], Layout]] = field(default_factory=dict)
    any_layout: frozenset[int] = frozenset()
    tactics: Callable[[int], tuple[Any, ...]] | None = None
    launches: Callable[..., int] | None = None


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


def candidates(op: str, prefer: str | None = None) -> list[Kernel]:
    """In order of preference."""
    return sorted(_KERNELS.get(op, ()), key=lambda kernel: kernel.provider != prefer)


def choose(request: Request) -> Choice:
    """The first kernel in order of preference that supports the request."""
    rejected: list[tuple[str, str]] = []
    for kernel in candidates(request.op.name, request.prefer):
        why_not = kernel.supports(request)
        if why_not is None and kernel.provider == request.prefer:
            return Choice(kernel, "asked for", tuple(rejected))
        if why_not is None:
            reason = "first in order of preference that supports the case" if rejected else "preferred provider"
            return Choice(kernel, reason, tuple(rejected))
        rejected.append((kernel.provider, why_not))
    tried = "; ".join(dict.fromkeys(f"{provider}: {why}" for provider, why in rejected)) or "none is registered"
    raise NoKernelError(f"no kernel for op {request.op.name} on {request.device} ({tried})")


def others(request: Request, choice: Choice) -> list[tuple[str, str]]:
    """Every candidate that was not chosen, and why: those that could not serve, then those that were not needed."""
    behind = []
    for kernel in candidates(request.op.name, request.prefer)[len(choice.rejected) + 1 :]:
        first = choice.kernel.provider
        ahead = "another of its kernels" if kernel.provider == first else first
        behind.append((kernel.provider, kernel.supports(request) or f"supported, but {ahead} goes first"))
    return [*choice.rejected, *behind]
