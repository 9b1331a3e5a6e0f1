"""ModelOpt's tensors, written here after its export (modelopt/torch/export/quant_utils.py), one number at a time.

NVFP4 is also compared with compressed-tensors' converter of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter
from compressed_tensors.quantization import preset_name_to_scheme
from torch import Tensor

from skyline.checkpoint.errors import CheckpointError
from skyline.quantization.formats import detect
from tests.quantization.formats.tensors import Tensors, found, only, randint, randn, whole

NAME = "model.layers.0.mlp.down_proj"
E4M3 = torch.float8_e4m3fn


def e2m1(code: int) -> float:
    """Sign, two bits of exponent with bias 1, one of mantissa; exponent 0 is subnormal."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa * 0.5) * 2.0 ** (exponent - 1)
    return -magnitude if code >> 3 else magnitude


def unpacked(packed: Tensor) -> Tensor:
    return torch.tensor([[e2m1(code) for byte in row for code in (byte & 15, byte >> 4)] for row in packed.tolist()])


def nvfp4(module: str = NAME, n: int = 12, k: int = 64, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        f"{module}.weight": randint(0, 256, n, k // 2).to(torch.uint8),
        f"{module}.weight_scale": (randn(n, k // 16, seed=1).abs() * 50).to(E4M3),
        f"{module}.weight_scale_2": torch.tensor(0.00037, dtype=dtype),
    }


def nvfp4_values(tensors: dict[str, Tensor], module: str = NAME) -> Tensor:
    scales = tensors[f"{module}.weight_scale"].float() * tensors[f"{module}.weight_scale_2"].float()
    return unpacked(tensors[f"{module}.weight"]) * scales.repeat_interleave(16, dim=1)


@pytest.mark.parametrize("has_input_scale", (True, False))
def test_nvfp4(has_input_scale: bool) -> None:
    tensors = nvfp4()
    if has_input_scale:
        tensors[f"{NAME}.input_scale"] = torch.tensor(0.01)
    weights = found({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, tensors)
    stored = weights.stored[f"{NAME}.weight"]
    assert stored.shape == (12, 64) and stored.format == "nvfp4, groups of 16" and not stored.exact
    assert weights.consumed == set(tensors)
    assert weights.input_scales == ({f"{NAME}.weight": f"{NAME}.input_scale"} if has_input_scale else {})
    assert torch.equal(whole(stored), nvfp4_values(tensors))


def test_nvfp4_is_what_compressed_tensors_converts_it_to() -> None:
    """That divides by 1 / weight_scale_2, which rounds twice more; the values are the same in bfloat16, nearly all."""
    tensors = nvfp4()
    tensors[f"{NAME}.weight_scale_2"] = torch.tensor([2.0**-11])  # of which 1 / x is exact
    converted = ModelOptNvfp4Converter(targets=["Linear"]).process(dict(tensors))
    scheme = preset_name_to_scheme("NVFP4", ["Linear"])
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    local = {name.rpartition(".")[2]: tensor for name, tensor in converted.items()}
    again = compressor.decompress(local, scheme)["weight"]
    ours = whole(only({"quant_method": "modelopt", "quant_algo": "NVFP4"}, tensors))
    assert torch.equal(ours.to(again.dtype), again)
    assert torch.equal(whole(only({"quant_method": "compressed-tensors"}, converted)), ours)


def test_fp8_per_tensor_row_and_block() -> None:
    weight = randn(130, 200).to(E4M3)
    row, grid = randn(130, seed=1).abs(), randn(2, 2, seed=2).abs()
    blocks = grid.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :200]
    for algorithm, scale, spread in (
        ("FP8", torch.tensor(0.3), torch.tensor(0.3)),
        ("FP8_PER_CHANNEL_PER_TOKEN", row, row[:, None]),
        ("FP8_PB_WO", grid.view(2, 1, 2, 1), blocks),
    ):
        tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": scale}
        stored = only({"quant_method": "modelopt", "quant_algo": algorithm}, tensors)
        assert torch.equal(whole(stored), weight.float() * spread)


def test_mxfp8_and_mxfp4() -> None:
    exponents = randint(100, 150, 12, 2, seed=1).to(torch.uint8)
    factors = torch.tensor([[2.0 ** (e - 127) for e in row] for row in exponents.tolist()]).repeat_interleave(32, 1)
    for algorithm, weight, values in (
        ("MXFP8", w := randn(12, 64).to(E4M3), w.float()),
        ("MXFP4", p := randint(0, 256, 12, 32).to(torch.uint8), unpacked(p)),
    ):
        tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": exponents}
        stored = only({"quant_method": "modelopt", "quant_algo": algorithm}, tensors)
        assert torch.equal(whole(stored), values * factors)
        assert stored.exact and stored.format == f"{algorithm.lower()}, groups of 32"
        native = {**tensors, f"{NAME}.weight_scale": exponents.view(torch.float8_e8m0fnu)}
        assert torch.equal(whole(only({"quant_method": "modelopt", "quant_algo": algorithm}, native)), values * factors)
        bad = {**tensors, f"{NAME}.weight_scale": exponents.clone().fill_(255)}
        with pytest.raises(CheckpointError, match="weight_scale"):
            only({"quant_method": "modelopt", "quant_algo": algorithm}, bad).read(0, 1)


def test_extreme_exponents_of_e8m0() -> None:
    """2^-127 is subnormal in float32; with it MXFP8's smallest numbers are below bfloat16's."""
    weight = torch.full((1, 64), 2.0**-9).to(E4M3)
    scale = torch.tensor([[0, 254]], dtype=torch.uint8)
    stored = only(
        {"quant_method": "modelopt", "quant_algo": "MXFP8"}, {f"{NAME}.weight": weight, f"{NAME}.weight_scale": scale}
    )
    values = whole(stored)
    assert values[0, 0].item() == 2.0**-136 and values[0, 32].item() == 2.0**118
    assert not stored.exact


def test_mixed_precision_from_its_own_file(tmp_path: Path) -> None:
    fp8 = {"lm_head.weight": randn(8, 8).to(E4M3), "lm_head.weight_scale": torch.tensor(0.5)}
    attention = "model.layers.0.self_attn"
    kv = {f"{attention}.k_proj.k_scale": torch.tensor(0.1), f"{attention}.v_proj.v_scale": torch.tensor(0.1)}
    gate = {"model.layers.0.mlp.gate.weight": randint(0, 9, 4, 4).to(torch.uint8)}
    layers = {"lm_head": {"quant_algo": "FP8"}, NAME: {"quant_algo": "NVFP4", "group_size": 16}}
    config = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": "FP8",
        "quantized_layers": layers,
        "exclude_modules": ["model.layers.*.mlp.gate"],
    }
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": config}))
    weights = detect(None, Tensors({**nvfp4(), **fp8, **kv, **gate}, tmp_path))
    assert weights is not None
    assert set(weights.stored) == {"lm_head.weight", f"{NAME}.weight"} and set(weights.kv_scales) == {attention}
    assert weights.method == "modelopt: nvfp4, groups of 16; fp8, a scale a tensor"
    layers["lm_head"]["quant_algo"] = "W4A8_AWQ"
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": config}))
    with pytest.raises(CheckpointError, match=r"W4A8_AWQ.*NVFP4"):
        detect(None, Tensors({**nvfp4(), **fp8}, tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({f"{NAME}.weight_scale_2": None}, "weight_scale_2"),
        ({f"{NAME}.weight_scale": None}, "no scale"),
        ({f"{NAME}.weight_scale": torch.ones(12, 3).to(E4M3)}, "weight_scale"),
        ({f"{NAME}.weight_scale_2": torch.ones(3)}, "weight_scale_2"),
        ({f"{NAME}.pre_quant_scale": torch.ones(64)}, "pre_quant_scale"),
    ),
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    tensors = {name: tensor for name, tensor in {**nvfp4(), **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        detect({"quant_method": "modelopt", "quant_algo": "NVFP4"}, Tensors(tensors))


@pytest.mark.parametrize("name", ("weight_scale", "weight_scale_2"))
@pytest.mark.parametrize("value", (float("nan"), -1.0))
def test_scales_that_cannot_be(name: str, value: float) -> None:
    tensors = nvfp4()
    tensors[f"{NAME}.{name}"] = torch.full_like(tensors[f"{NAME}.{name}"].float(), value).to(
        tensors[f"{NAME}.{name}"].dtype
    )
    stored = only({"quant_method": "modelopt", "quant_algo": "NVFP4"}, tensors)
    with pytest.raises(CheckpointError, match=rf"{name}'"):
        stored.read(0, 1)
