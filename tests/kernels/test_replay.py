"""Recorded calls of the native kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from skyline.kernels.cpu import native
from skyline.kernels.cpu.replay import Recording

pytestmark = pytest.mark.skipif(native.available() == "none", reason="needs the CPU kernels")


def test_tensors_are_read_where_they_lie() -> None:
    x, y, out, twice = torch.ones(3, 8), torch.ones(3, 8), torch.empty(3, 8), torch.empty(3, 8)
    python: list[str] = []

    def add(out: Any, x: Any, y: Any) -> None:
        python.append("add")
        native.library().add(out, x, y)

    recording = Recording([(add, (out, x, y)), (add, (twice, out, out))])
    for value in range(5):
        x.fill_(value)
        recording()
        assert twice.eq(2 * (value + 1)).all()
        assert recording.recorded == (value >= 1)
    assert len(python) == 2 * 2, "from the third run on nothing goes through Python"


def test_tensors_of_the_moment_are_not_replayed() -> None:
    """What makes a tensor of its own, or calls torch, is called as it is; what is around it is replayed."""
    x, out, doubled, final = torch.ones(2, 8), torch.empty(2, 8), torch.empty(2, 8), torch.empty(2, 8)

    def add(out: Any, x: Any, y: Any) -> None:
        native.library().add(out, x, y)

    def add_copy(out: Any, x: Any) -> None:
        native.library().add(out, x.clone(), x)

    def double(out: Any, x: Any) -> None:
        torch.mul(x, 2, out=out)

    recording = Recording([(add, (out, x, x)), (double, (doubled, out)), (add_copy, (final, doubled))])
    for value in (1.0, 2.0, 3.0, 4.0):
        x.fill_(value)
        recording()
        assert final.eq(8 * value).all()
    assert recording.recorded


def test_an_error_of_a_recorded_call_is_raised() -> None:
    token_ids, slots = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    starts, tokens = torch.zeros(1, dtype=torch.int64), torch.full((1,), 7)

    def put(*arguments: Any) -> None:
        native.library().decode_outputs(*arguments)

    recording = Recording([(put, (token_ids, slots, starts, tokens))])
    for position in range(3):
        starts.fill_(position)
        recording()
    assert recording.recorded and token_ids[0].tolist() == [0, 7, 7, 7]
    starts.fill_(3)
    with pytest.raises(ValueError, match="no such slot or position"):
        recording()
    starts.fill_(0)
    recording()
