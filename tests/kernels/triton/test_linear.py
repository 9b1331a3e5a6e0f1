"""Linears in Triton on shapes of several tiles, and how FP8 weights come into memory."""

from __future__ import annotations

import pytest
import torch

from skyline.kernels.fp8_layout import FP8_BLOCKS, FP8_ROWS
from skyline.kernels.triton import fused_fp8, linear
from skyline.kernels.triton.knobs import Knobs, using
from skyline.kernels.triton.thresholds import BAND_ROWS, in_words, quantizes_attention
from skyline.ops import OPS, Fp8Weight, KVCache
from skyline.ops.attention import make_batch
from skyline.ops.fp8 import FP8, Fp8Rows, fp8_case_weight, quantize_fp8
from tests.kernels.triton.test_ops import DEVICE, moved


def weight(n: int, k: int, kind: str) -> torch.Tensor | Fp8Weight:
    generator = torch.Generator().manual_seed(n)
    if kind == "bf16":
        return (torch.randn((n, k), generator=generator) * k**-0.5).bfloat16()
    return fp8_case_weight(n, k, kind == "blocks", generator)


@pytest.mark.parametrize("kind", ["bf16", "rows", "blocks"])
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(1, 140, 1100), (1, 256, 1101), (5, 300, 1100), (40, 300, 1100), (130, 300, 1100)]
)
def test_several_tiles(kind: str, rows: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    name = "fused_linear" if kind == "bf16" else "fused_linear_fp8"
    w, norm = weight(n, k, kind), (1 + 0.1 * torch.randn(k, generator=generator)).bfloat16()
    x = torch.randn((rows, k + 8), generator=generator).bfloat16()[:, :k]  # columns of a wider matrix
    residual, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in ((rows, n), (n,)))
    for options in ((None, True, norm, 1e-5, None), (bias, False, norm, 0.1, residual), (bias, True, None, 0.0, None)):
        wide = [option.float() if isinstance(option, torch.Tensor) else option for option in options]
        expected = OPS[name].reference(x.float(), w.float() if isinstance(w, torch.Tensor) else w, *wide)
        other = Knobs(vector=(2, 256, 4), gated=(8, 256, 4), fp8_normed=(4, 512, 1), fp8_gated=(4, 256, 2))
        for knobs in (Knobs(), other) if rows == 1 else (Knobs(),):  # the others are of one row
            with using(knobs):
                got = getattr(linear, name)(moved(x), moved(w), *(moved(option) for option in options))
            error = (got.float().cpu() - expected).norm() / expected.norm()
            as_it_is = isinstance(w, torch.Tensor) or (rows == 1 and in_words(w, options[1] is True))
            assert error < (1e-2 if as_it_is else 6e-2), (options, knobs, error)


@pytest.mark.parametrize("gated", [False, True])
def test_bands_fit_into_shared_memory(gated: bool) -> None:
    for shared in (101_376, 166_912, 232_448):
        for rows in range(1, BAND_ROWS + 1):
            for blocks in (False, True):
                tactic = linear.band_tactic(rows, gated, blocks, shared)
                wide = 16 if rows <= 16 else 32 if rows <= 32 else 64
                stage = ((2 if gated else 1) * tactic.rows + wide) * tactic.columns
                assert tactic.stages * stage <= shared, (rows, blocks, tactic)


def test_one_row_of_fp8_is_read_in_words() -> None:
    assert in_words(fp8_case_weight(384, 1100, False, torch.Generator()), True)
    assert not in_words(fp8_case_weight(384, 1101, False, torch.Generator()), False)
    assert in_words(fp8_case_weight(300, 1100, True, torch.Generator()), False)
    assert in_words(fp8_case_weight(512, 1100, True, torch.Generator()), True)
    assert not in_words(fp8_case_weight(384, 1100, True, torch.Generator()), True)  # 192 of gate, 192 of up


