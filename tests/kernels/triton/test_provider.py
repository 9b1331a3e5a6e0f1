"""What the provider does where Triton cannot compile a case."""

from __future__ import annotations

import logging
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from skyline.kernels import Request, candidates, choose, gpu
from skyline.kernels import triton as provider
from skyline.kernels.triton import norms, probe, quantized
from skyline.kernels.triton.layouts import pack_fp4, pack_int4, unpack_int4
from skyline.ops import OPS, AttentionBatch
from skyline.ops.fp4 import fp4_case_weight
from skyline.ops.quantized import int4_case_weight
from skyline.ops.quantized_moe import stacked
from tests.kernels.triton.test_ops import DEVICE

COMPILER_ERRORS = [
    OutOfResources(300_000, 232_448, "shared memory"),
    subprocess.CalledProcessError(1, ["gcc"]),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
]


def test_what_does_not_compile_goes_to_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_large(*_: object) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(norms, "gated_rms_norm", too_large)
    monkeypatch.setattr(provider, "_warned", set())
    fresh: list[object] = []
    monkeypatch.setattr(provider, "register", fresh.append)
    provider.provide("gated_rms_norm", "norms")
    kernel = fresh[0]
    x, weight = torch.randn(3, 16), torch.ones(8)
    with pytest.raises(OutOfResources):
        kernel.run(x, x, weight, 1e-6)  # type: ignore[attr-defined]
    monkeypatch.setattr(provider, "FALLS_BACK", True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            got = kernel.run(x, x, weight, 1e-6)  # type: ignore[attr-defined]
    assert torch.equal(got, OPS["gated_rms_norm"].reference(x, x, weight, 1e-6))
    assert len(caplog.records) == 1 and "shared memory" in caplog.text
    # Other errors are nobody's to hide.
    monkeypatch.setattr(norms, "gated_rms_norm", lambda *_: 1 / 0)
    fresh.clear()
    provider.provide("gated_rms_norm", "norms")
    with pytest.raises(ZeroDivisionError):
        fresh[0].run(x, x, weight, 1e-6)  # type: ignore[attr-defined]
    assert any(k.provider == "triton" for k in candidates("gated_rms_norm"))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "FALLS_BACK", True)
    monkeypatch.setattr(provider, "_warned", set())


