"""Weights by the model's names, whatever a checkpoint calls them: those that also see hold a language model too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from skyline.checkpoint.config import load_config
from skyline.checkpoint.errors import CheckpointError
from skyline.engine.config import EngineConfig
from skyline.kernels.gpu import GPUS
from skyline.models import create_model
from skyline.runner.checkpoint import Checkpoint
from skyline.runner.loader import build_program
from skyline.runner.weight_store import WeightStore
from tests.models import quantized
from tests.models.families import FAMILIES
from tests.models.harness import CPU, PagedRunner, save_tiny

TOKENS = [5, 9, 3, 60, 2, 8, 8, 41, 7, 30, 12]
_TEXT: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=None,
)


def _save(folder: Path, family: str) -> torch.Tensor:
    """Write a tiny checkpoint with a vision tower; returns the logits of TOKENS."""
    import transformers

    text = {**_TEXT, **FAMILIES[family]}
    if family == "Gemma3":
        vision: dict[str, Any] = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                      image_size=28, patch_size=14)  # fmt: skip
    else:
        vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name and float(parameter.mean()) > 0.5 else 0.0
            parameter.copy_(around + torch.randn_like(parameter) * 0.2)
        expected: torch.Tensor = model(input_ids=torch.tensor([TOKENS])).logits[0]
    model.save_pretrained(folder)
    return expected


@pytest.mark.parametrize("family", ["Gemma3", "Qwen3_5", "Qwen3_5Moe"])
def test_the_language_model_of_one_that_sees(family: str, tmp_path: Path) -> None:
    expected = _save(tmp_path, family)
    config = load_config(tmp_path)
    assert config.architecture == f"{family}ForCausalLM" and config.eos_token_ids == [2]
    model = create_model(config, torch.float32, CPU)
    with Checkpoint(tmp_path, config) as checkpoint:
        assert (
            checkpoint.method == ""
            and checkpoint.integers(model) == {}
            and checkpoint.report(model, torch.float32) == []
        )
        checkpoint.load(model, lambda target, rows: target.copy_(rows))
    logits = PagedRunner(model).step(("a", TOKENS))[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("inner", [128, 96])
def test_experts_in_blocks_of_fp8(inner: int, tmp_path: Path) -> None:
    """They stay as stored where blocks end with gate and with up; their values are those of the checkpoint."""
    settings = {**_TEXT, "hidden_size": 160, "moe_intermediate_size": inner, "num_experts": 3, "num_experts_per_tok": 2}
    theirs = save_tiny(tmp_path / "plain", "Qwen3Moe", **settings)
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    theirs = quantized.rewrite(tmp_path / "plain", theirs, quantized.fp8_blocks(128), fp8)
    folder = tmp_path / "small"
    config = load_config(folder)
    model = create_model(config, torch.float32, CPU, allocate=False)
    with Checkpoint(folder, config) as checkpoint:
        stored = checkpoint.integers(model, fp8=True)
        asked = EngineConfig(model=str(folder), device="cuda", dtype="float32")
        program = build_program(asked, model, torch.float32, stored=stored, gpu=GPUS["h200"])
        store = WeightStore(model, program, CPU)
        checkpoint.load(model, store.write)
    experts = [call for call in program.calls if "experts" in call.op.name]
    names = {"moe_experts_fp8"} if inner == 128 else {"fused_experts"}
    assert {call.op.name for call in experts} == names and len(experts) == 3
    for index, call in enumerate(experts):
        theirs_here = theirs.model.layers[index].mlp.experts
        for slot, wanted in zip(call.arguments[1:3], (theirs_here.gate_up_proj, theirs_here.down_proj), strict=True):
            found = program.constant(slot)
            plain = found if isinstance(found, torch.Tensor) else found.dequantize()
            assert isinstance(found, torch.Tensor) == (inner != 128)
            torch.testing.assert_close(plain, wanted.detach(), rtol=1e-6, atol=0)


def test_other_checkpoints_that_see_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": {"hidden_size": 8}}'
    )
    with pytest.raises(CheckpointError, match=r"multimodal.*Gemma3ForConditionalGeneration"):
        load_config(tmp_path)
