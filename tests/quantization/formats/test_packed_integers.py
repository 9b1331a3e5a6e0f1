"""AWQ and GPTQ, written here as their packers do, one number at a time, and dequantized by their formulas.

AWQ is also compared with compressed-tensors' converter of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skyline.checkpoint.errors import CheckpointError
from skyline.ops.formats import IntegerFormat
from skyline.quantization.formats import detect
from tests.quantization.formats.tensors import Tensors, found, only, randint, randn, whole

MODULE = "model.layers.0.self_attn.o_proj"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[R, C] -> int32 [R, ceil(C * bits / 32)], along the last dimension; AWQ's order is one of columns."""
    each = 32 // bits
    words = [[0] * -(-values.shape[1] // each) for _ in range(values.shape[0])]
    for row, numbers in enumerate(values.tolist()):
        for place in range(each * len(words[row])):
            column = place // each * each + (order[place % each] if order is not None else place % each)
            words[row][place // each] |= (numbers[column] if column < len(numbers) else 0) << bits * (place % each)
    return torch.tensor([[w - (1 << 32) if w >> 31 else w for w in row] for row in words], dtype=torch.int32)


def minus_one(words: Tensor, bits: int) -> Tensor:
    """Version 1 of GPTQ's format: a one is taken off each number, within the word."""
    one = sum(1 << bits * place for place in range(32 // bits))
    less = (words.long() - one) & 0xFFFFFFFF
    return torch.where(less >= 1 << 31, less - (1 << 32), less).int()


def numbers(n: int, k: int, group: int, bits: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Levels [K, N], zero points and float16 scales [groups, N]."""
    groups = -(-k // group)
    levels = randint(0, 1 << bits, k, n, seed=seed)
    return levels, randint(0, 1 << bits, groups, n, seed=seed + 1), (randn(groups, n, seed=seed + 2) * 0.01).half()


def plain(levels: Tensor, zeros: Tensor, scales: Tensor, order: Tensor) -> Tensor:
    """[N, K]: (level - zero) * scale, in float32."""
    return ((levels - zeros[order]).float() * scales[order].float()).t()


def gptq(levels: Tensor, zeros: Tensor, scales: Tensor, bits: int, order: Tensor, version: str) -> dict[str, Tensor]:
    packed = pack(zeros, bits)
    return {
        f"{MODULE}.qweight": pack(levels.t(), bits).t().contiguous(),
        f"{MODULE}.qzeros": minus_one(packed, bits) if version == "gptq" else packed,
        f"{MODULE}.scales": scales,
        f"{MODULE}.g_idx": order.int(),
    }


def config_of(bits: int, group: int, version: str = "gptq") -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": version}


@pytest.mark.parametrize("version", ("gptq", "gptq_v2"))
@pytest.mark.parametrize("act_order", (False, True))
@pytest.mark.parametrize("group", (16, 32, 64, 128, 256, -1))
@pytest.mark.parametrize("bits", (4, 8))
def test_gptq(bits: int, group: int, act_order: bool, version: str) -> None:
    n, k = 24, 256
    size = k if group == -1 else group
    levels, zeros, scales = numbers(n, k, size, bits)
    order = torch.arange(k) // size
    if act_order:
        order = order[torch.randperm(k, generator=torch.Generator().manual_seed(5))]
    tensors = gptq(levels, zeros, scales, bits, order, version)
    stored = only(config_of(bits, group, version), tensors)
    assert stored.shape == (n, k)
    assert torch.equal(whole(stored), plain(levels, zeros, scales, order))
    if (act_order and size < k) or bits == 8 or group == 16:
        assert stored.integers is None
    else:
        assert stored.integers == IntegerFormat(bits=4, group=min(size, 128), zeros=True)


def test_gptq_zero_points_in_the_middle_are_none() -> None:
    for bits, expected in ((4, IntegerFormat(bits=4, group=32)), (8, None)):
        levels, zeros, scales = numbers(16, 64, 32, bits)
        zeros[:] = 1 << (bits - 1)
        order = torch.arange(64) // 32
        stored = only(config_of(bits, 32), gptq(levels, zeros, scales, bits, order, "gptq"))
        assert stored.integers == expected
        assert torch.equal(whole(stored), plain(levels, zeros, scales, order))
    levels, zeros, scales = numbers(16, 64, 64, 8)
    zeros[:] = 128
    stored = only(config_of(8, -1), gptq(levels, zeros, scales, 8, torch.zeros(64).long(), "gptq"))
    assert stored.integers == IntegerFormat(bits=8)
    assert torch.equal(whole(stored), plain(levels, zeros, scales, torch.zeros(64).long()))


def test_gptq_with_bits_of_its_own_for_one_layer_and_a_bias() -> None:
    """GPTQModel's `dynamic`; an order never filled in; a bias of zeros that models without one have no place for."""
    levels, zeros, scales = numbers(16, 128, 64, 8)
    tensors = gptq(levels, zeros, scales, 8, torch.zeros(128), "gptq")
    config = {**config_of(4, 32), "dynamic": {"+:.*(a+)+$": {"bits": 8, "group_size": 64}}}
    weights = found(config, {**tensors, f"{MODULE}.bias": torch.zeros(16)})
    assert weights.spare == {f"{MODULE}.bias"} and f"{MODULE}.bias" not in weights.consumed
    stored = weights.stored[f"{MODULE}.weight"]
    assert torch.equal(whole(stored), plain(levels, zeros, scales, torch.arange(128) // 64))
    del tensors[f"{MODULE}.g_idx"]
    assert torch.equal(only(config, tensors).read(0, 16), stored.read(0, 16))


def awq(levels: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    return {
        f"{MODULE}.qweight": pack(levels, 4, AWQ_ORDER),
        f"{MODULE}.qzeros": pack(zeros, 4, AWQ_ORDER),
        f"{MODULE}.scales": scales,
    }


@pytest.mark.parametrize("group", (32, 64, 128, -1))
def test_awq(group: int) -> None:
    n, k = 40, 256
    size = k if group == -1 else group
    levels, zeros, scales = numbers(n, k, size, 4)
    tensors = awq(levels, zeros, scales)
    stored = only(
        {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}, tensors
    )
    assert stored.integers == IntegerFormat(bits=4, group=min(size, 128), zeros=True)
    values = whole(stored)
    assert torch.equal(values, plain(levels, zeros, scales, torch.arange(k) // size))
    converter = AutoAWQConverter(bits=4, group_size=size)
    weight, weight_scale, zero = converter._convert_gemm_module(
        *(tensors[f"{MODULE}.{p}"] for p in ("qweight", "scales", "qzeros"))
    )
    spread = torch.arange(k) // size
    assert zero is not None
    assert torch.equal(values, (weight.float() - zero.float()[:, spread]) * weight_scale.float()[:, spread])


def test_awq_without_zero_points() -> None:
    levels, zeros, scales = numbers(16, 64, 32, 4)
    tensors = awq(levels, zeros, scales)
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": False}
    del tensors[f"{MODULE}.qzeros"]
    stored = only(config, tensors)
    assert stored.integers == IntegerFormat(bits=4, group=32)
    assert torch.equal(whole(stored), plain(levels, torch.full_like(zeros, 8), scales, torch.arange(64) // 32))
    with pytest.raises(CheckpointError, match=r"qzeros.*missing"):
        detect({**config, "zero_point": True}, Tensors(tensors))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_slice_is_a_slice_of_the_whole(data: st.DataObject) -> None:
    """Rows that start and end anywhere within words, of each layout."""
    n = 8 * data.draw(st.integers(1, 5))
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    levels, zeros, scales = numbers(n, 64, 32, 4, seed=data.draw(st.integers(0, 99)))
    order = torch.arange(64) // 32
    write: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]] = data.draw(
        st.sampled_from(
            [
                lambda: ({"quant_method": "awq", "group_size": 32}, awq(levels, zeros, scales)),
                lambda: (config_of(4, 32), gptq(levels, zeros, scales, 4, order, "gptq")),
                lambda: (config_of(4, 32, "gptq_v2"), gptq(levels, zeros, scales, 4, order, "gptq_v2")),
            ]
        )
    )
    stored = only(*write())
    assert torch.equal(stored.read(start, stop), plain(levels, zeros, scales, order)[start:stop])
    assert torch.equal(stored.levels(start, stop).dequantize(), stored.read(start, stop))


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_scales_that_cannot_be(value: float) -> None:
    levels, zeros, scales = numbers(16, 64, 32, 4)
    scales[1, 9] = value
    stored = only({"quant_method": "awq", "group_size": 32}, awq(levels, zeros, scales))
    assert stored.read(0, 9).isfinite().all()
    for use in (stored.read, stored.levels):
        with pytest.raises(CheckpointError, match=r"o_proj\.scales"):
            use(9, 10)


@pytest.mark.parametrize(
    ("method", "part", "change"),
    (
        ("awq", "qweight", lambda t: t[:20]),
        ("awq", "qweight", lambda t: t[:, :1]),
        ("awq", "qzeros", lambda t: t[:1]),
        ("awq", "scales", lambda t: t[:, :15]),
        ("awq", "scales", lambda t: t.int()),
        ("gptq", "qweight", lambda t: t[:, :15]),
        ("gptq", "qweight", lambda t: t.flatten()),
        ("gptq", "qzeros", lambda t: t[:, :1]),
        ("gptq", "qzeros", lambda t: t[:1]),
        ("gptq", "qweight", lambda t: t[:4]),
        ("gptq", "scales", lambda t: t[:0]),
        ("gptq", "g_idx", lambda t: t[:60]),
    ),
)
def test_what_does_not_fit_is_named(method: str, part: str, change: Callable[[Tensor], Tensor]) -> None:
    levels, zeros, scales = numbers(16, 64, 32, 4)
    made = (
        awq(levels, zeros, scales)
        if method == "awq"
        else gptq(levels, zeros, scales, 4, torch.arange(64) // 32, "gptq")
    )
    made[f"{MODULE}.{part}"] = change(made[f"{MODULE}.{part}"])
    with pytest.raises(CheckpointError, match=r"o_proj\."):
        detect({"quant_method": method, "bits": 4, "group_size": 32}, Tensors(made))


@pytest.mark.parametrize(
    ("config", "message"),
    (
        ({"quant_method": "awq", "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "bits": 3}, "bits"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "marlin"),
    ),
)
def test_what_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        detect(config, Tensors({}))
