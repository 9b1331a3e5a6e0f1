"""Linears on quantized weights beyond the ops' cases: layouts, several tiles and blocks of K, edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from skyline.kernels.triton import quantized
from skyline.kernels.triton.layouts import INT4, INT8, Int4Weight, fp4_words, unpack_words
from skyline.kernels.triton.widen import widen
from skyline.ops import OPS
from skyline.ops.fp4 import Fp4Weight, fp4_case_weight
from skyline.ops.quantized import int4_case_weight, int8_case_weight, quantize_rows
from skyline.quantization import quantize_int4, quantize_int8
from tests.kernels.triton.test_ops import DEVICE, moved


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _on_device(weight: Any) -> Any:
    if isinstance(weight, Fp4Weight):
        return Fp4Weight(moved(weight.values), moved(weight.scales), moved(weight.row_scales), weight.group)
    return moved(weight)


WEIGHTS = {
    "linear_int8": lambda n, k: int8_case_weight(n, k, _generator()),
    "linear_int8_weight_only": lambda n, k: int8_case_weight(n, k, _generator()),
    "linear_int4_weight_only": lambda n, k: int4_case_weight(n, k, 64, True, _generator()),
    "linear_fp4": lambda n, k: fp4_case_weight(n, k, 16, _generator()),
}
FOUR_BITS = {
    "int4": ("linear_int4_weight_only", lambda n, k: int4_case_weight(n, k, 32, False, _generator())),
    "int4 with zeros": ("linear_int4_weight_only", lambda n, k: int4_case_weight(n, k, 128, True, _generator())),
    "mxfp4": ("linear_fp4", lambda n, k: fp4_case_weight(n, k, 32, _generator())),
    "nvfp4": ("linear_fp4", lambda n, k: fp4_case_weight(n, k, 16, _generator())),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("rows", [1, 2, 129])
def test_many_blocks_and_a_ragged_end(name: str, rows: int) -> None:
    """More columns than all warps take in one go, several tiles of rows, bands that do not come out even."""
    k, weight = 1096, WEIGHTS[name](70, 1096)
    x, bias = (
        torch.randn(rows, k, generator=_generator()).bfloat16(),
        torch.randn(70, generator=_generator()).bfloat16(),
    )
    expected = OPS[name].reference(x.float(), weight, bias.float(), True)
    got = getattr(quantized, name)(moved(x), _on_device(weight), moved(bias), True)
    rtol, atol = OPS[name].tolerance[torch.bfloat16]
    torch.testing.assert_close(got.float().cpu(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", WEIGHTS)
def test_columns_of_a_wider_tensor_and_no_rows(name: str) -> None:
    run, weight = getattr(quantized, name), _on_device(WEIGHTS[name](40, 96))
    wide = torch.randn(3, 288, generator=_generator()).to(DEVICE)
    assert torch.equal(run(wide[:, 96:192], weight), run(wide[:, 96:192].contiguous(), weight))
    assert run(wide[:0, :96], weight, None, True).shape == (0, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 33, 129])
@pytest.mark.parametrize("name", FOUR_BITS)
def test_four_bits_times_any_number_of_rows(name: str, rows: int, dtype: torch.dtype) -> None:
    """In every way there is: by itself, in tiles, widened as a whole; of rows that lie in wider ones."""
    op, make = FOUR_BITS[name]
    weight, wide = make(70, 1096), torch.randn(rows, 1200, generator=_generator()).to(dtype)
    x = moved(wide)[:, 40:1136]
    expected = OPS[op].reference(x.float().cpu(), weight)
    got = getattr(quantized, op)(x, _on_device(weight))
    assert got.dtype == dtype and (got.float().cpu() - expected).norm() / expected.norm() < 4e-3


def test_extreme_scales_of_mxfp4_are_widened() -> None:
    weight = fp4_case_weight(4, 64, 32, _generator())
    weight.scales.copy_(torch.tensor([[100, 140], [3, 120], [253, 254], [127, 200]]))
    wide = widen(fp4_words(_on_device(weight)), torch.bfloat16)
    assert torch.equal(wide.float().cpu(), weight.dequantize())


def test_rows_are_quantized_to_the_bit() -> None:
    x = torch.randn(5, 424, generator=_generator()).bfloat16()
    x[1] = 0
    x[2, 3] = float("inf")
    x[3] *= 1e-38
    x[4] = torch.arange(424) * 0.5 - 127  # ties
    levels, scales = quantized.quantize_rows_int8(moved(x))
    want, want_scales = quantize_rows(x)
    assert torch.equal(levels.cpu().double(), want)
    assert torch.equal(scales.cpu(), want_scales[:, 0])


def test_a_row_with_nan_spoils_only_itself() -> None:
    weight = int8_case_weight(40, 64, _generator())
    x = torch.randn(3, 64, generator=_generator())
    x[1, 5] = float("nan")
    got = quantized.linear_int8(moved(x), moved(weight)).isnan().cpu()
    assert got.all(1).tolist() == got.any(1).tolist() == [False, True, False]


def _unpacked(weight: Int4Weight) -> Tensor:
    """float32, of its shape."""
    levels = unpack_words(weight.values, weight.k).float()
    zeros = 8.0 if weight.zeros is None else _spread(weight, weight.zeros)
    return (levels - zeros) * _spread(weight, weight.scales)


def _spread(weight: Int4Weight, per_group: Tensor) -> Tensor:
    return per_group.mT.float().repeat_interleave(weight.group, -1)[..., : weight.k]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", [(10, 71), (3, 10, 71)])
def test_int4_layout_holds_what_is_written(zeros: bool, shape: tuple[int, ...]) -> None:
    """In pieces that cross from one expert to the next, as floats and as integers; 71 columns take 16 words."""
    layout, weight = INT4[32, zeros], torch.randn(shape, generator=_generator())
    target, rows = layout.allocate(shape, torch.bfloat16, DEVICE), weight.view(-1, 71)
    ready = quantize_int4(rows, 32, not zeros)
    layout.write(target, 0, rows[:7])
    layout.write(target, 7, ready.rows(7, len(rows)))
    assert target.shape == shape and target.values.numel() == 16 * len(rows)
    assert torch.equal(_unpacked(target).cpu(), ready.dequantize().view(shape))


def test_int8_layout_holds_what_is_written() -> None:
    weight = torch.randn(3, 10, 70, generator=_generator())
    target, rows = INT8.allocate((3, 10, 70), torch.bfloat16, DEVICE), weight.view(-1, 70)
    ready = quantize_int8(rows)
    INT8.write(target, 0, rows[:17])
    INT8.write(target, 17, ready.rows(17, 30))
    assert target.shape == weight.shape and target.values.device.type == DEVICE.type
    assert torch.equal(target.dequantize().cpu(), ready.dequantize().view(3, 10, 70))


@pytest.mark.parametrize("zeros", [False, True])
def test_int4_from_its_layout(zeros: bool) -> None:
    weight = int4_case_weight(40, 104, 32, zeros, _generator())
    x = moved(torch.randn(3, 104, generator=_generator()))
    target = INT4[32, zeros].allocate((40, 104), torch.bfloat16, DEVICE)
    INT4[32, zeros].write(target, 0, weight)
    for rows in (1, 3):
        got = quantized.linear_int4_weight_only(x[:rows], target)
        assert torch.equal(got, quantized.linear_int4_weight_only(x[:rows], moved(weight)))


def test_mxfp4_keeps_scales_from_end_to_end() -> None:
    """The smallest exponents, of which float32 is subnormal, times large ones of x."""
    weight = fp4_case_weight(16, 64, 32, _generator())
    weight.scales[:8], weight.scales[8:] = 0, 200
    x = torch.randn(2, 64, generator=_generator())
    for rows, factor in ((slice(0, 8), 2.0**120), (slice(8, 16), 2.0**-70)):
        part = Fp4Weight(weight.values[rows], weight.scales[rows], weight.row_scales[rows], 32)
        expected = OPS["linear_fp4"].reference(x * factor, part)
        got = quantized.linear_fp4(moved(x * factor), _on_device(part)).cpu()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0.0)
