"""Recorded steps: the native calls of a step, found out once and then made by one call from Python.

At batch 1 a step of a small model has hundreds of calls, and what Python does between them is time in which the memory
rests. A step is recorded by running it while noting which functions of the library are called with what. Its tensors
must lie in the same places whenever it is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from skyline.kernels.cpu import native

# By function that streams a packed weight: where among its arguments the weight is.
_WEIGHT = {"linear": 6}

Step = tuple[Callable[..., Any], tuple[Any, ...]]  # what is called, and with what
_NativeCall = tuple[str, tuple[Any, ...]]


class Recording:
    """A step that is run again and again: callables, each with its arguments.

    The first two runs go through Python and are compared: what makes the same calls both times makes them always, by
    the rule that a kernel's function depends on its arguments' values only where it calls the library. A callable that
    passes a tensor of its own making, or calls nothing, is called as it is in every run.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps
        self._noted: list[list[_NativeCall]] | None = None
        self._replay: list[Callable[[], Any]] | None = None

    @property
    def recorded(self) -> bool:
        return self._replay is not None

    def __call__(self) -> None:
        if self._replay is not None:
            for run in self._replay:
                run()
            return
        noted = []
        calls: list[_NativeCall] = []
        with native.wrapped(lambda functions: _Notes(functions, calls)):
            for run, arguments in self._steps:
                calls.clear()
                run(*arguments)
                noted.append(list(calls))
        if self._noted is None:
            self._noted = noted
        else:
            self._replay = self._parts(self._noted, noted)
            self._noted = None

    def _parts(self, before: list[list[_NativeCall]], now: list[list[_NativeCall]]) -> list[Callable[[], Any]]:
        parts: list[Callable[[], Any]] = []
        natives: list[_NativeCall] = []
        for (run, arguments), first, second in zip(self._steps, before, now, strict=True):
            if first and len(first) == len(second) and all(map(_same, first, second)):
                natives += second
                continue
            if natives:
                parts.append(_replay(natives))
                natives = []
            parts.append(partial(run, *arguments))
        return [*parts, _replay(natives)] if natives else parts


class _Notes:
    """The library, noting what is called."""

    def __init__(self, functions: Any, calls: list[_NativeCall]) -> None:
        self._functions, self._calls = functions, calls

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function, calls = getattr(self._functions, name), self._calls

        def call(*arguments: Any) -> Any:
            calls.append((name, arguments))
            return function(*arguments)

        return call


def _same(first: _NativeCall, second: _NativeCall) -> bool:
    name, arguments = second
    return first[0] == name and len(first[1]) == len(arguments) and all(map(_alike, first[1], arguments))


def _alike(first: Any, second: Any) -> bool:
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return type(first) is type(second) and bool(first == second)
    return (first.data_ptr(), first.shape, first.stride(), first.dtype) == (
        second.data_ptr(),
        second.shape,
        second.stride(),
        second.dtype,
    )


def _replay(calls: Sequence[_NativeCall]) -> Callable[[], Any]:
    """One function that makes these calls."""
    import tvm_ffi

    library = native.library()
    weights = np.zeros((len(calls), 2), np.int64)
    for row, (name, arguments) in enumerate(calls):
        if name in _WEIGHT:
            weight = arguments[_WEIGHT[name]]
            weights[row] = weight.data_ptr(), weight.nbytes
    held = [
        [tvm_ffi.from_dlpack(value) if isinstance(value, torch.Tensor) else value for value in arguments]
        for _, arguments in calls
    ]
    run: Callable[[], Any] = library.replay([getattr(library, name) for name, _ in calls], held, weights)
    return run