def _quantized_alike(values: torch.Tensor, scales: torch.Tensor, wanted: Fp8Weight) -> None:
    torch.testing.assert_close(scales.cpu(), wanted.scales, rtol=1e-6, atol=0)
    off = values.cpu().contiguous().view(torch.uint8) != wanted.values.view(torch.uint8)
    # A GPU's division is one unit off at times, and what lies between two numbers of FP8 can then go either way.
    assert off.float().mean() <= (0.0 if DEVICE.type == "cpu" else 0.005)


def test_rows_are_quantized_as_the_formula_says() -> None:
    x = torch.randn((3, 300), generator=torch.Generator().manual_seed(0)).bfloat16()
    x[1] = 0
    values, scales = linear.quantize_rows(moved(x))
    _quantized_alike(values, scales[:, 0], quantize_fp8(x))
    values, scales = linear.quantize_rows(moved(x), blocks=True)
    for first in range(0, 300, 128):
        _quantized_alike(
            values[:, first : first + 128], scales[:, first // 128], quantize_fp8(x[:, first : first + 128])
        )


@pytest.mark.parametrize("shape", [(300, 200), (2, 140, 200)], ids=str)
def test_rows_come_into_memory_in_pieces(shape: tuple[int, ...]) -> None:
    *_, n, k = shape
    plain = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    target = FP8_ROWS.allocate(shape, torch.bfloat16, DEVICE)
    rows = plain.view(-1, k)
    for first, last in ((100, len(rows)), (0, 37), (37, 100)):
        FP8_ROWS.write(target, first, rows[first:last])
    assert target.shape == shape
    torch.testing.assert_close(target.dequantize(), quantize_fp8(plain.to(DEVICE)).dequantize())
    with pytest.raises(ValueError, match="NaN"):
        FP8_ROWS.write(target, 0, torch.full((2, k), float("nan")))

    blocks = FP8_BLOCKS.allocate(shape, torch.bfloat16, DEVICE)
    values = rows.to(FP8)
    each = torch.rand((len(rows) // n, -(-n // 128), -(-k // 128))) + 0.5
    spread = torch.cat([scales.repeat_interleave(128, 0)[:n] for scales in each])
    for first, last in ((130, len(rows)), (0, 7), (7, 130)):
        FP8_BLOCKS.write(blocks, first, Fp8Rows(values[first:last], spread[first:last]))
    assert torch.equal(blocks.dequantize().cpu().view(-1, k), Fp8Rows(values, spread).dequantize())
    with pytest.raises(ValueError, match="stored"):
        FP8_BLOCKS.write(blocks, 0, rows[:3])


@pytest.mark.parametrize("kind", ["rows", "blocks"])
@pytest.mark.parametrize(("starts", "lengths"), [([9, 0, 20], [1, 1, 1]), ([9, 0], [1, 20]), ([0], [70])])
def test_attention_that_quantizes(kind: str, starts: list[int], lengths: list[int]) -> None:
    """By a knob also for weights with scales by rows, unless they meet more rows than bands take."""
    generator, rows = torch.Generator().manual_seed(1), sum(lengths)
    cache = KVCache(2, 128, torch.bfloat16)
    cache.k, cache.v = (torch.randn((12, 16, 2, 128), generator=generator).bfloat16() for _ in range(2))
    q, residual = (torch.randn((rows, n), generator=generator).bfloat16() for n in (768, 80))
    batch = make_batch(starts, lengths, 16)
    arguments = (q, weight(80, 768, kind), cache, batch, 0.1, None, None, None, None, residual)
    knobs = Knobs(early_scales=True, splits=8)
    with using(knobs):
        assert quantizes_attention(rows, arguments[1], 128) is (kind == "blocks" or rows <= BAND_ROWS)
        assert not quantizes_attention(1, arguments[1], 128) and not quantizes_attention(rows, arguments[1], 64)
        got = fused_fp8.attention_linear_fp8(*(moved(value) for value in arguments))
    want = OPS["attention_linear_fp8"].reference(*arguments)
    error = (got.float().cpu() - want.float()).norm() / want.float().norm()
    assert error < 6e-2
