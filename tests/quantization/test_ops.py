"""What the cases of the ops do not cover: rows that are no numbers, exactness, and weights that are only described."""

from __future__ import annotations

import pytest
import torch

from skyline.ops import QuantizedWeight, linear, linear_int4, linear_int8, linear_int8_weight_only
from skyline.ops.quantized import int4_case_weight, int8_case_weight, quantize_rows
from skyline.quantization import quantize_int4, quantize_int8

_every_op = pytest.mark.parametrize("op", [linear_int8, linear_int8_weight_only, linear_int4], ids=lambda op: op.name)


def _weight(op: object, n: int, k: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(2)
    return int4_case_weight(n, k, 64, True, generator) if op is linear_int4 else int8_case_weight(n, k, generator)


@_every_op
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_in_its_row(op: object, bad: float) -> None:
    weight, x = _weight(op, 24, 72), torch.randn((5, 72), generator=torch.Generator().manual_seed(0))
    expected = op(x, weight)
    x[2, 7] = bad
    got = op(x, weight)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(got[others], expected[others])
    if op is linear_int8:
        assert bool(got[2].isnan().all())
    else:
        assert not bool(got[2].isfinite().all())


@_every_op
def test_rows_of_zeros_give_the_bias(op: object) -> None:
    bias = torch.randn(24, generator=torch.Generator().manual_seed(0))
    for x in (torch.zeros(3, 72), torch.full((3, 72), 1e-40)):
        torch.testing.assert_close(op(x, _weight(op, 24, 72), bias), bias.expand(3, 24))


@_every_op
def test_no_rows(op: object) -> None:
    assert op(torch.empty((0, 72)), _weight(op, 24, 72), None, True).shape == (0, 12)


@_every_op
def test_many_rows_of_weight(op: object) -> None:
    """More than a reference widens at a time."""
    weight, x = _weight(op, 9001, 8), torch.randn((2, 8), generator=torch.Generator().manual_seed(0))
    got = op(x, weight)
    assert got.shape == (2, 9001)
    torch.testing.assert_close(got[:, 4090:4100], op(x, weight.rows(4090, 4100)))


def test_rows_are_quantized_to_the_even_neighbour() -> None:
    levels, scales = quantize_rows(torch.tensor([[127, 0.5, 1.5, -2.5], [0.0, 0, 0, 0], [-254, 1, 3, 5]]))
    assert levels.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0], [-127, 0, 2, 2]]
    assert scales.flatten().tolist() == [1, 0, 2]


def test_int8_sums_are_exact() -> None:
    """2^24 + 1, which no float32 sum of products gets to, before the one rounding to float32."""
    k = 1041
    values = torch.full((1, k), 127, dtype=torch.int8)
    weight = QuantizedWeight(values, torch.ones(1))
    x = torch.full((1, k), 127.0)
    assert linear_int8(x, weight).item() == float(torch.tensor(127.0 * 127 * k))
    x[0, 1:] = torch.tensor([127.0, -127.0]).repeat(k // 2)
    assert linear_int8(x, weight).item() == 127 * 127


@_every_op
def test_quantization_costs_little_precision(op: object) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dense = torch.randn((16, 512), generator=generator), torch.randn((64, 512), generator=generator) * 512**-0.5
    quantized = quantize_int4(dense) if op is linear_int4 else quantize_int8(dense)
    exact, got = linear(x.double(), dense.double()), op(x, quantized).double()
    error = ((got - exact).square().mean() / exact.square().mean()).sqrt()
    assert error < (0.12 if op is linear_int4 else 0.015)


@_every_op
@pytest.mark.parametrize("silu_mul", [False, True])
def test_a_plain_weight_costs_what_the_quantized_one_would(op: object, silu_mul: bool) -> None:
    plain, x = torch.empty((40, 200), device="meta", dtype=torch.bfloat16), torch.empty((3, 200), device="meta")
    dense = torch.zeros((40, 200))
    quantized = quantize_int4(dense) if op is linear_int4 else quantize_int8(dense)
    cost = op.cost(x, plain, None, silu_mul)
    assert cost == op.cost(x, quantized, None, silu_mul)
    weights = 40 * (100 + 4 * 2) if op is linear_int4 else 40 * (200 + 4)
    assert cost.bytes == weights + 4 * (3 * 200 + 3 * (20 if silu_mul else 40))
    assert cost.flops == 2 * 3 * 40 * 200
    assert op.meta(x, plain, None, silu_mul).shape == (3, 20 if silu_mul else 40)
