"""Every Triton kernel computes what its op's reference does: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from skyline.kernels import Kernel, candidates
from skyline.kernels.triton import PROVIDER
from skyline.ops import OPS, Op
from tests.kernels.test_kernels import _results, _wide

_MOST_CASES = 12
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = [(op, kernel) for op in OPS.values() for kernel in candidates(op.name) if kernel.provider == PROVIDER]


def moved(value: Any) -> Any:
    """A copy on the device that is tested."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE, copy=True)
    if isinstance(value, tuple):
        return tuple(moved(part) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # caches, batches, quantized weights
        fields = {field.name: moved(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return type(value)(**fields)
    return value


@pytest.mark.parametrize("op,kernel", KERNELS, ids=[op.name for op, _ in KERNELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_kernel_equals_the_reference(op: Op, kernel: Kernel, dtype: torch.dtype) -> None:
    cases = list(op.cases(dtype, torch.Generator().manual_seed(3)))
    if DEVICE.type == "cpu":  # the interpreter takes a second for some of them
        cases = cases[:: -(-len(cases) // _MOST_CASES)]
    for case in cases:
        given = copy.deepcopy(case.args)
        expected = _results(op.reference, given if op.rounds else tuple(map(_wide, given)))
        actual = _results(kernel.run, tuple(moved(value) for value in case.args))
        rtol, atol = op.tolerance[dtype]
        for want, got in zip(expected, actual, strict=True):
            assert got.shape == want.shape, case.label
            if not torch.allclose(got.float().cpu(), want.float(), rtol=rtol, atol=atol):
                worst = (got.float().cpu() - want.float()).abs().max()
                pytest.fail(f"{case.label}: off by {worst}, rtol {rtol}, atol {atol}")
