"""Every Triton kernel computes what its op's reference does: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from skyline.kernels import Kernel, candidates
from skyline.kernels.triton import PROVIDER
from skyline.ops import OPS, AttentionBatch, LayerCache, Op, QuantizedWeight
from skyline.ops.batch import BlockTables
from tests.kernels.test_kernels import _results, _wide

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = [(op, kernel) for op in OPS.values() for kernel in candidates(op.name) if kernel.provider == PROVIDER]


def moved(value: Any) -> Any:
    """A copy on the device that is tested."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE, copy=True)
    if isinstance(value, tuple):
        return tuple(moved(part) for part in value)
    if isinstance(value, (LayerCache, AttentionBatch, BlockTables, QuantizedWeight)):
        fields = {field.name: moved(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return type(value)(**fields)
    return value


@pytest.mark.parametrize("op,kernel", KERNELS, ids=[op.name for op, _ in KERNELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_kernel_equals_the_reference(op: Op, kernel: Kernel, dtype: torch.dtype) -> None:
    for case in op.cases(dtype, torch.Generator().manual_seed(3)):
        expected = _results(op.reference, tuple(_wide(copy.deepcopy(value)) for value in case.args))
        actual = _results(kernel.run, tuple(moved(value) for value in case.args))
        rtol, atol = op.tolerance[dtype]
        for want, got in zip(expected, actual, strict=True):
            assert got.shape == want.shape, case.label
            torch.testing.assert_close(
                got.float().cpu(), want.float(), rtol=rtol, atol=atol, msg=lambda text: f"{case.label}: {text}"
            )
