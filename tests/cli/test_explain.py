"""`skyline explain` against figures counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from skyline.engine.config import EngineConfig
from skyline.kernels import NoKernelError
from skyline.runner.explain import explain

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
    # Only the last token of a prompt needs logits.
    assert linear["prefill"]["flops"] == 2 * (50 * weights + VOCAB * HIDDEN)
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


def test_it_refuses_what_the_model_cannot_do(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="context of 256"):
        explain(EngineConfig(model=str(tiny_checkpoint)), context=257)
    with pytest.raises(ValueError, match="device"):
        explain(EngineConfig(model=str(tiny_checkpoint), device="tpu"))
    with pytest.raises(NoKernelError, match="never verified on cuda"):
        explain(EngineConfig(model=str(tiny_checkpoint), device="cuda", batch_invariant=True))
