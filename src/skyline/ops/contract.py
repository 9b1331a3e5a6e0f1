"""What an op is: a name, a reference in plain torch, and everything needed to check and to price another kernel for it.

Model code calls ops like functions. Called with tensors, an op runs its reference; called with the proxies of a capture
(see `skyline.graph.capture`), it records one leaf node. Kernels elsewhere are interchangeable providers of these ops.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

Tolerance = dict[torch.dtype, tuple[float, float]]  # dtype -> (rtol, atol) against the reference in float32

DEFAULT_TOLERANCE: Tolerance = {
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """The least an execution must do: bytes moved (each counted once) and floating point operations."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True, slots=True)
class Case:
    """One generated input of an op, for testing a kernel against the reference."""

    label: str
    args: tuple[Any, ...]
    mutated: tuple[torch.Tensor, ...] = ()  # tensors the op writes in place; they are compared too


CaseGenerator = Callable[[torch.dtype, torch.Generator], Iterator[Case]]


@dataclass(eq=False)
class Op:
    """A leaf of the graph. `signature` order is the calling convention of every kernel of this op."""

    name: str
    reference: Callable[..., Any]
    cost: Callable[..., Cost]
    cases: CaseGenerator
    num_outputs: int | Callable[..., int] = 1  # 0: works by its side effect alone
    tolerance: Tolerance = field(default_factory=lambda: DEFAULT_TOLERANCE)
    # Result on the meta device. None: the reference itself, which must then not look at values, and only make views:
    # torch's rules for arithmetic on that device are Python, whose first use imports its compiler, a second of time.
    meta: Callable[..., Any] | None = None
    # Whether kernels are held against the reference in their own dtype, not in float32: where a number that is rounded
    # on the way is quantized to few bits then, another rounding gives quite another result.
    rounds: bool = False

    def __post_init__(self) -> None:
        self.__name__ = self.name  # torch.fx names nodes by it
        self.__doc__ = self.reference.__doc__
        self.signature = inspect.signature(self.reference)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        proxy = next((value for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy)), None)
        if proxy is None:
            return self.reference(*args, **kwargs)
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        node: Any = proxy.tracer.create_proxy("call_function", self, bound.args, {})
        count = self.num_outputs(*bound.args) if callable(self.num_outputs) else self.num_outputs
        return node if count <= 1 else tuple(node[index] for index in range(count))

    def __repr__(self) -> str:
        return f"ops.{self.name}"


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    if op.name in OPS:
        raise ValueError(f"op {op.name} is defined twice")
    OPS[op.name] = op
    return op


def nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def randn(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(tuple(shape), generator=generator) * scale).to(dtype)
