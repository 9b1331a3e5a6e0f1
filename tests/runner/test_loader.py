"""Loading a model: what is not covered by those who use one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from skyline.demo import DEMO_PATH
from skyline.engine.config import EngineConfig
from skyline.kernels.gpu import GPUS
from skyline.runner.loader import load_model, why_slow


def test_does_not_import_the_compiler_of_torch() -> None:
    """It takes a second, and shapes on the meta device bring it in unless ops say what theirs are."""
    code = (
        "import sys; from skyline.engine.config import EngineConfig; from skyline.runner.loader import load_model\n"
        f"load_model(EngineConfig(model={str(DEMO_PATH)!r}, num_kv_blocks=64)).runner.close()\n"
        "sys.exit(bool({'torch._dynamo', 'sympy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_driver_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no usable CUDA device here; use --device cpu or check the driver"):
        load_model(EngineConfig(model=str(DEMO_PATH), device="cuda"))


def test_fp8_is_told_to_be_slow_where_the_gpu_does_not_know_it() -> None:
    asked = EngineConfig(model="m", device="cuda", quantization="fp8", kv_cache_dtype="fp8")
    assert why_slow(asked, GPUS["a100"]).endswith("for --quantization int8 and --kv-cache-dtype int8 there are kernels")
    assert why_slow(asked, GPUS["l4"]) == ""
    assert why_slow(EngineConfig(model="m", device="cuda", quantization="int8"), GPUS["a100"]) == ""
