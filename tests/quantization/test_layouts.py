"""Layouts quantize what they are given, in whatever pieces it comes, by the formulas of skyline.quantization."""

from __future__ import annotations

import pytest
import torch

from skyline.kernels import Request, choose
from skyline.kernels.cpu.packed import Format, pack, packed_layout, weight_layout
from skyline.kernels.torch_quantized import INT4, INT8, Int4Layout
from skyline.ops import QuantizedWeight, linear_int4, linear_int8, linear_int8_weight_only
from skyline.ops.formats import IntegerFormat, set_integers
from skyline.quantization import GROUPS, quantize_int4, quantize_int8

LAYOUTS = [INT8, *INT4.values()]


def _quantized(layout: object, weight: torch.Tensor) -> QuantizedWeight:
    return (
        quantize_int4(weight, layout.group, layout.symmetric)
        if isinstance(layout, Int4Layout)
        else quantize_int8(weight)
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_room_is_made_on_the_device(layout: Int4Layout) -> None:
    """A GPU whose Triton cannot compile computes integers in torch."""
    room = layout.allocate((3, 5, 72), torch.bfloat16, torch.device("meta"))
    assert {part.device.type for part in (room.values, room.scales, room.zeros) if part is not None} == {"meta"}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("shape", [(10, 72), (3, 5, 72)], ids=str)
def test_pieces_in_any_order_make_the_whole(layout: Int4Layout, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = layout.allocate(shape, torch.bfloat16)
    rows = weight.view(-1, shape[-1])
    for first, last in ((4, 9), (9, len(rows)), (0, 1), (1, 4)):
        layout.write(target, first, rows[first:last])
    whole = _quantized(layout, weight)
    assert target.shape == shape and target.nbytes == whole.nbytes and target.group == whole.group
    assert torch.equal(target.values, whole.values) and torch.equal(target.scales, whole.scales)
    assert (target.zeros is None) == (whole.zeros is None)
    assert whole.zeros is None or torch.equal(target.zeros, whole.zeros)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_refuses_what_is_no_number(layout: Int4Layout) -> None:
    target = layout.allocate((2, 32), torch.float32)
    with pytest.raises(ValueError, match="NaN"):
        layout.write(target, 0, torch.full((2, 32), float("nan")))


# The native layouts


def _weight(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn((70, 200), generator=generator) * torch.rand((70, 1), generator=generator)
    weight[5] = 0
    weight[6, 64:] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_native_layouts_hold_the_same_numbers(instruction_set: str, dtype: torch.dtype, gated: bool) -> None:
    weight = _weight(dtype)
    expected = quantize_int8(weight).dequantize()
    for format in (Format.INT8, Format.INT8_WEIGHT_ONLY):
        assert torch.equal(pack(weight, packed_layout(format, gated)).dense(), expected)
    for group in GROUPS:
        for zeros in (False, True):
            packed = pack(weight, packed_layout(Format.INT4, gated, group, zeros))
            expected = quantize_int4(weight, group, symmetric=not zeros).dequantize()
            assert torch.equal(packed.dense(), expected), (group, zeros)


# The choice of a kernel


def test_what_was_decided_for_a_weight_is_its_layout() -> None:
    for invariant in (False, True):
        kernel = choose(Request(linear_int4, "cpu", torch.float32, batch_invariant=invariant)).kernel
        assert kernel.provider == ("torch-invariant" if invariant else "torch")
        for group in GROUPS:
            for zeros in (False, True):
                weight = torch.empty(2, 128)
                set_integers(weight, IntegerFormat(4, group, zeros))
                assert kernel.layouts[1]((None, weight)) is INT4[group, zeros]
                native_layout = weight_layout(Format.INT4, weight)
                assert (native_layout.group, native_layout.zeros) == (group, zeros)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("experts", [None, 3])
def test_integers_are_taken_as_they_are(layout: Int4Layout, experts: int | None, instruction_set: str) -> None:
    """Whatever pieces a checkpoint's integers come in, torch's and the native layouts hold just these."""
    generator = torch.Generator().manual_seed(2)
    shape = (40, 136) if experts is None else (experts, 40, 136)
    # Neither of them is what quantizing the values would give: no level is the largest of its row.
    weight = torch.randn(shape, generator=generator)
    found = _quantized(layout, weight)
    tamed = QuantizedWeight(found.values.clamp(-3, 3) if found.zeros is None else found.values.clamp(2, 9),
                            found.scales, found.zeros, found.group)  # fmt: skip
    rows = QuantizedWeight(
        tamed.values.flatten(0, -2),
        tamed.scales.reshape(-1) if tamed.group is None else tamed.scales.flatten(0, -2),
        None if tamed.zeros is None else tamed.zeros.flatten(0, -2),
        tamed.group,
    )
    formats = [Format.INT4] if isinstance(layout, Int4Layout) else [Format.INT8, Format.INT8_WEIGHT_ONLY]
    group, zeros = (layout.group, not layout.symmetric) if isinstance(layout, Int4Layout) else (0, False)
    for target_layout in (layout, *(packed_layout(f, gated, group, zeros) for f in formats for gated in (False, True))):
        target = target_layout.allocate(shape, torch.bfloat16)
        count = rows.shape[0]
        for start, stop in ((17, 33), (33, count), (0, 17)):
            target_layout.write(target, start, rows.rows(start, stop))
        if isinstance(target, QuantizedWeight):
            assert torch.equal(target.dequantize(), tamed.dequantize())
            continue
        for expert in range(experts or 1):
            expected = tamed.dequantize() if experts is None else tamed.dequantize()[expert]
            assert torch.equal(target.expert(expert).dense(), expected)


@pytest.mark.parametrize("op", [linear_int8, linear_int8_weight_only, linear_int4], ids=lambda op: op.name)
def test_batch_invariant_kernels_are(op: object) -> None:
    run = choose(Request(op, "cpu", torch.float32, batch_invariant=True)).kernel.run
    case = next(case for case in op.cases(torch.float32, torch.Generator().manual_seed(0)) if "T=70" in case.label)
    x, weight = case.args[:2]
    whole = run(x, weight)
    assert torch.equal(torch.cat([run(x[:1], weight), run(x[1:18], weight), run(x[18:], weight)]), whole)
    assert run(x[:0], weight).shape == (0, weight.shape[0])
