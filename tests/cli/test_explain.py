"""`skyline explain` against figures counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from skyline.checkpoint import load_config
from skyline.engine.config import EngineConfig
from skyline.kernels import NoKernelError
from skyline.kernels.gpu import GPUS
from skyline.models import create_model
from skyline.runner.explain import explain
from skyline.runner.loader import build_program
from tests.models.families import FAMILIES
from tests.models.harness import save_tiny

LAYERS, HIDDEN, INTERMEDIATE, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 128, 512, 4, 2, 16
FLOAT32 = 4


def by_op(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {op["op"]: op for op in facts["ops"]}


def test_sizes_and_linear_flops(tiny_checkpoint: Path) -> None:
    facts = explain(EngineConfig(model=str(tiny_checkpoint)), batch=3, context=100, prefill=50)
    attention = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS)
    weights = LAYERS * (attention + 3 * HIDDEN * INTERMEDIATE)
    norms = LAYERS * (2 * HIDDEN + 2 * HEAD_DIM) + HIDDEN
    assert facts["parameters"] == VOCAB * HIDDEN + weights + norms, "the tied embedding counts once"
    assert facts["parameter_bytes"] == facts["parameters"] * FLOAT32
    assert facts["kv_bytes_per_token"] == LAYERS * 2 * KV_HEADS * HEAD_DIM * FLOAT32

    linear = by_op(facts)["linear"]
    assert linear["decode"]["flops"] == 2 * 3 * (weights + VOCAB * HIDDEN)
    # Only the last token of a prompt needs logits, and what is behind the last attention.
    behind = HIDDEN * HEADS * HEAD_DIM + 3 * HIDDEN * INTERMEDIATE
    assert linear["prefill"]["flops"] == 2 * (50 * (weights - behind) + behind + VOCAB * HIDDEN)
    attended = by_op(facts)["paged_attention"]
    assert attended["decode"]["flops"] == LAYERS * 4 * 3 * 100 * HEADS * HEAD_DIM
    assert attended["prefill"]["flops"] == LAYERS * 4 * (50 * 51 // 2) * HEADS * HEAD_DIM


def test_steps_are_the_sum_of_their_ops(tiny_checkpoint: Path) -> None:
    facts = explain(EngineConfig(model=str(tiny_checkpoint)), batch=2, context=33, prefill=17)
    for step in ("decode", "prefill"):
        for figure in ("bytes", "flops"):
            assert facts["steps"][step][figure] == sum(op[step][figure] for op in facts["ops"])
    assert facts["launches"]["step"] == sum(op["launches"] for op in facts["ops"])


@pytest.mark.parametrize(("device", "invariant"), [("cpu", False), ("cpu", True), ("cuda", False)])
def test_every_candidate_is_accounted_for(tiny_checkpoint: Path, device: str, invariant: bool) -> None:
    """Also for a device that is not there."""
    from skyline.kernels import candidates

    config = EngineConfig(model=str(tiny_checkpoint), device=device, dtype="bfloat16", batch_invariant=invariant)
    facts = explain(config)
    assert facts["device"] == device and facts["dtype"] == "bfloat16"
    for name, op in by_op(facts).items():
        told = [op["provider"], *(other["provider"] for other in op["rejected"])]
        assert sorted(told) == sorted(kernel.provider for kernel in candidates(name))
        assert op["reason"] and all(other["reason"] for other in op["rejected"])


@pytest.mark.parametrize(("isa", "form"), [("avx512", "bfloat16 in 12 bits"), ("avx2", "bfloat16")])
def test_what_weights_are_kept_as_is_told(tiny_checkpoint: Path, isa: str, form: str) -> None:
    facts = explain(EngineConfig(model=str(tiny_checkpoint), dtype="bfloat16"), isa=isa)
    assert by_op(facts)["linear"]["weights"] == [form, f"{form}, gated"]
    assert by_op(facts)["rms_norm"]["weights"] == []


def test_it_refuses_what_the_model_cannot_do(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="context of 256"):
        explain(EngineConfig(model=str(tiny_checkpoint)), context=257)
    with pytest.raises(ValueError, match="device"):
        explain(EngineConfig(model=str(tiny_checkpoint), device="tpu"))
    with pytest.raises(NoKernelError, match="reduction order depends"):
        explain(EngineConfig(model=str(tiny_checkpoint), device="cuda", batch_invariant=True))


def test_fusions_and_launches(tiny_checkpoint: Path) -> None:
    """Qwen3 of two layers: 14 launches a layer become 8; around them 4, and then 5, cutting rows in two places."""
    facts = explain(EngineConfig(model=str(tiny_checkpoint)))
    fused = {"add_rms_norm": 2 * LAYERS, "rope_kv_write": LAYERS, "linear_silu_mul": LAYERS}
    assert facts["fusions"] == {"weight_only_fp4": 0, "select_rows_early": 1, **fused}
    assert facts["launches"] == {
        "step": 8 * LAYERS + 5,
        "layer": 8,
        "unfused_step": 14 * LAYERS + 4,
        "unfused_layer": 14,
    }
    per_layer = {name: op["launches_per_layer"] for name, op in by_op(facts).items() if op["launches_per_layer"]}
    assert per_layer == {"linear": 4, "rope_kv_write": 1, "paged_attention": 1, "add_rms_norm": 2}


def test_kernels_that_calls_launch_on_a_gpu(tiny_checkpoint: Path) -> None:
    """Of one request, a linear takes in the norm, silu_mul and the residual; of more, cuBLAS leaves the first two."""
    config = EngineConfig(model=str(tiny_checkpoint), dtype="bfloat16")
    facts = explain(config, batch=4, context=33, prefill=17, hardware="h200")
    told = [(step["step"], step["requests"], step["tokens"]) for step in facts["kernel_launches"]]
    assert told == [("decode", 1, 1), ("decode", 4, 4), ("decode", 64, 64), ("prefill", 1, 17)]
    one, *more, prompt = facts["kernel_launches"]
    assert facts["launches"]["layer"] == one["layer"] == 5 and facts["launches"]["step"] == one["all"]
    for step in more:
        assert step["layer_by_op"] == {"fused_linear": 4 + 3, "rope_attention": 1}
        assert step["layer"] == 8 and step["all"] == 8 * LAYERS + 4, "embedding, select_rows, norm, output head"
    assert prompt["all"] == 9 * LAYERS + 3, "one row of logits"
    assert explain(config)["kernel_launches"] is None


def test_launches_of_layers_that_differ(tmp_path: Path) -> None:
    moe = dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    save_tiny(tmp_path, "Qwen3Moe", **moe, mlp_only_layers=[1], num_hidden_layers=3)
    launches = explain(EngineConfig(model=str(tmp_path)))["launches"]
    assert launches["step"] == 9 + 8 + 9 + 5 and launches["unfused_step"] == 3 * 14 + 4
    assert launches["layer"] == 8.5, "one border between two layers belongs to experts, the other does not"


def test_launches_of_one_layer(tmp_path: Path) -> None:
    save_tiny(tmp_path, "Llama", num_hidden_layers=1)
    launches = explain(EngineConfig(model=str(tmp_path)))["launches"]
    assert launches == {"step": 13, "layer": 13, "unfused_step": 16, "unfused_layer": 16}


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_program_launches_what_is_told(tiny_checkpoint: Path, quantization: str) -> None:
    config = EngineConfig(model=str(tiny_checkpoint), quantization=quantization)
    model = create_model(load_config(tiny_checkpoint), torch.float32, "meta")
    program = build_program(config, model, torch.float32, "none")
    told = {name: op["launches"] for name, op in by_op(explain(config)).items()}
    assert program.launches() == told


def test_instruction_sets(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made for the set asked for; this machine's is only the default, and nothing is built."""
    config = EngineConfig(model=str(tiny_checkpoint), dtype="bfloat16")
    monkeypatch.setattr("skyline.kernels.cpu.build.build", None)
    for isa in ("amx", "avx512", "avx2", "none"):
        facts = explain(config, isa=isa)
        assert facts["isa"] == isa
        native = {op["provider"] for op in facts["ops"]} & {"cpu"}
        assert bool(native) == (isa != "none")
    monkeypatch.setenv("SKYLINE_CPU_ISA", "none")
    assert explain(config)["isa"] == "none"
    monkeypatch.setattr("skyline.runner.explain.detect", lambda: "avx2")
    assert explain(config)["isa"] == "avx2"
    assert explain(EngineConfig(model=str(tiny_checkpoint), device="cuda"))["isa"] is None
    with pytest.raises(ValueError, match="isa must be one of amx, avx512, avx2, none"):
        explain(config, isa="sse")


