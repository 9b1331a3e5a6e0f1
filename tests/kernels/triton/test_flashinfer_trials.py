"""How FlashInfer's kernels are tried out. It needs a GPU: stand-ins compute what its documentation says."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from skyline.kernels.flashinfer import trials
from skyline.ops import OPS, KVCache
from skyline.ops.attention import make_batch
from skyline.ops.fp8 import BLOCK, Fp8Weight, fp8_case_weight

PACKAGE = "skyline.kernels.flashinfer"
NAME = f"{PACKAGE}.linear"
MODULES = [f"{PACKAGE}.{part}" for part in ("attention", "dense", "linear", "step")]


class Library:
    """Some of its functions. wrong: products read scales as if transposed; broken: all of them raise."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.wrong = self.broken = False

    def rmsnorm(self, *, input: Tensor, weight: Tensor, eps: float) -> Tensor:
        self.calls.append("rmsnorm")
        return self._unless_broken(OPS["rms_norm"].reference(input, weight, eps))

    def silu_and_mul(self, *, input: Tensor) -> Tensor:
        self.calls.append("silu_and_mul")
        return self._unless_broken(OPS["silu_mul"].reference(input))

    def trtllm_batch_decode_with_kv_cache(self, *, query: Tensor, **options: Any) -> Tensor:
        self.calls.append("decode")
        return self._unless_broken(torch.zeros_like(query))  # wrong in any case

    def _unless_broken(self, result: Tensor) -> Tensor:
        if self.broken:
            raise RuntimeError("ninja: build stopped")
        return result

    def _product(self, x: Tensor, weight: Tensor, scales: Tensor, out: Tensor) -> Tensor:
        wide = Fp8Weight(weight, scales.t().reshape(scales.shape) if self.wrong else scales).dequantize()
        return self._unless_broken(out.copy_(x @ wide.t()))

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
    modules = {name: ModuleType(name) for name in ("flashinfer", "flashinfer.gemm", "flashinfer.decode")}
    for place, names in (
        ("flashinfer", ("rmsnorm", "silu_and_mul")),
        ("flashinfer.gemm", ("fp8_blockscale_gemm_sm90", "gemm_fp8_nt_groupwise")),
        ("flashinfer.decode", ("trtllm_batch_decode_with_kv_cache",)),
    ):
        for name in names:
            setattr(modules[place], name, getattr(found, name))
        monkeypatch.setitem(sys.modules, place, modules[place])
    for part in ("gemm", "decode"):
        setattr(modules["flashinfer"], part, modules[f"flashinfer.{part}"])
    # Those that are imported already hold the real library, and shall again afterwards.
    ours = import_module(PACKAGE)
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    kept = {name.rpartition(".")[2]: vars(ours).pop(name.rpartition(".")[2], None) for name in MODULES}
    monkeypatch.setattr(trials, "_reasons", {})
    yield found
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module
    for part, module in kept.items():
        vars(ours).pop(part, None)
        if module is not None:
            setattr(ours, part, module)


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


@pytest.mark.parametrize("broken", [False, True])
def test_norm_and_activation(broken: bool, library: Library) -> None:
    dense = import_module(f"{PACKAGE}.dense")
    library.broken = broken
    x, _, norm = _inputs(128, 384)
    for _ in range(2):
        assert _close(dense.rms_norm(x, norm, 1e-6), OPS["rms_norm"].reference(x, norm, 1e-6))
        assert _close(dense.silu_mul(x), OPS["silu_mul"].reference(x))
    assert library.calls == ["rmsnorm", "silu_and_mul"] * (1 if broken else 2)


@pytest.mark.parametrize("broken", [False, True])
def test_attention(broken: bool, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in gives zeros, or raises: either way the answer is right, and it is asked once."""
    attention = import_module(f"{PACKAGE}.attention")
    monkeypatch.setattr(attention, "capability", lambda device: (10, 0))
    monkeypatch.setattr(attention.step, "_WORKSPACE", 16)
    library.broken = broken
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(2, 64, torch.bfloat16)
    cache.allocate(9, 16, torch.device("cpu"))
    for part in cache.tensors:
        part.copy_(torch.randn(part.shape, generator=generator))
    q = torch.randn((2, 4 * 64), generator=generator).bfloat16()
    batch = make_batch([20, 5], [1, 1], 16)
    expected = OPS["paged_attention"].reference(q, cache, batch, 0.125)
    for _ in range(2):
        assert _close(attention.paged_attention(q, cache, batch, 0.125), expected)
    assert library.calls == ["decode"]


def test_a_plan_waits_for_the_copy_of_the_last(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written where the device, which may be a step behind, reads the last one."""
    step = import_module(f"{PACKAGE}.step")
    order: list[str] = []

    class Recorder:
        def __init__(self, **arguments: Any) -> None: ...

        def __getattr__(self, name: str) -> Any:
            return lambda **arguments: order.append(name)

    monkeypatch.setattr(step.flashinfer, "BatchPrefillWithPagedKVCacheWrapper", Recorder, raising=False)
    monkeypatch.setattr(step.torch.cuda, "Event", Recorder)
    monkeypatch.setattr(step, "_wrappers", {})
    monkeypatch.setattr(step, "_copied", {})
    monkeypatch.setattr(step, "workspace", lambda *_: None)
    monkeypatch.setattr(step, "pages", lambda *_: None)
    monkeypatch.setattr(step.calls, "prefill_plan", lambda *_: {})
    shape = step.Shape(4, 2, 64, 16, torch.bfloat16, 0.125, None, None, 0)
    tables = SimpleNamespace(device=torch.device("cpu"), is_cuda=True)
    for starts in ([0], [5]):
        mine = step.of(make_batch(starts, [5]))
        for _ in range(2):  # layers
            mine.wrapper(shape, tables, "auto")
    assert order == ["plan", "record", "synchronize", "plan", "record"]


def test_zeros_are_no_trial() -> None:
    calls: list[str] = []

    def foreign() -> Tensor:
        calls.append("")
        return torch.zeros(3)

    for ours in (torch.zeros(3), torch.zeros(3), torch.ones(3)):
        assert trials.checked(("zeros",), foreign, lambda ours=ours: ours) is ours  # type: ignore[misc]
    assert len(calls) == 1


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
