"""fp8 and gpt-oss' mxfp4, compared with transformers' own dequantization, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from skyline.checkpoint.errors import CheckpointError
from skyline.ops.formats import IntegerFormat
from skyline.quantization.formats import detect
from tests.quantization.formats.tensors import Tensors, found, only, randint, randn, whole

NAME = "model.layers.0.mlp.down_proj.weight"
E4M3 = torch.float8_e4m3fn


def quantizer(block: list[int] | None, scale_fmt: str = "float") -> Any:
    return SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt))


@pytest.mark.parametrize("scale_fmt", ("float", "ue8m0"))
@pytest.mark.parametrize("shape", ((256, 384), (3, 128, 256)))
def test_blocks_that_divide(shape: tuple[int, ...], scale_fmt: str) -> None:
    """Written and read by transformers; the three dimensions are those of all experts in one parameter."""
    name = NAME if len(shape) == 2 else "model.layers.0.mlp.experts.gate_up_proj"
    scale = f"{name}_scale_inv"
    tensors = Fp8Quantize(quantizer([128, 128], scale_fmt)).convert({name: randn(*shape) * 0.02})
    stored = only({"quant_method": "fp8", "weight_block_size": [128, 128]}, tensors)
    wanted = Fp8Dequantize(None)._dequantize_one(tensors[name], tensors[scale], torch.float32)
    assert torch.equal(whole(stored), wanted)
    assert stored.exact == (scale_fmt == "ue8m0")
    assert stored.format.startswith("fp8, blocks of 128x128")
    assert stored.integers == (IntegerFormat(8, 128, fp8=True) if len(shape) == 2 else None)
    assert stored.parts == (name, scale)


@pytest.mark.parametrize("shape", ((130, 257), (7, 300), (256, 64), (1, 1)))
def test_last_blocks_may_be_partial(shape: tuple[int, int]) -> None:
    weight, scale = randn(*shape).to(E4M3), randn(-(-shape[0] // 128), -(-shape[1] // 128), seed=1).abs()
    wanted = _dequantize_fp8_weight(weight, scale, [128, 128], torch.float32)
    for config in ({"quant_method": "fp8", "weight_block_size": [128, 128]}, None):
        stored = only(config, {NAME: weight, f"{NAME}_scale_inv": scale})
        assert torch.equal(whole(stored), wanted)


@pytest.mark.parametrize("dtype", (E4M3, torch.float8_e5m2))
@pytest.mark.parametrize("suffix", ("_scale", "_scale_inv"))
def test_a_scale_for_the_tensor_or_each_row(suffix: str, dtype: torch.dtype) -> None:
    weight = randn(24, 40).to(dtype)
    scales = (torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([[0.3]]), randn(24).abs(), randn(24, 1).abs())
    for scale in (*scales, scales[-1].bfloat16()):
        stored = only({"quant_method": "fp8"}, {NAME: weight, NAME + suffix: scale})
        factor = scale.float().reshape(-1, 1)
        assert torch.equal(whole(stored), weight.float() * factor)
        assert stored.format == ("fp8, a scale a tensor" if scale.numel() == 1 else "fp8, a scale a row")


def test_every_float8_number_is_widened_exactly() -> None:
    for dtype in (E4M3, torch.float8_e5m2):
        every = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)
        stored = only({"quant_method": "fp8"}, {NAME: every, f"{NAME}_scale": torch.tensor(1.0)})
        assert torch.equal(stored.read(0, 16).nan_to_num(7e8), every.float().nan_to_num(7e8))
        assert torch.equal(stored.read(0, 16).isnan(), every.float().isnan())


def test_experts_with_a_scale_each_or_one_for_gate_and_one_for_up() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight = randn(3, 8, 16).to(E4M3)
    for shape in ((3,), (3, 1, 1), (3, 2, 1)):
        scale = randn(*shape).abs()
        spread = scale.reshape(3, -1).repeat_interleave(8 // (scale.numel() // 3), dim=1).unsqueeze(-1)
        stored = only({"quant_method": "fp8"}, {name: weight, f"{name}_scale_inv": scale})
        assert torch.equal(whole(stored), weight.float() * spread)


def test_scales_that_are_powers_of_two_make_it_exact() -> None:
    weight = randn(128, 256).to(E4M3)
    for scale, exact in ((torch.tensor([[0.5, 4.0]]), True), (torch.tensor([[0.5, 3.0]]), False)):
        stored = only(
            {"quant_method": "fp8", "weight_block_size": [128, 128]}, {NAME: weight, f"{NAME}_scale_inv": scale}
        )
        whole(stored)
        assert stored.exact is exact
    tiny = only({"quant_method": "fp8"}, {NAME: weight, f"{NAME}_scale": torch.tensor(2.0**-130)})
    assert not tiny.exact


def test_static_scales_of_activations_and_of_keys_and_values() -> None:
    attention = "model.layers.0.self_attn"
    tensors: dict[str, Tensor] = {}
    for part in ("k_proj", "v_proj"):
        tensors[f"{attention}.{part}.weight"] = randn(8, 8).to(E4M3)
        tensors[f"{attention}.{part}.weight_scale"] = torch.tensor(0.5)
        tensors[f"{attention}.{part}.input_scale"] = torch.tensor(-1.0)
        tensors[f"{attention}.{part}.{part[0]}_scale"] = torch.tensor(0.25)
    weights = found({"quant_method": "fp8", "activation_scheme": "static"}, tensors)
    assert weights.consumed == set(tensors)
    assert weights.input_scales[f"{attention}.k_proj.weight"] == f"{attention}.k_proj.input_scale"
    assert weights.kv_scales[attention].value == f"{attention}.v_proj.v_scale"
    assert weights.method == "fp8: fp8, a scale a tensor"
    del tensors[f"{attention}.k_proj.k_scale"]
    with pytest.raises(CheckpointError, match="only one of keys and values"):
        detect({"quant_method": "fp8"}, Tensors(tensors))


@pytest.mark.parametrize("key", ("modules_to_not_convert", "ignored_layers"))
def test_a_float8_weight_without_a_scale(key: str) -> None:
    tensors = {
        NAME: randn(8, 8).to(E4M3),
        f"{NAME}_scale": torch.tensor(1.0),
        "model.layers.0.mlp.gate.weight": randn(8, 8).to(E4M3),
        "lm_head.weight": randn(8, 8),
        "model.embed_tokens.weight": randn(8, 8),
    }
    with pytest.raises(CheckpointError, match=r"mlp\.gate\.weight.*no scale"):
        detect({"quant_method": "fp8", key: ["lm_head", "mlp.gate_proj"]}, Tensors(tensors))
    assert set(found({"quant_method": "fp8", key: ["mlp.gate"]}, tensors).stored) == {NAME}


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -1.0))
def test_scales_that_cannot_be(value: float) -> None:
    scale = torch.ones(2, 2)
    scale[1, 0] = value
    config = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    stored = only(config, {NAME: randn(32, 32).to(E4M3), f"{NAME}_scale_inv": scale})
    assert stored.read(0, 16).isfinite().all()
    with pytest.raises(CheckpointError, match="weight_scale_inv"):
        stored.read(15, 17)


def test_a_scale_of_zero_gives_zeros() -> None:
    stored = only({"quant_method": "fp8"}, {NAME: randn(8, 8).to(E4M3), f"{NAME}_scale": torch.tensor(0.0)})
    assert (whole(stored) == 0).all()


@pytest.mark.parametrize(
    ("block", "scale"),
    (
        ([16, 16], torch.ones(2, 3)),
        ([16, 16], torch.ones(4)),
        (None, torch.ones(2, 2)),
        (None, torch.ones(3)),  # q, k and v fused, of unknown sizes
        (None, torch.ones(31)),
        (None, torch.ones(32).int()),
        ([16, 0], torch.ones(2, 2)),
        ([16], torch.ones(2, 2)),
        ("16", torch.ones(2, 2)),
    ),
)
def test_what_does_not_fit_is_refused(block: Any, scale: Tensor) -> None:
    tensors = {NAME: randn(32, 32).to(E4M3), f"{NAME}_scale_inv": scale}
    with pytest.raises(CheckpointError, match=r"weight_scale_inv|weight_block_size"):
        detect({"quant_method": "fp8", "weight_block_size": block}, Tensors(tensors))


@pytest.mark.parametrize("config", ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, None))
def test_experts_of_gpt_oss(config: dict[str, Any] | None) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = randint(0, 256, 3, 6, 4, 16).to(torch.uint8)
    scales = randint(0, 250, 3, 6, 4, seed=1).to(torch.uint8)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": randn(3, 6)}
    weights = found(config, tensors)
    assert set(weights.stored) == {name} and f"{name}_bias" not in weights.consumed
    stored = weights.stored[name]
    assert stored.shape == (3, 128, 6) and stored.exact
    assert torch.equal(whole(stored), convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    scales[2, 0, 0] = 255
    assert stored.read(0, 2).isfinite().all()
    with pytest.raises(CheckpointError, match="gate_up_proj_scales"):
        stored.read(2, 3)
    with pytest.raises(CheckpointError, match="gate_up_proj_scales"):
        stored.levels(2, 3)
    for bad in ({f"{name}_scales": scales[:, :, :3]}, {f"{name}_blocks": blocks[..., :8]}):
        with pytest.raises(CheckpointError, match="gate_up_proj_"):
            detect({"quant_method": "mxfp4"}, Tensors({**tensors, **bad}))
    with pytest.raises(CheckpointError, match=r"gate_up_proj_scales.*missing"):
        detect({"quant_method": "mxfp4"}, Tensors({f"{name}_blocks": blocks}))
