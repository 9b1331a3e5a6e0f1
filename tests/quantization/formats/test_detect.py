"""Which format it is, names in lists, and threads."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.weights import SafetensorsWeights
from skyline.quantization.formats import detect
from skyline.quantization.formats.names import MAX_PATTERN, is_ignored, matches_target, pattern_list
from tests.quantization.formats.tensors import Tensors, only, randn

E4M3 = torch.float8_e4m3fn


def test_nothing_is_quantized() -> None:
    tensors = {"lm_head.weight": randn(4, 4), "model.norm.weight": randn(4)}
    assert detect(None, Tensors(tensors)) is None
    assert detect({}, Tensors(tensors)) is None
    # As after dequantizing with transformers, which leaves the entry in config.json.
    assert detect({"quant_method": "mxfp4"}, Tensors(tensors)) is None


@pytest.mark.parametrize("config", ({"quant_method": "quark"}, {"quant_method": 7}, {"bits": 4}))
def test_an_unknown_method_is_named_with_those_that_are_known(config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"quant_method.*awq.*compressed-tensors.*mxfp4") as error:
        detect(config, Tensors({}))
    assert repr(config.get("quant_method"))[1:-1] in str(error.value)


def test_a_weight_that_is_there_twice() -> None:
    tensors = {
        "a.weight": randn(8, 8),
        "a.qweight": torch.zeros(32, 1).int(),
        "a.qzeros": torch.zeros(1, 1).int(),
        "a.scales": torch.ones(1, 8).half(),
    }
    with pytest.raises(CheckpointError, match=r"a\.weight.*more than once"):
        detect({"quant_method": "awq", "group_size": 32}, Tensors(tensors))


@pytest.mark.parametrize("head", (True, False))
def test_tied_embeddings(head: bool) -> None:
    """A head is quantized only if it is in the checkpoint; embeddings stay what they are."""
    tensors = {
        "model.embed_tokens.weight": randn(16, 8),
        "a.weight": randn(8, 8).to(E4M3),
        "a.weight_scale": torch.tensor(0.5),
    }
    if head:
        tensors |= {"lm_head.weight": randn(16, 8).to(E4M3), "lm_head.weight_scale": torch.tensor(0.5)}
    weights = detect({"quant_method": "fp8"}, Tensors(tensors))
    assert weights is not None
    assert set(weights.stored) == {"a.weight", *(["lm_head.weight"] if head else [])}
    assert "model.embed_tokens.weight" not in weights.consumed


def test_from_files_and_in_four_threads(tmp_path: Path) -> None:
    weight, scale = randn(300, 256).to(E4M3), randn(3, 2).abs()
    save_file({"a.weight": weight, "a.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    with SafetensorsWeights(tmp_path) as source:
        weights = detect({"quant_method": "fp8", "weight_block_size": [128, 128]}, source)
        assert weights is not None
        stored = weights.stored["a.weight"]
        with ThreadPoolExecutor(4) as pool:
            pieces = list(pool.map(lambda start: stored.read(start, min(start + 30, 300)), range(0, 300, 30)))
    spread = scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)
    assert torch.equal(torch.cat(pieces), weight.float() * spread)


def test_levels_of_four_threads_agree() -> None:
    """`integers` is found out once, whichever thread asks first."""
    tensors = {
        "a.qweight": torch.randint(0, 1 << 30, (64, 8)).int(),
        "a.qzeros": torch.randint(0, 1 << 30, (2, 8)).int(),
        "a.scales": randn(2, 64).half(),
    }
    stored = only({"quant_method": "awq", "group_size": 32}, tensors)
    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(lambda row: stored.levels(row, row + 1).dequantize(), range(64)))
    assert torch.equal(torch.cat(pieces), stored.read(0, 64))


def test_names_in_lists() -> None:
    module = "model.layers.11.mlp.gate"
    for entry in ("mlp.gate", module, "model.layers.11", "re:.*gate$", "re:model", "*.gate", "model.layers.1?.mlp*"):
        assert is_ignored(module, [entry]), entry
    for entry in ("mlp.gate_proj", "layers.1", "re:gate", "re:.*gat$", "*.gat", "gat"):
        assert not is_ignored(module, [entry]), entry
    assert matches_target(module, module) and not matches_target(module, "Linear")


def test_a_hostile_pattern_takes_no_time() -> None:
    name = "a" * 5000
    start = time.perf_counter()
    assert not is_ignored(name, ["re:(a+)+$b", "re:(a|aa)+b", "re:(.*)*x", "re:" + ".*" * 400 + "x", "*a" * 400 + "b"])
    assert time.perf_counter() - start < 5
    with pytest.raises(CheckpointError, match="look-around"):
        matches_target("a", "re:(?!a)")
    with pytest.raises(CheckpointError, match="regular expression"):
        matches_target("a", "re:a{1000}{1000}{1000}")
    with pytest.raises(CheckpointError, match="at most"):
        pattern_list(["a" * (MAX_PATTERN + 1)], "ignore")
    with pytest.raises(CheckpointError, match="list of strings"):
        pattern_list([1], "ignore")