@pytest.mark.parametrize("error", COMPILER_ERRORS, ids=["too large", "C compiler fails", "no C compiler"])
def test_what_is_an_error_of_a_compiler(failing: None, caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    def raising() -> str:
        raise error

    with caplog.at_level(logging.WARNING):
        assert [provider.or_in_torch("choice", raising, lambda: "torch") for _ in range(2)] == ["torch"] * 2
    assert len(caplog.records) == 1 and "choice" in caplog.text


def test_other_errors_are_nobodys_to_hide(failing: None) -> None:
    with pytest.raises(ZeroDivisionError):
        provider.or_in_torch("choice", lambda: 1 / 0, lambda: 1.0)
    assert not provider.does_not_compile("choice", RuntimeError("CUDA error: an illegal memory access"))


def _raise(error: Exception) -> None:
    raise error


def _registered(monkeypatch: pytest.MonkeyPatch, op: str, module: str) -> object:
    """The op's kernel as a provider registers it, which imports it anew."""
    fresh: list[object] = []
    monkeypatch.setattr(provider, "register", fresh.append)
    provider.provide(op, module)
    return fresh[0]


def _cannot(*_: object) -> None:
    raise OutOfResources(300_000, 232_448, "shared memory")


@pytest.mark.parametrize("zeros", [False, True])
def test_packed_int4_goes_to_the_reference(failing: None, monkeypatch: pytest.MonkeyPatch, zeros: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [int4_case_weight(6, 70, 32, zeros, generator) for _ in range(2)]
    for weight in (weights[0], stacked(weights)):  # a matrix, and those of two experts
        again = unpack_int4(pack_int4(weight))
        assert torch.equal(again.values, weight.values) and torch.equal(again.dequantize(), weight.dequantize())
    monkeypatch.setattr(quantized, "linear_int4_weight_only", _cannot)
    x = torch.randn(3, 70, generator=generator)
    got = _registered(monkeypatch, "linear_int4_weight_only", "quantized").run(x, pack_int4(weights[0]))  # type: ignore[attr-defined]
    assert torch.equal(got, OPS["linear_int4_weight_only"].reference(x, weights[0]))


@pytest.mark.parametrize("group", [16, 32])
def test_fp4_in_words_goes_to_the_reference(failing: None, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = fp4_case_weight(6, 96, group, generator), torch.randn(3, 96, generator=generator)
    monkeypatch.setattr(quantized, "linear_fp4", _cannot)
    got = _registered(monkeypatch, "linear_fp4", "quantized").run(x, pack_fp4(weight))  # type: ignore[attr-defined]
    assert torch.equal(got, OPS["linear_fp4"].reference(x, weight))


def test_no_reference_goes_by_numbers_of_the_host_that_are_made_up(
    failing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(iter(OPS["paged_attention"].cases(torch.float32, torch.Generator().manual_seed(0))))
    monkeypatch.setattr("skyline.kernels.triton.attention.paged_attention", _cannot)
    kernel = _registered(monkeypatch, "paged_attention", "attention")
    expected = OPS["paged_attention"].reference(*case.args)
    assert torch.equal(kernel.run(*case.args), expected)  # type: ignore[attr-defined]
    batch = next(argument for argument in case.args if isinstance(argument, AttentionBatch))
    batch.device_only = True
    with pytest.raises(provider.DeviceOnlyError, match=r"paged_attention does not compile.*shared memory"):
        kernel.run(*case.args)  # type: ignore[attr-defined]


def _found(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> gpu.Gpu:
    """What `detect` makes of a GPU that is not there."""
    properties = SimpleNamespace(
        name="NVIDIA X1", major=capability[0], minor=capability[1], multi_processor_count=8, total_memory=1 << 30
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return gpu.detect.__wrapped__(0)


def test_without_a_c_compiler_triton_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for error in COMPILER_ERRORS:
        monkeypatch.setattr(probe, "run", lambda device, error=error: _raise(error))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = _found(monkeypatch, (9, 0))
        assert "triton" not in found.libraries and len(caplog.records) == 1 and str(error) in caplog.text
    asked = Request(OPS["rms_norm"], "cuda", torch.bfloat16, gpu=found)
    assert choose(asked).kernel.provider == "torch"
    monkeypatch.setattr(probe, "run", lambda device: None)
    assert "triton" in _found(monkeypatch, (9, 0)).libraries


def test_the_probe_runs_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    probe.run(DEVICE)
    monkeypatch.setattr(probe, "_one_kernel", {(1,): lambda x: None})
    with pytest.raises(RuntimeError, match="stored something else"):
        probe.run(DEVICE)


def test_too_old_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(probe, "run", lambda device: _raise(AssertionError("not for this GPU")))
    with caplog.at_level(logging.WARNING):
        found = _found(monkeypatch, (7, 5))
    assert [record.getMessage() for record in caplog.records] == [
        "NVIDIA X1 is too old for Skyline's kernels: its compute capability is 7.5, they need 8.0. torch computes "
        "every op, which is far slower"
    ]
    choice = choose(Request(OPS["rms_norm"], "cuda", torch.bfloat16, gpu=found))
    assert choice.kernel.provider == "torch" and any("7.5" in why for _, why in choice.rejected)


def test_kernels_wait_before_they_let_the_next_one_begin() -> None:
    """So whatever runs ahead of its `gdc_wait` finds complete what the launches before the last one wrote."""
    sources = Path(provider.__file__).parent.glob("*.py")
    calls = [re.findall(r"gdc_(?:wait|launch_dependents)\(\)", source.read_text()) for source in sources]
    for found in filter(None, calls):
        assert found == ["gdc_wait()", "gdc_launch_dependents()"] * (len(found) // 2)
    assert sum(map(len, calls)) > 40
