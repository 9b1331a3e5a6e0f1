"""`skyline quantize` writes what transformers (with compressed-tensors) and Skyline read alike."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from skyline.checkpoint.config import load_config
from skyline.checkpoint.errors import CheckpointError
from skyline.cli import app
from skyline.models import create_model
from skyline.quantization.compress import COMPRESSIONS, nvfp4
from skyline.runner import export as module
from skyline.runner.checkpoint import Checkpoint
from skyline.runner.export import export
from tests.models.harness import CPU, PagedRunner, save_tiny
from tests.tiny import make_tokenizer

TOKENS = [5, 9, 3, 60, 2, 8, 8, 41, 7, 30, 12]
# Sizes that every group divides.
SIZES: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=32
)
MOE = dict(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128)
# Largest error of a weight, as a share of the largest magnitude of its group or row.
BOUNDS = {"fp8": 0.04, "nvfp4": 0.2, "mxfp4": 0.26, "int8": 0.005, "int4": 0.08}


def _ours(folder: Path) -> torch.nn.Module:
    config = load_config(folder)
    model = create_model(config, torch.float32, CPU)
    with Checkpoint(folder, config) as checkpoint:
        checkpoint.load(model, lambda target, rows: target.copy_(rows))
    return model


@pytest.mark.parametrize("format", COMPRESSIONS)
def test_transformers_reads_it(format: str, tmp_path: Path) -> None:
    import transformers
    from compressed_tensors.compressors import BaseCompressor

    save_tiny(tmp_path / "plain", "Qwen3", **SIZES)
    found = export(tmp_path / "plain", tmp_path / "small", format)
    assert (found.quantized, found.kept) == (3 * 7, 0) and found.bytes_after < found.bytes_before
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "small",
        dtype=torch.float32,
        quantization_config=transformers.CompressedTensorsConfig(run_compressed=False),
    )
    ours = _ours(tmp_path / "small")
    compared = 0
    for name, parameter in ours.named_parameters():
        if name.endswith(("down_proj.weight", "o_proj.weight")):  # not merged with others in ours
            layer = theirs.get_submodule(name.removesuffix(".weight"))
            if getattr(layer, "quantization_status", None) == "compressed":
                BaseCompressor.load_from_registry(layer.quantization_scheme.format).decompress_module(layer)
            assert layer.weight.dtype in (torch.float32, torch.bfloat16)
            torch.testing.assert_close(parameter, layer.weight.float(), rtol=2**-8, atol=0)
            compared += 1
    assert compared == 6


@pytest.mark.parametrize("format", COMPRESSIONS)
def test_values_are_near(format: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "plain", "Qwen3", **SIZES)
    export(tmp_path / "plain", tmp_path / "small", format)
    plain, small = _ours(tmp_path / "plain"), _ours(tmp_path / "small")
    for (name, before), (_, after) in zip(plain.named_parameters(), small.named_parameters(), strict=True):
        if "proj" in name:
            assert not torch.equal(before, after)
            assert (before - after).abs().max() < BOUNDS[format] * before.abs().max(), name
        else:
            assert torch.equal(before, after)


@pytest.mark.parametrize("format", ["int8", "nvfp4"])
def test_experts_are_quantized_and_routers_are_not(format: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "plain", "Qwen3Moe", **MOE)
    found = export(tmp_path / "plain", tmp_path / "small", format)
    assert (found.quantized, found.kept) == (3 * (4 + 4 * 3), 3)
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(3))]
    dense = PagedRunner(_ours(tmp_path / "plain")).step(("a", TOKENS))[0]
    small = PagedRunner(_ours(tmp_path / "small")).step(("a", TOKENS))[0]
    assert 0 < (dense - small).std() < (0.05 if format == "int8" else 0.6) * dense.std()


def test_what_no_group_divides_stays(tmp_path: Path) -> None:
    save_tiny(tmp_path / "plain", "Qwen3", **{**SIZES, "intermediate_size": 200})
    found = export(tmp_path / "plain", tmp_path / "small", "int4")
    assert (found.quantized, found.kept) == (18, 3)
    ignored = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.1.mlp.down_proj" in ignored and "model.layers.1.mlp.up_proj" not in ignored
    _ours(tmp_path / "small")


def test_shards_have_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "plain", "Qwen3", **SIZES)
    export(tmp_path / "plain", tmp_path / "one", "fp8")
    monkeypatch.setattr(module, "SHARD_BYTES", 200_000)
    export(tmp_path / "plain", tmp_path / "many", "fp8")
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for one, many in zip(_ours(tmp_path / "one").parameters(), _ours(tmp_path / "many").parameters(), strict=True):
        assert torch.equal(one, many)


def test_rows_and_groups_of_zeros() -> None:
    weight = torch.zeros(4, 128)
    weight[2, 5] = 3.0
    for compression in COMPRESSIONS.values():
        parts = compression.compress(weight)
        assert all(bool(part.float().isfinite().all()) for part in parts.values())
    assert nvfp4(torch.zeros(2, 32))["weight_global_scale"].isfinite().all()


def test_the_nearest_number_of_fp4() -> None:
    """Every number of e2m1 stays what it is, ties go to the even code, and what is too large becomes 6."""
    from skyline.quantization.compress import _to_fp4

    numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert _to_fp4(torch.tensor(numbers)).tolist() == list(range(8))
    assert _to_fp4(-torch.tensor(numbers[1:])).tolist() == list(range(9, 16))
    ties = [(a + b) / 2 for a, b in itertools.pairwise(numbers)]
    assert _to_fp4(torch.tensor(ties)).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert _to_fp4(torch.tensor([7.0, 1e9, -8.0])).tolist() == [7, 7, 15]


# Bad input


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    save_tiny(tmp_path / "plain", "Qwen3", **SIZES)
    with pytest.raises(ValueError, match="format must be one of fp8, nvfp4"):
        export(tmp_path / "plain", tmp_path / "small", "int3")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    with pytest.raises(ValueError, match="is not empty"):
        export(tmp_path / "plain", tmp_path / "full", "int8")
    assert (tmp_path / "full" / "mine").read_text() == "precious"
    export(tmp_path / "plain", tmp_path / "small", "int8")
    with pytest.raises(CheckpointError, match="is quantized already"):
        export(tmp_path / "small", tmp_path / "again", "int8")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN"):
        export(tmp_path / "plain", tmp_path / "again", "int4")
    assert not (tmp_path / "again").exists()


def test_the_command(tmp_path: Path) -> None:
    save_tiny(tmp_path / "plain", "Qwen3", vocab_size=512, **SIZES)
    make_tokenizer(tmp_path / "plain")
    arguments = ["quantize", str(tmp_path / "plain"), str(tmp_path / "small"), "--format", "int4", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["quantized"] == 21
    assert (tmp_path / "small" / "tokenizer.json").exists() and (tmp_path / "small" / "tokenizer_config.json").exists()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code != 0 and "is not empty" in again.output
