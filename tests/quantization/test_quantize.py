"""The integers and scales that a weight becomes, against the formulas written out in numpy, one value at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from skyline.ops.quantized import QuantizedWeight, int4_case_weight, int8_case_weight
from skyline.quantization import GROUPS, quantize_int4, quantize_int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(5, 64), (7, 200), (1, 1), (3, 31), (2, 3, 96)]
HALF_ULP = 2.0**-11  # of a float16, relative


def _weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.rand((*shape[:-1], 1), generator=generator)
    weight[..., ::5] = 0
    return weight.to(dtype)


def _same(first: QuantizedWeight, second: QuantizedWeight) -> bool:
    pairs = ((first.values, second.values), (first.scales, second.scales), (first.zeros, second.zeros))
    return first.group == second.group and all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs
    )


def _int8_row(row: np.ndarray) -> tuple[list[int], np.float32]:
    largest = max(abs(value) for value in row)
    inverse = np.float32(127) / largest if largest else np.float32(0)
    return [int(np.rint(value * inverse)) for value in row], largest / np.float32(127)


def _int4_group(part: np.ndarray, symmetric: bool) -> tuple[list[int], np.float16, float]:
    if symmetric:
        scale = np.float16(max(part, key=abs) / np.float32(-8))
        step = np.float32(scale)
        return [int(min(7, max(-8, np.rint(value / step if scale else 0)))) for value in part], scale, 0
    low, high = min(np.float32(0), *part), max(np.float32(0), *part)
    scale = np.float16((high - low) / np.float32(15))
    step = np.float32(scale)
    zero = np.rint(-low / step) if scale else 0
    return [int(min(15, max(0, np.rint(value / step if scale else 0) + zero))) for value in part], scale, zero


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = _weight(shape, dtype)
    quantized = quantize_int8(weight)
    assert quantized.shape == shape and quantized.scales.shape == shape[:-1] and quantized.group is None
    assert quantized.values.dtype == torch.int8 and quantized.scales.dtype == torch.float32
    values, scales = quantized.values.view(-1, shape[-1]), quantized.scales.view(-1)
    for index, row in enumerate(weight.float().view(-1, shape[-1]).numpy()):
        expected, scale = _int8_row(row)
        assert values[index].tolist() == expected and scales[index].item() == scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4_equals_the_formula(shape: tuple[int, ...], group: int, symmetric: bool) -> None:
    weight, k = _weight(shape, torch.bfloat16), shape[-1]
    quantized = quantize_int4(weight, group, symmetric)
    groups = -(-k // group)
    assert quantized.shape == shape and quantized.scales.shape == (*shape[:-1], groups)
    assert quantized.scales.dtype == torch.float16 and quantized.group == group
    assert (quantized.zeros is None) == symmetric
    values, scales = quantized.values.view(-1, k), quantized.scales.view(-1, groups)
    zeros = torch.zeros_like(scales) if quantized.zeros is None else quantized.zeros.view(-1, groups)
    for (index, row), part in itertools.product(
        enumerate(weight.float().view(-1, k).numpy()), range(groups)
    ):  # the last group may be shorter
        columns = slice(part * group, (part + 1) * group)
        expected, scale, zero = _int4_group(row[columns], symmetric)
        assert values[index, columns].tolist() == expected
        assert scales[index, part].item() == scale and zeros[index, part].item() == zero


def test_ties_go_to_the_even_neighbour() -> None:
    assert quantize_int8(torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5]])).values.tolist() == [[127, 0, 2, 2, 0, -2]]
    assert quantize_int4(torch.tensor([[-8, 0.5, 1.5, 2.5, -0.5, 7.5]])).values.tolist() == [[-8, 0, 2, 2, 0, 7]]


def test_the_largest_of_a_group_is_minus_eight_whatever_its_sign() -> None:
    for sign in (1, -1):
        quantized = quantize_int4(sign * torch.tensor([[-4.0, 2.0, 3.5, 1.0]]), 32)
        assert quantized.scales.item() == sign * 0.5
        assert quantized.values.tolist() == [[-8, 4, 7, 2]]


def test_the_first_of_equal_magnitudes_decides_the_sign() -> None:
    assert quantize_int4(torch.tensor([[1.0, 8.0, -8.0]])).scales.item() == -1
    assert quantize_int4(torch.tensor([[1.0, -8.0, 8.0]])).scales.item() == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_off_by_half_a_step_at_most(shape: tuple[int, ...]) -> None:
    weight = _weight(shape)
    quantized = quantize_int8(weight)
    error = (quantized.dequantize() - weight).abs()
    assert bool((error <= quantized.scales.unsqueeze(-1) * 0.50001).all())


@pytest.mark.parametrize("group", GROUPS)
def test_int4_is_off_by_half_a_step_except_where_eight_was_cut_to_seven(group: int) -> None:
    weight = _weight((40, 200))
    quantized = quantize_int4(weight, group)
    steps = quantized.scales.float().repeat_interleave(group, dim=-1)[:, :200]
    error, cut = (quantized.dequantize() - weight).abs() / steps.abs(), weight / steps > 7.5
    assert cut.any()
    assert error[~cut].max() <= 0.5 + 8 * HALF_ULP
    assert error[cut].max() <= 1 + 8 * HALF_ULP


@pytest.mark.parametrize("group", GROUPS)
def test_int4_with_zero_points_is_off_by_half_a_step(group: int) -> None:
    weight = _weight((40, 200)) + torch.linspace(-1, 1, 40).unsqueeze(1)  # also groups on one side of 0
    quantized = quantize_int4(weight, group, symmetric=False)
    assert quantized.zeros is not None
    assert quantized.zeros.min() == 0 and quantized.zeros.max() == 15
    steps = quantized.scales.float().repeat_interleave(group, dim=-1)[:, :200]
    error = (quantized.dequantize() - weight).abs() / steps
    assert error.max() <= 0.5 + 16 * HALF_ULP


def test_zero_stays_zero() -> None:
    weight = _weight((9, 100)) + 0
    weight[4] = 0
    for quantized in (quantize_int8(weight), quantize_int4(weight, 32), quantize_int4(weight, 32, symmetric=False)):
        assert bool((quantized.dequantize()[weight == 0] == 0).all())


def test_values_too_small_for_a_scale_become_zero() -> None:
    weight = torch.tensor([[1e-39, -1e-39, 0.0], [1e-45, 0.0, 0.0]])
    for quantized in (quantize_int8(weight), quantize_int4(weight), quantize_int4(weight, symmetric=False)):
        assert bool((quantized.dequantize() == 0).all())


def test_scales_below_the_normal_float16_are_close_all_the_same() -> None:
    weight = torch.linspace(-1e-6, 3e-6, 64).unsqueeze(0)
    for symmetric in (True, False):
        assert (quantize_int4(weight, 64, symmetric).dequantize() - weight).abs().max() < 5e-7


@pytest.mark.parametrize("seed", range(5))
def test_quantizing_again_changes_nothing(seed: int) -> None:
    """The weights of the ops' cases; kernels with layouts of their own are given them dequantized."""
    generator = torch.Generator().manual_seed(seed)
    for n, k in ((40, 64), (34, 72), (130, 200)):
        weight = int8_case_weight(n, k, generator)
        assert _same(quantize_int8(weight.dequantize()), weight)
        for group in GROUPS:
            for zeros in (False, True):
                weight = int4_case_weight(n, k, group, zeros, generator)
                assert _same(quantize_int4(weight.dequantize(), group, symmetric=not zeros), weight)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([float("nan")], "has 1 NaN values"),
        ([float("inf"), float("-inf")], "has 2 infinite values"),
        ([float("nan"), float("inf")], "has 1 NaN and 1 infinite values"),
    ],
)
def test_what_is_no_number_is_refused(bad: list[float], message: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.ones((4, 40), dtype=dtype)
        weight[2, 39 - len(bad) : 39] = torch.tensor(bad, dtype=dtype)
        for quantize in (quantize_int8, quantize_int4, lambda w: quantize_int4(w, 32, symmetric=False)):
            with pytest.raises(ValueError, match=message):
                quantize(weight)


def test_a_scale_beyond_float16_is_refused() -> None:
    weight = torch.tensor([[1e6, 1.0]])
    for symmetric in (True, False):
        with pytest.raises(ValueError, match="beyond float16"):
            quantize_int4(weight, 32, symmetric)
    assert quantize_int8(weight).values.tolist() == [[127, 0]]


def test_bytes_are_counted_as_packed() -> None:
    weight = _weight((6, 100))
    assert quantize_int8(weight).nbytes == 6 * (100 + 4)
    assert quantize_int4(weight, 32).nbytes == 6 * (50 + 4 * 2)
    assert quantize_int4(weight, 64, symmetric=False).nbytes == 6 * (50 + 2 * 4)
    assert quantize_int4(_weight((2, 3, 96)), 32).nbytes == 6 * (48 + 3 * 2)