@pytest.mark.parametrize(
    "family, expected",
    [
        # kind, window, layers, bytes a token, bytes of a request of 256 tokens; all in float32
        ("GptOss", [("sliding window", 6, 2, 2 * 256, 2 * 256 * 6), ("full attention", None, 1, 256, 256 * 256)]),
        ("DeepseekV32", [("latent", None, 3, 3 * 4 * 32, 256 * 3 * 4 * 32), ("index", None, 3, 192, 256 * 192)]),
        (
            "Qwen3_5",
            [
                ("recurrent state", None, 2, 0, 2 * 4 * (3 * (2 * 2 * 8 + 4 * 12) + 4 * 8 * 12)),
                ("full attention", None, 1, 256, 256 * 256),
            ],
        ),
    ],
)
def test_memory_by_kind(family: str, expected: list[tuple[Any, ...]], tmp_path: Path) -> None:
    save_tiny(tmp_path, family, **FAMILIES[family])
    facts = explain(EngineConfig(model=str(tmp_path)), batch=2, context=33, prefill=17)
    names = ("kind", "window", "layers", "bytes_per_token", "bytes_per_request")
    assert [tuple(entry[name] for name in names) for entry in facts["memory"]] == expected
    assert facts["kv_bytes_per_request"] == sum(entry[-1] for entry in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_is_explained(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family, **FAMILIES[family])
    facts = explain(EngineConfig(model=str(tmp_path)), batch=2, context=33, prefill=17)
    assert 8 <= facts["launches"]["layer"] < 30 and facts["steps"]["decode"]["flops"] > 0


@pytest.mark.parametrize("hardware", GPUS)
def test_hardware_that_is_not_there(hardware: str, tiny_checkpoint: Path) -> None:
    gpu = GPUS[hardware]
    facts = explain(EngineConfig(model=str(tiny_checkpoint), dtype="bfloat16"), hardware=hardware)
    assert facts["device"] == "cuda" and facts["isa"] is None
    told = facts["hardware"]
    assert (told["name"], told["assumed"]) == (gpu.name, False)
    assert told["bandwidth_bytes_per_second"] == gpu.bandwidth and told["flops_per_second"] == gpu.flops
    assert {op["provider"] for op in facts["ops"]} >= {"triton"}
    assert facts["decode_call_by_call"] == ""
    for step in ("decode", "prefill"):
        figures = facts["steps"][step]
        assert figures["floor"]["memory"] == pytest.approx(figures["bytes"] / gpu.bandwidth)
        assert figures["floor"]["compute"] == pytest.approx(figures["flops"] / gpu.flops["bfloat16"])
        larger = [max(op[step]["floor"]["memory"], op[step]["floor"]["compute"]) for op in facts["ops"]]
        assert figures["floor"]["seconds"] == pytest.approx(sum(larger))


def test_a_gpu_is_assumed_where_there_is_none(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = EngineConfig(model=str(tiny_checkpoint), device="cuda", dtype="bfloat16")
    facts = explain(config)
    assert facts["hardware"]["name"] == GPUS["h200"].name and facts["hardware"]["assumed"]
    assert facts["ops"] == explain(config, hardware="h200")["ops"]
    cpu = explain(EngineConfig(model=str(tiny_checkpoint)))
    unrecorded = msgspec.structs.replace(config, prefer_kernels="torch")
    assert "runs in torch, which looks at values on the host" in explain(unrecorded)["decode_call_by_call"]
    assert cpu["decode_call_by_call"] is None
    assert cpu["hardware"] is None and "floor" not in cpu["steps"]["decode"]
    with pytest.raises(ValueError, match="hardware must be one of a100, l4"):
        explain(config, hardware="tpu")
    with pytest.raises(ValueError, match="ask for one of them"):
        explain(config, hardware="h200", isa="avx2")


def test_formats_have_peaks_of_their_own(tiny_checkpoint: Path) -> None:
    """FP8 and int8 multiply twice as fast, so that their products' floor is half."""
    for quantization, op in (("fp8", "linear_fp8"), ("int8", "linear_int8"), ("int4", "linear_int4")):
        config = EngineConfig(model=str(tiny_checkpoint), device="cuda", dtype="bfloat16", quantization=quantization)
        ops = [entry for name, entry in by_op(explain(config, hardware="h100")).items() if name.endswith(op)]
        for entry in ops:
            peak = GPUS["h100"].flops["bfloat16" if quantization == "int4" else "float8"]
            assert entry["prefill"]["floor"]["compute"] == pytest.approx(entry["prefill"]["flops"] / peak)
        assert ops
