"""Products by packed weights longer than what stays in a cache: right, and the same bits for every number of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from skyline.kernels.cpu import native
from skyline.kernels.cpu.packed import Format, pack, packed_layout
from skyline.ops.fp4 import fp4_case_weight
from skyline.ops.fp8 import FP8, Fp8Weight
from skyline.ops.quantized import ByteRows
from tests.kernels.test_tuning import FORMATS, kernel_of, weight_of

pytestmark = pytest.mark.skipif(native.available() == "none", reason="no compiled kernels here")

N, K = 72, 1100  # a panel that is not full, and a K that is no multiple of any step
# What quantizing the activations costs, relative to the size of a row of results.
ERRORS = {"int8": 2e-2, "int4 by 32": 2e-2, "int4 by 128": 2e-2}
ALL = {**FORMATS, "float32": ("linear", Format.FLOAT32, 0)}


def product(name: str, weight: Any, x: torch.Tensor, gated: bool) -> torch.Tensor:
    op, format, group = ALL[name]
    out = torch.empty(len(x), N // 2 if gated else N, dtype=x.dtype)
    kernel = kernel_of("linear", Format.BFLOAT16, 0) if format is Format.FLOAT32 else kernel_of(op, format, group)
    kernel.into(out, x, weight, None, gated)
    return out


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_every_number_of_rows_gives_the_same_bits(name: str, gated: bool, instruction_set: str) -> None:
    _, format, group = ALL[name]
    dtype = torch.float32 if format is Format.FLOAT32 else torch.bfloat16
    generator = torch.Generator().manual_seed(4)
    weight = weight_of(format, group, torch.randn((N, K), generator=generator).to(dtype) / 32, gated)
    x = torch.randn((150, K), generator=generator).to(dtype)
    together = product(name, weight, x, gated)
    begin = 0
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 32, 37):
        apart = product(name, weight, x[begin : begin + rows], gated)
        assert torch.equal(apart, together[begin : begin + rows]), rows
        begin += rows
    assert begin == len(x)


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 40, 600])
@pytest.mark.parametrize("name", ALL)
def test_equals_the_product_of_its_values(name: str, rows: int, instruction_set: str) -> None:
    _, format, group = ALL[name]
    dtype = torch.float32 if format is Format.FLOAT32 else torch.bfloat16
    generator = torch.Generator().manual_seed(rows)
    weight = weight_of(format, group, torch.randn((N, K), generator=generator).to(dtype) / 32)
    x = torch.randn((rows, K), generator=generator).to(dtype)
    expected = x.double() @ weight.dense().double().T
    error = (product(name, weight, x, False).double() - expected).abs().max() / expected.abs().max()
    assert error < ERRORS.get(name, 1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_share_out_all_panels(threads: int, instruction_set: str) -> None:
    """Fewer panels than threads, one more than a multiple, more than tasks; and several turns of rows."""
    generator = torch.Generator().manual_seed(threads)
    kernel = kernel_of("linear", Format.BFLOAT16, 0)
    native.library().pool_start(torch.full((threads,), -1, dtype=torch.int32).numpy())
    try:
        for panels in (1, 2, 3, 5, 7, 16, 17, 33, 83):
            for rows in (1, 600) if panels < 10 else (1,):
                weight = weight_of(Format.BFLOAT16, 0, torch.randn((32 * panels, 32), generator=generator).bfloat16())
                x = torch.randn((rows, 32), generator=generator).bfloat16()
                out = torch.full((rows, 32 * panels), torch.nan, dtype=torch.bfloat16)
                kernel.into(out, x, weight, None, False)
                expected = x.float() @ weight.dense().float().T
                assert (out.float() - expected).abs().max() < 2e-2 * expected.abs().max(), (panels, rows)
    finally:
        native.stop_threads()


@pytest.mark.parametrize("group", [16, 32])
def test_fp4_is_kept_as_it_is(group: int, instruction_set: str) -> None:
    """All codes and scales of either kind, a K that ends within a group, and groups whose scale is next to nothing."""
    generator = torch.Generator().manual_seed(group)
    stored = fp4_case_weight(N, K, group, generator)
    if group == 32:
        stored.scales[5:9, ::3] = torch.tensor([0, 1, 2, 3], dtype=torch.uint8)[:, None]
    weight = pack(stored, packed_layout(Format.FP4, group=group))
    expected = stored.dequantize()
    if group == 32:  # with these, not all codes are numbers of bfloat16
        expected[(stored.scales < 2).repeat_interleave(32, 1)[:, :K]] = 0
    assert torch.equal(weight.dense(), expected)
    kernel = kernel_of("linear_fp4", Format.FP4, group)
    for rows in (1, 9, 40):
        x, out = torch.randn((rows, K), generator=generator).bfloat16(), torch.empty(rows, N).bfloat16()
        kernel.into(out, x, weight)
        wanted = x.double() @ expected.double().T
        assert (out.double() - wanted).abs().max() < 5e-3 * wanted.abs().max()


@pytest.mark.parametrize("blocks", [False, True])
def test_fp8_is_kept_as_it_is(blocks: bool, instruction_set: str) -> None:
    """All numbers there are, in rows whose scales differ, and a K and an N that end within a block."""
    n, k = 200, 300
    codes = torch.arange(n * k, dtype=torch.int64) % 256
    codes[(codes & 127) == 127] = 0  # NaN
    values = codes.view(n, k)[:, torch.randperm(k)].to(torch.uint8).view(FP8)
    scales = torch.rand((2, 3) if blocks else (n,)) + 0.5
    stored = Fp8Weight(values, scales)
    weight = pack(stored, packed_layout(Format.FP8))
    assert weight.nbytes < (1.1 if blocks else 1.05) * 224 * 320
    expected = stored.dequantize()
    assert torch.equal(weight.dense(), expected)
    kernel = kernel_of("linear_fp8", Format.FP8, 128 if blocks else 0)
    for rows in (1, 9, 40):
        x, out = torch.randn(rows, k).bfloat16(), torch.empty(rows, n).bfloat16()
        kernel.into(out, x, weight)
        wanted = x.double() @ expected.double().T
        assert (out.double() - wanted).abs().max() < 5e-3 * wanted.abs().max()


@pytest.mark.parametrize("blocks", [False, True])
def test_fp8_without_numbers_is_refused(blocks: bool, instruction_set: str) -> None:
    values = torch.zeros(3, 40)
    values[1, 7] = torch.nan
    weight = Fp8Weight(values.to(FP8), torch.ones((1, 1) if blocks else (3,)))
    with pytest.raises(ValueError, match="holds NaN; quantize the checkpoint again"):
        pack(weight, packed_layout(Format.FP8))


KINDS = {
    "by 32": (Format.BYTES, 32, False),
    "by 32, offsets": (Format.BYTES, 32, True),
    "blocks": (Format.BYTES, 16, False),
    "blocks, offsets": (Format.BYTES, 16, True),
    "six bits": (Format.SIX_BITS, 16, False),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_bytes_give_the_bits_of_bfloat16(name: str, gated: bool, instruction_set: str) -> None:
    """A byte times its scale, less a minimum, rounded to bfloat16: as if the weight had been that."""
    format, group, offsets = KINDS[name]
    rows = byte_rows(format, group, offsets)
    layout = packed_layout(format, gated=gated, group=group, zeros=offsets)
    weight, plain = pack(rows, layout), pack(rows.dequantize().bfloat16(), packed_layout(Format.BFLOAT16, gated=gated))
    assert torch.equal(weight.dense(torch.bfloat16), rows.dequantize().bfloat16())
    bits = 6.6 if format is Format.SIX_BITS else 9.2 if offsets else 8.6
    assert weight.nbytes < bits / 8 * 96 * rows.shape[1] * 1.03  # whole panels, and steps of K
    kernel = kernel_of("linear", Format.BFLOAT16, 0)
    for count in (1, 3, 8, 9, 40, 200):
        x = torch.randn(count, rows.shape[1]).bfloat16()
        outs = [torch.empty(count, N // 2 if gated else N).bfloat16() for _ in range(2)]
        for out, packed in zip(outs, (weight, plain), strict=True):
            kernel.into(out, x, packed, None, gated)
        assert torch.equal(*outs), count


def byte_rows(format: Format, group: int, offsets: bool) -> ByteRows:
    """With the extremes of their levels."""
    k = K if group == 32 else 1024
    low, high = (-32, 32) if format is Format.SIX_BITS else (0, 32) if offsets else (-128, 128)
    levels = torch.randint(low, high, (N, k)).to(torch.int8)
    levels[0, :2] = torch.tensor([low, high - 1])
    factors = ((torch.rand(N, -(-k // (32 if group == 32 else 256))) + 0.5) / 2000).half()
    if group == 32:
        return ByteRows(levels, factors, (torch.randn(factors.shape) / 30).half() if offsets else None)
    scales = torch.randint(-128, 128, (N, k // 16)).to(torch.int8)
    if not offsets:
        return ByteRows(levels, factors, None, scales)
    # Groups of 32, as Q4_K has them.
    minima = torch.randint(0, 256, (N, k // 32)).to(torch.uint8)
    return ByteRows(levels, factors, (torch.rand(factors.shape) / 3000).half(), scales[:, ::2].contiguous(), minima)
