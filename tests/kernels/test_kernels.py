"""Every kernel of every op computes what the op's reference computes in float32, within the op's tolerance."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from skyline.kernels import Kernel, Request, candidates
from skyline.kernels.cpu import native
from skyline.ops import OPS, LayerCache

KERNELS = [(op, kernel) for op in OPS.values() for kernel in candidates(op.name)]


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.float()
    if isinstance(value, LayerCache):
        fields = [field.name for field in dataclasses.fields(value)]
        tensors = {name: part for name in fields if isinstance(part := getattr(value, name), torch.Tensor)}
        return dataclasses.replace(value, dtype=torch.float32, **{name: part.float() for name, part in tensors.items()})  # type: ignore[call-arg]
    return value


def _results(run: Callable[..., Any], arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    """What it returns, and what is cached afterwards."""
    result = run(*arguments)
    cached = [part for value in arguments if isinstance(value, LayerCache) for part in value.tensors]
    return [*(result if isinstance(result, tuple) else () if result is None else (result,)), *cached]


@pytest.mark.parametrize("op,kernel", KERNELS, ids=[f"{op.name}-{kernel.provider}" for op, kernel in KERNELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_equals_the_reference(op: Any, kernel: Kernel, dtype: torch.dtype) -> None:
    # Under some options, that is: the cases do not depend on those.
    requests = [Request(op, "cpu", dtype, batch_invariant, isa=native.available()) for batch_invariant in (False, True)]
    reasons = [kernel.supports(request) for request in requests]
    if None not in reasons:
        pytest.skip(str(reasons[0]))
    cases = list(op.cases(dtype, torch.Generator().manual_seed(3)))
    assert cases
    for case in cases:
        given = copy.deepcopy(case.args)
        expected = _results(op.reference, given if op.rounds else tuple(map(_wide, given)))
        actual = _results(kernel.run, copy.deepcopy(case.args))
        rtol, atol = op.tolerance[dtype]
        for want, got in zip(expected, actual, strict=True):
            assert got.shape == want.shape, case.label
            assert torch.allclose(got.float(), want.float(), rtol=rtol, atol=atol), case.label
