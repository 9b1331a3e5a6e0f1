"""Tensors written by compressed-tensors' own compressors, compared with what its decompressors give, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.quantization.utils.helpers import generate_gparam
from torch import Tensor

from skyline.checkpoint.errors import CheckpointError
from skyline.ops.formats import IntegerFormat
from skyline.quantization.formats import detect
from tests.quantization.formats.tensors import Tensors, found, only, randint, randn, whole

NAME = "model.layers.0.self_attn.q_proj"
ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(
    weights: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype, activations: dict[str, Any] | None = None
) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """The tensors of a random weight, what the library makes of them again, and the configuration."""
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    args = scheme.weights
    assert args is not None
    weight = randn(*shape).to(dtype) * 0.05
    state = {"weight": weight}
    n, k = shape
    rows, columns = n, k
    if args.strategy == "tensor":
        grouped = weight.reshape(1, 1, -1)
    elif args.strategy == "channel":
        grouped = weight.reshape(n, 1, k)
    elif args.strategy == "block":
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
        blocks = padded.view(-(-n // rows), rows, -(-k // columns), columns).transpose(1, 2)
        grouped = blocks.flatten(2)
    else:
        grouped = weight.reshape(n, -1, args.group_size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    scale, zero = calculate_qparams(low, high, args, state.get("weight_global_scale"))
    state["weight_scale"] = scale.flatten() if args.strategy == "tensor" else scale
    state["weight_zero_point"] = zero.flatten() if args.strategy == "tensor" else zero
    format = infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(format.value)
    tensors = compressor.compress(state, scheme)
    again = compressor.decompress(dict(tensors), scheme)["weight"]
    group = scheme.model_dump(mode="json")
    config = {"quant_method": "compressed-tensors", "format": format.value, "config_groups": {"group_0": group}}
    return {f"{NAME}.{name}": tensor.contiguous() for name, tensor in tensors.items()}, again, config


def assert_same(tensors: dict[str, Tensor], again: Tensor, config: dict[str, Any]) -> Any:
    """The library rounds to the dtype of the scales, so ours is rounded to it too."""
    stored = only(config, tensors)
    assert torch.equal(whole(stored).to(again.dtype), again)
    return stored


FLOAT = {"type": "float", "num_bits": 8, "symmetric": True}
INT = {"type": "int", "symmetric": True}
CASES = {
    "int8 channel": ({**INT, "num_bits": 8, "strategy": "channel"}, ACTIVATIONS, (40, 96)),
    "int8 tensor": ({**INT, "num_bits": 8, "strategy": "tensor"}, ACTIVATIONS, (40, 96)),
    "int8 group": ({**INT, "num_bits": 8, "strategy": "group", "group_size": 32}, ACTIVATIONS, (40, 96)),
    "int8 asymmetric": ({**INT, "num_bits": 8, "strategy": "channel", "symmetric": False}, ACTIVATIONS, (40, 96)),
    "fp8 tensor": ({**FLOAT, "strategy": "tensor"}, {**FLOAT, "strategy": "tensor", "dynamic": True}, (40, 96)),
    "fp8 channel": ({**FLOAT, "strategy": "channel"}, {**FLOAT, "strategy": "token", "dynamic": True}, (40, 96)),
    "fp8 block": (
        {**FLOAT, "strategy": "block", "block_structure": [16, 32]},
        {**FLOAT, "strategy": "group", "group_size": 32, "dynamic": True},
        (40, 80),
    ),
    "nvfp4": ({**FLOAT, "num_bits": 4, "strategy": "tensor_group", "group_size": 16}, None, (40, 96)),
    "mxfp4": (
        {**FLOAT, "num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        None,
        (40, 96),
    ),
    "mxfp8": ({**FLOAT, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, None, (40, 96)),
    "int4 channel": ({**INT, "num_bits": 4, "strategy": "channel"}, None, (40, 200)),
    "packed int8 channel": ({**INT, "num_bits": 8, "strategy": "channel"}, None, (40, 96)),
    "packed int8 group": ({**INT, "num_bits": 8, "strategy": "group", "group_size": 32}, None, (40, 96)),
    **{
        f"int4 group {group} symmetric={symmetric}": (
            {**INT, "num_bits": 4, "strategy": "group", "group_size": group, "symmetric": symmetric},
            None,
            (37, 2 * group),
        )
        for group in (16, 32, 64, 128, 256)
        for symmetric in (True, False)
    },
}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_are_the_librarys(case: str, dtype: torch.dtype) -> None:
    weights, activations, shape = CASES[case]
    assert_same(*compressed(weights, shape, dtype, activations))


@pytest.mark.parametrize("columns", (100, 103))
def test_a_row_may_end_within_a_word(columns: int) -> None:
    """Only weight_shape tells then, so this one is read."""
    tensors, again, config = compressed({**INT, "num_bits": 4, "strategy": "channel"}, (9, columns), torch.float16)
    source = Tensors(tensors)
    weights = detect(config, source)
    assert weights is not None
    assert torch.equal(whole(weights.stored[f"{NAME}.weight"]).half(), again)


def test_which_integers_kernels_can_take() -> None:
    def integers(case: str, dtype: torch.dtype = torch.float16) -> IntegerFormat | None:
        weights, activations, shape = CASES[case]
        tensors, _, config = compressed(weights, shape, dtype, activations)
        return only(config, tensors).integers

    assert integers("int8 channel", torch.bfloat16) == IntegerFormat(bits=8)
    assert integers("int8 tensor", torch.bfloat16) == IntegerFormat(bits=8)
    assert integers("packed int8 channel") == IntegerFormat(bits=8)
    assert integers("int8 group") is None
    assert integers("int8 asymmetric") is None
    assert integers("packed int8 group") is None
    assert integers("int4 group 16 symmetric=True") is None
    assert integers("int4 group 32 symmetric=True") == IntegerFormat(bits=4, group=32)
    assert integers("int4 group 64 symmetric=False") == IntegerFormat(bits=4, group=64, zeros=True)
    assert integers("int4 group 256 symmetric=False") == IntegerFormat(bits=4, group=128, zeros=True)
    assert integers("int4 channel") == IntegerFormat(bits=4, group=128)
    assert integers("int4 group 128 symmetric=True", torch.float32) is None  # scales that float16 would round


def test_bfloat16_scales_that_float16_holds() -> None:
    weights, activations, shape = CASES["int4 group 128 symmetric=True"]
    tensors, _, config = compressed(weights, shape, torch.bfloat16, activations)
    assert only(config, tensors).integers == IntegerFormat(bits=4, group=128)
    tensors[f"{NAME}.weight_scale"][3, 1] = 2.0**-30
    assert only(config, tensors).integers is None


def test_activation_order() -> None:
    """Column k has the scale and zero point of group g_idx[k] (compressed-tensors before 0.20 wrote this)."""
    weights, _, shape = CASES["int4 group 32 symmetric=False"]
    tensors, _, config = compressed(weights, shape, torch.float16)
    order = torch.arange(shape[1])[torch.randperm(shape[1], generator=torch.Generator().manual_seed(1))] // 32
    plain = whole(only(config, tensors))
    scales = tensors[f"{NAME}.weight_scale"].float()
    stored = only(config, {**tensors, f"{NAME}.weight_g_idx": order.int()})
    assert stored.integers is None
    natural = torch.arange(shape[1]) // 32
    # Undo the natural order's scales; the zero points, packed down the rows, by hand.
    words = tensors[f"{NAME}.weight_zero_point"]
    zeros = torch.stack([(words[row // 8] >> (4 * (row % 8))) & 15 for row in range(shape[0])])
    levels = (plain / scales[:, natural]).round() + zeros[:, natural]
    assert torch.equal(whole(stored), (levels - zeros[:, order]) * scales[:, order])
    for unsorted in (natural.int(), torch.full_like(order, -1).int()):
        assert torch.equal(whole(only(config, {**tensors, f"{NAME}.weight_g_idx": unsorted})), plain)
    bad = found(config, {**tensors, f"{NAME}.weight_g_idx": order.int() + 1}).stored[f"{NAME}.weight"]
    with pytest.raises(CheckpointError, match="weight_g_idx"):
        bad.read(0, 1)


def test_groups_with_targets() -> None:
    """Names go before regular expressions, and those before classes; int4 in 128 and int8 in 64 have one shape."""
    four, _, _ = compressed({**INT, "num_bits": 4, "strategy": "group", "group_size": 128}, (8, 256), torch.float16)
    tensors = {
        f"{module}.{name.rpartition('.')[2]}": tensor
        for module in ("a.down_proj", "b.down_proj", "b.up_proj")
        for name, tensor in four.items()
        if not name.endswith("weight_shape")
    }
    four_bits = {"weights": {"num_bits": 4, "group_size": 128, "type": "int", "strategy": "group"}}
    eight_bits = {"weights": {"num_bits": 8, "group_size": 64, "type": "int", "strategy": "group"}}
    groups = {
        "class": {**four_bits, "targets": ["Linear"]},
        "regex": {**eight_bits, "targets": ["re:.*down_proj$"]},
        "name": {**four_bits, "targets": ["a.down_proj"]},
    }
    weights = found({"quant_method": "compressed-tensors", "config_groups": groups}, tensors)
    assert {name: stored.shape for name, stored in weights.stored.items()} == {
        "a.down_proj.weight": (8, 256),
        "b.down_proj.weight": (8, 128),
        "b.up_proj.weight": (8, 256),
    }
    assert weights.method == "compressed-tensors: packed int4, groups of 128; packed int8, groups of 64"
    del groups["class"]
    with pytest.raises(CheckpointError, match=r"b\.up_proj"):
        found({"quant_method": "compressed-tensors", "config_groups": groups}, tensors)


def test_ignored_layers_stay_plain_and_scales_are_listed() -> None:
    tensors, _, config = compressed(*CASES["fp8 channel"][::2], torch.bfloat16, CASES["fp8 channel"][1])
    plain = {"lm_head.weight": randn(8, 8), "model.layers.0.block_sparse_moe.gate.weight": randn(8, 8)}
    extra = {
        f"{NAME}.input_scale": torch.tensor([0.5]),
        "model.layers.0.self_attn.k_scale": torch.tensor([0.1]),
        "model.layers.0.self_attn.v_scale": torch.tensor([0.2]),
    }
    weights = found({**config, "ignore": ["lm_head", "re:.*gate$"]}, {**tensors, **plain, **extra})
    assert set(weights.stored) == {f"{NAME}.weight"}
    assert not weights.consumed & set(plain) and set(extra) <= weights.consumed
    assert weights.input_scales == {f"{NAME}.weight": f"{NAME}.input_scale"}
    kv = weights.kv_scales["model.layers.0.self_attn"]
    assert (kv.key, kv.value) == ("model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale")


def test_only_keys_and_values_are_quantized() -> None:
    config = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}}
    module = "model.layers.0.self_attn"
    tensors = {f"{module}.k_proj.k_scale": torch.ones(4), f"{module}.v_proj.v_scale": torch.ones(4)}
    weights = found(config, {f"{module}.k_proj.weight": randn(4, 4), **tensors})
    assert weights.stored == {} and set(weights.kv_scales) == {module} and weights.consumed == set(tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "rotations"),
        ({"format": "marlin-24"}, "marlin-24"),
        ({"config_groups": {"W8A8": ["Linear"]}}, "W8A8"),
        ({"ignore": "lm_head"}, "ignore"),
        ({"config_groups": {"g": {"weights": {"num_bits": 3}}}}, "3 bits"),
        ({"config_groups": {"g": {"weights": {"num_bits": "x"}}}}, "num_bits"),
    ),
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    tensors, _, config = compressed({**INT, "num_bits": 4, "strategy": "group", "group_size": 32}, (8, 64), torch.half)
    with pytest.raises(CheckpointError, match=message):
        detect({**config, **change}, Tensors(tensors))


@pytest.mark.parametrize(
    ("name", "tensor"),
    (
        ("weight_scale", torch.ones(16, 3).half()),
        ("weight_scale", torch.ones(15, 2).half()),
        ("weight_scale", torch.ones(16, 2).int()),
        ("weight_packed", randint(0, 9, 16, 7).int()),
        ("weight_packed", randint(0, 9, 16, 8)),
        ("weight_zero_point", randint(0, 9, 1, 2).int()),
        ("weight_g_idx", torch.zeros(63).int()),
    ),
)
def test_what_does_not_fit_is_named(name: str, tensor: Tensor) -> None:
    weights = {**INT, "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    tensors, _, config = compressed(weights, (16, 64), torch.half)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight_"):
        detect(config, Tensors({**tensors, f"{NAME}.{name}": tensor}))


@pytest.mark.parametrize("missing", ("weight_scale", "weight_zero_point"))
def test_what_is_missing_is_named(missing: str) -> None:
    weights = {**INT, "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    tensors, _, config = compressed(weights, (16, 64), torch.half)
    del tensors[f"{NAME}.{missing}"]
    with pytest.raises(CheckpointError, match=missing):
        detect(config, Tensors(tensors))


def test_a_recorded_shape_that_differs() -> None:
    tensors, _, config = compressed({**INT, "num_bits": 4, "strategy": "group", "group_size": 32}, (16, 64), torch.half)
    stored = only(config, {**tensors, f"{NAME}.weight_shape": torch.tensor([16, 60])})
    with pytest.raises(CheckpointError, match="weight_shape"):
        stored.read(0, 16)


def test_zero_points_of_symmetric_weights_are_none() -> None:
    """Some writers keep them, all zero."""
    weights, activations, shape = CASES["int8 channel"]
    tensors, again, config = compressed(weights, shape, torch.float32, activations)
    zeros = {f"{NAME}.weight_zero_point": torch.zeros(shape[0], 1, dtype=torch.int8)}
    loaded = found(config, {**tensors, **zeros})
    assert loaded.consumed == {*tensors, *zeros}
    stored = loaded.stored[f"{NAME}.weight"]
    assert stored.integers == IntegerFormat(bits=8) and torch.equal(whole(stored), again)
    config["config_groups"]["group_0"]["weights"]["symmetric"] = False
    with pytest.raises(CheckpointError, match=r"weight_zero_point.*missing"):
        detect(config, Tensors(tensors))


def test_the_lowest_int8_is_kept() -> None:
    """The library's range is -128..127."""
    weight = torch.arange(-128, 128).to(torch.int8).view(2, 128)
    tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": torch.tensor([[0.5], [3.0]])}
    config = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8}}}}
    stored = only(config, tensors)
    assert torch.equal(whole(stored), weight.float() * torch.tensor([[0.5], [3.0]]))
    assert stored.levels(0, 2).values.min() == -128


def test_scales_beside_weights_that_were_never_compressed_are_refused() -> None:
    tensors = {f"{NAME}.weight": randn(8, 32).bfloat16(), f"{NAME}.weight_scale": torch.ones(8, 1)}
    config = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
    with pytest.raises(CheckpointError, match=r"q_proj\.weight'.*bfloat16"):
        detect(config, Tensors(tensors))
