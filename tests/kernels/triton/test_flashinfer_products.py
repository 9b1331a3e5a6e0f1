"""Products of FP8 weights by FlashInfer, which needs a GPU: stand-ins compute what its documentation says."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from skyline.kernels.flashinfer import trials
from skyline.ops import OPS
from skyline.ops.fp8 import BLOCK, Fp8Weight, fp8_case_weight

NAME = "skyline.kernels.flashinfer.linear"


class Library:
    """Two functions of flashinfer.gemm. wrong: they read scales as if transposed; broken: they raise."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.wrong = self.broken = False

    def _product(self, x: Tensor, weight: Tensor, scales: Tensor, out: Tensor) -> Tensor:
        if self.broken:
            raise RuntimeError("ninja: build stopped")
        wide = Fp8Weight(weight, scales.t().reshape(scales.shape) if self.wrong else scales).dequantize()
        return out.copy_(x @ wide.t())

    def fp8_blockscale_gemm_sm90(self, *, input: Tensor, weight: Tensor, weight_scale: Tensor, out: Tensor) -> Tensor:
        self.calls.append("sm90")
        groups = input.float().unflatten(1, (-1, BLOCK))
        scales = groups.abs().amax(-1, keepdim=True) / 448
        x = (groups / scales).to(torch.float8_e4m3fn).float() * scales
        return self._product(x.flatten(1), weight, weight_scale, out)

    def gemm_fp8_nt_groupwise(
        self,
        *,
        a: Tensor,
        b: Tensor,
        a_scale: Tensor,
        b_scale: Tensor,
        scale_major_mode: str,
        out: Tensor,
        backend: str,
    ) -> Tensor:
        self.calls.append("groupwise")
        assert a.shape[0] % 4 == 0 and scale_major_mode == "K" and backend == "cutlass"
        assert out.shape == (a.shape[0], b.shape[0])
        return self._product(a.float() * a_scale.repeat_interleave(BLOCK, 1), b, b_scale, out)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    found = Library()
    package, gemm = ModuleType("flashinfer"), ModuleType("flashinfer.gemm")
    for name in ("fp8_blockscale_gemm_sm90", "gemm_fp8_nt_groupwise"):
        setattr(gemm, name, getattr(found, name))
    package.gemm = gemm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.gemm", gemm)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.setattr(trials, "_passed", {})
    yield found
    sys.modules.pop(NAME, None)


def _module(monkeypatch: pytest.MonkeyPatch, major: int) -> Any:
    module = import_module(NAME)
    monkeypatch.setattr(module, "capability", lambda device: (major, 0))
    return module


def _inputs(n: int, k: int, seed: int = 0) -> tuple[Tensor, Fp8Weight, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((70, k), generator=generator).bfloat16()
    norm = (1 + 0.1 * torch.randn(k, generator=generator)).bfloat16()
    return x, fp8_case_weight(n, k, True, generator), norm


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.allclose(found.float(), expected.float(), rtol=0.1, atol=0.25)


@pytest.mark.parametrize("major, used", [(9, "sm90"), (10, "groupwise"), (12, "groupwise")])
def test_linear(major: int, used: str, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call is a trial, the next goes to the library alone; both with all that may be around the product."""
    module = _module(monkeypatch, major)
    x, weight, norm = _inputs(256, 384)
    arguments = (x, weight, torch.full((256,), 0.5).bfloat16(), False, norm, 1e-6, torch.ones((70, 256)).bfloat16())
    expected = OPS["fused_linear_fp8"].reference(*arguments)
    ours = module.triton.product_fp8
    assert _close(module.fused_linear_fp8(*arguments), expected) and library.calls == [used]
    monkeypatch.setattr(module.triton, "product_fp8", None)
    assert _close(module.fused_linear_fp8(*arguments), expected) and library.calls == [used] * 2
    gated = OPS["linear_fp8"].reference(x, weight, None, True)
    assert _close(module.linear_fp8(x, weight, None, True), gated) and library.calls == [used] * 3
    monkeypatch.setattr(module.triton, "product_fp8", ours)
    assert module.linear_fp8(x[:8], weight).shape == (8, 256) and library.calls == [used] * 3  # few rows are ours


@pytest.mark.parametrize("major", [9, 10])
def test_gated_mlp(major: int, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module(monkeypatch, major)
    (x, gate_up, norm), (_, down, _) = _inputs(512, 128), _inputs(128, 256, 1)
    arguments = (x, gate_up, down, norm, 1e-6, x)
    expected = OPS["gated_mlp_fp8"].reference(*arguments)
    for _ in range(2):
        assert _close(module.gated_mlp_fp8(*arguments), expected)
    assert len(library.calls) == 4


@pytest.mark.parametrize("fault, said", [("wrong", "off by"), ("broken", "RuntimeError: ninja: build stopped")])
def test_what_fails_its_trial_is_never_used(
    fault: str, said: str, library: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = _module(monkeypatch, 9)
    x, weight, _ = _inputs(256, 384)
    setattr(library, fault, True)
    expected = OPS["linear_fp8"].reference(x, weight)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert _close(module.linear_fp8(x, weight), expected)
    assert library.calls == ["sm90"]
    assert [said in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "n, k, rows, blocks, major, expected",
    [
        (256, 384, 70, True, 9, True),
        (192, 384, 70, True, 9, True),
        (192, 384, 70, True, 10, False),
        (256, 320, 70, True, 9, False),
        (256, 384, 64, True, 9, False),
        (256, 384, 70, False, 9, False),
        (256, 384, 70, True, 8, False),
    ],
)
def test_what_is_served(n: int, k: int, rows: int, blocks: bool, major: int, expected: bool, library: Library) -> None:
    weight = fp8_case_weight(n, k, blocks, torch.Generator().manual_seed(0))
    assert import_module(NAME).serves(torch.zeros((rows, k), dtype=torch.bfloat16), weight, major) == expected
