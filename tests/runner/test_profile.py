"""Profiles of a tiny model: the figures are there and add up. How fast it is is nobody's business here."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyline.engine.config import EngineConfig
from skyline.kernels.cpu import native
from skyline.kernels.cpu.machine import Machine, Peak, load_or_measure, measure
from skyline.runner.profile import profile
from tests.models import quantized
from tests.models.families import FAMILIES
from tests.models.harness import save_tiny
from tests.tiny import make_tokenizer

PEAK = Peak("made up", 1e12, 5e11, 9e11, None)
MACHINE = Machine("made up", "avx2", 1, "none", 1e10, 5e9, dict.fromkeys(("float32", "bfloat16", "int8", "int4"), PEAK))


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"dtype": "bfloat16", "quantization": "int4"}])
def test_times_add_up(tiny_checkpoint: Path, options: dict[str, str]) -> None:
    config = EngineConfig(model=str(tiny_checkpoint), threads=1, **options)  # type: ignore[arg-type]
    facts = profile(config, MACHINE, batch=3, context=40, prefill=50, steps=3)
    assert facts["steps"]["prefill"]["tokens"] == 50 and facts["steps"]["decode"]["requests"] == 3
    for name, step in facts["steps"].items():
        assert step["measured"] == 3, name
        assert 0 < step["outside_us"] < step["plain_us"]
        parts = step["parts_us"]
        assert all(us >= 0 for us in parts.values())
        assert sum(op["us"] for op in step["ops"]) <= 2 * step["step_us"], "medians of different steps"
        assert {op["op"] for op in step["ops"]} >= {"embedding", "paged_attention", "rms_norm"}
        for op in step["ops"]:
            assert op["calls"] > 0 and op["us"] > 0 and op["gb_per_s"] > 0 and op["roofline"] > 0
    # Two layers of four products, and the logits.
    linear = [op for op in facts["steps"]["decode"]["ops"] if op["op"].startswith("linear")]
    assert sum(op["calls"] for op in linear) == 2 * 4 + 1
    assert all(op["shape"].startswith("3x") for op in linear)


@pytest.mark.skipif(native.available() == "none", reason="no compiled kernels here")
def test_experts_in_four_bits(tmp_path: Path) -> None:
    settings = {**FAMILIES["GptOss"], "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "eos_token_id": 2}
    theirs = save_tiny(tmp_path / "plain", "GptOss", **settings)
    make_tokenizer(tmp_path / "plain")
    quantized.rewrite(tmp_path / "plain", theirs, quantized.mxfp4_experts, {"quant_method": "mxfp4"})
    config = EngineConfig(model=str(tmp_path / "small"), dtype="bfloat16", threads=1)
    step = profile(config, MACHINE, context=20, prefill=20, steps=1)["steps"]["decode"]
    (experts,) = [op for op in step["ops"] if op["op"] == "moe_experts_clamped_fp4"]
    # Of each layer's two chosen experts 17 bytes for 32 numbers, and four a row; biases; a row of 64 in and out.
    chosen = 2 * (3 * 64 * 64 * 17 / 32 + 4 * (3 * 64) + 2 * (3 * 64))
    assert experts["gb_per_s"] * 1e9 * experts["us"] / experts["calls"] * 1e-6 == pytest.approx(chosen + 256, rel=0.01)


def test_one_step_adds_up_exactly(tiny_checkpoint: Path) -> None:
    step = profile(EngineConfig(model=str(tiny_checkpoint), threads=1), MACHINE, context=20, prefill=20, steps=1)[
        "steps"
    ]
    for facts in step.values():
        assert sum(op["us"] for op in facts["ops"]) == pytest.approx(facts["parts_us"]["kernels"])
        inside = sum(us for part, us in facts["parts_us"].items() if part != "idle")
        assert inside == pytest.approx(facts["step_us"])


def test_a_gpu_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="device cpu"):
        profile(EngineConfig(model=str(tiny_checkpoint), device="cuda"), MACHINE)


def test_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skyline.kernels.cpu.machine._SECONDS", 0.02)
    monkeypatch.setattr("skyline.kernels.cpu.machine._READ_BYTES", 16 << 20)
    monkeypatch.setattr("skyline.kernels.cpu.machine._PRODUCTS", ((256, 512, 512),))
    monkeypatch.setattr("skyline.kernels.cpu.machine._file", lambda: tmp_path / "new" / "machine.json")
    machine = measure(1)
    assert machine.bandwidth > 0 and machine.bandwidth_one_thread > 0
    assert machine.peaks["bfloat16"].torch
    for peak in machine.peaks.values():
        if native.available() != "none":
            assert peak.register and peak.register_one_thread and peak.product
            assert peak.highest >= peak.register
    monkeypatch.setattr("skyline.kernels.cpu.machine.measure", lambda threads: pytest.fail("measured again"))
    assert load_or_measure(1) == machine
    (tmp_path / "new" / "machine.json").write_text("{broken")
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        load_or_measure(1)
