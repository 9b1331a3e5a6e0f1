"""What the provider does where Triton cannot compile a case."""

from __future__ import annotations

import logging

import pytest
import torch
from triton.runtime.errors import OutOfResources

from skyline.kernels import candidates
from skyline.kernels import triton as provider
from skyline.kernels.triton import norms
from skyline.ops import OPS


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
