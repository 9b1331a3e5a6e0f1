"""NVFP4 times NVFP4: rows are quantized to the reference's bits, and products are those of what they became."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skyline.kernels.triton import nvfp4
from skyline.kernels.triton.layouts import Fp4Words, pack_fp4, unpack_words
from skyline.ops import OPS
from skyline.ops.contract import randn
from skyline.ops.fp4 import E2M1, NVFP4_GROUP, Fp4Weight, fp4_case_weight, unpack_e2m1
from skyline.ops.nvfp4 import FEW_ROWS, quantize_nvfp4
from tests.kernels.triton.test_ops import moved

BFLOAT16 = torch.bfloat16


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _numbers(rows: nvfp4.Rows) -> Tensor:
    """Codes, which tell -0 from 0: what they are is compared beside their scales."""
    return unpack_words(rows.words.cpu(), rows.k)


def _codes(weight: Fp4Weight, k: int) -> Tensor:
    return torch.stack((weight.values & 15, weight.values >> 4), -1).flatten(1)[:, :k]


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16, torch.float16])
@pytest.mark.parametrize("k", [16, 56, 200, 1000])
def test_rows_are_quantized_to_the_bit(k: int, dtype: torch.dtype) -> None:
    x = randn((9, k), dtype, _generator(), 3.0)
    x[1], x[2] = 0, x[2] * 1e-4
    x[3, 16:] *= 1e-3  # groups beside much larger ones
    x[4] = torch.arange(k).remainder(7).to(dtype) / 4 - 0.75  # halves between numbers
    x[5] = torch.tensor([value for value in E2M1 for _ in "+-"])[torch.arange(k) % 16].to(dtype)
    x[6, 5] = 6e4  # above all others
    expected, got = quantize_nvfp4(x), nvfp4.quantize_rows(moved(x))
    groups = -(-k // NVFP4_GROUP)
    assert torch.equal(got.row_scales.cpu(), expected.row_scales)
    assert torch.equal(got.scales.cpu()[:, :groups], expected.scales.view(torch.uint8))
    assert torch.equal(_numbers(got), _codes(expected, k))
    assert not got.scales[:, groups:].any() and not _numbers(got._replace(k=8 * got.words.shape[1]))[:, k:].any()


def test_what_is_representable_stays_as_it_is() -> None:
    x = torch.tensor(E2M1 + tuple(-value for value in E2M1)).repeat(2, 4) * torch.tensor([[1.0], [2.0**-20]])
    assert torch.equal(quantize_nvfp4(x).dequantize(), x)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_no_number_spoils_no_other(broken: float) -> None:
    x = randn((FEW_ROWS + 2, 64), BFLOAT16, _generator())
    weight = fp4_case_weight(24, 64, NVFP4_GROUP, _generator())
    whole = nvfp4.linear_nvfp4(moved(x), moved(weight)).cpu()
    x[4, 40] = broken
    for got in (nvfp4.linear_nvfp4(moved(x), moved(weight)).cpu(), OPS["linear_nvfp4"].reference(x, weight)):
        assert got[4].isnan().all()
        assert got[torch.arange(len(x)) != 4].isfinite().all()
    got = nvfp4.linear_nvfp4(moved(x), moved(weight)).cpu()
    assert torch.equal(got[:4], whole[:4]) and torch.equal(got[5:], whole[5:])


def test_norm_is_rounded_as_by_its_own_op() -> None:
    x, norm = randn((5, 160), BFLOAT16, _generator(), 2.0), 1 + randn((160,), BFLOAT16, _generator(), 0.1)
    expected = quantize_nvfp4(OPS["rms_norm"].reference(x, norm, 1e-6))
    got = nvfp4.quantize_rows(moved(x), moved(norm), 1e-6)
    assert torch.equal(_numbers(got), _codes(expected, 160))
    assert torch.equal(got.scales.cpu()[:, :10], expected.scales.view(torch.uint8))


@pytest.mark.parametrize("n,k", [(40, 64), (130, 272), (256, 520)])
@pytest.mark.parametrize("rows", [FEW_ROWS + 1, 150])
def test_products_of_given_rows(rows: int, n: int, k: int) -> None:
    """Of what the rows became, exactly: nothing else is rounded."""
    x, weight = randn((rows, k), torch.float32, _generator()), fp4_case_weight(n, k, NVFP4_GROUP, _generator())
    residual = randn((rows, n + 8), torch.float32, _generator())[:, 8:]
    expected = quantize_nvfp4(x).dequantize()[:, :k] @ weight.dequantize().T + residual
    wide = torch.cat([x, x], 1)[:, :k]  # rows of a wider tensor
    got = nvfp4.fused_linear_nvfp4(moved(wide), moved(weight), None, False, None, 0.0, moved(residual)).cpu()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Fp4Weight, Fp4Words])
@pytest.mark.parametrize("rows", [0, 1, FEW_ROWS])
def test_few_rows_are_not_quantized(rows: int, kind: type) -> None:
    x, plain = randn((rows, 96), BFLOAT16, _generator()), fp4_case_weight(48, 96, NVFP4_GROUP, _generator())
    weight = pack_fp4(plain) if kind is Fp4Words else plain
    got = nvfp4.linear_nvfp4(moved(x), moved(weight)).cpu()
    torch.testing.assert_close(got, OPS["linear_fp4"].reference(x, plain), rtol=1.6e-2, atol=1e-2)


def test_the_reference_unpacks_what_it_packs() -> None:
    x = randn((3, 48), torch.float32, _generator())
    rows = quantize_nvfp4(x)
    spread = rows.scales.float().repeat_interleave(NVFP4_GROUP, 1)
    assert torch.equal(rows.dequantize(), unpack_e2m1(rows.values) * spread * rows.row_scales[:, None])
    assert (rows.dequantize() - x).abs().max() < x.abs().max() / 6


@pytest.mark.parametrize("capability,instruction", [(100, "tcgen05.mma"), (120, "mma.sync")])
def test_blackwell_multiplies_both_as_they_lie(capability: int, instruction: str, tmp_path: Path) -> None:
    """In the instruction for two of NVFP4: Triton would otherwise widen them, without a word."""
    command = [sys.executable, "-m", "tests.kernels.triton.offline", str(capability), "linear_nvfp4", "--most", "4"]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found = [file.read_text() for file in tmp_path.glob("*/_product_kernel.ptx")]
    products = [text for text in found if "e2m1" in text or "mxf4nvf4" in text]
    assert products
    for text in products:
        assert re.search(rf"{re.escape(instruction)}\S*mxf4nvf4\S*scale_vec::4X", text)
        assert "cvt.rn.f16x2.e2m1x2" not in text
