"""Four-bit weights in words: what is packed comes out, and the PTX that widens it does what Triton's words do.

No GPU runs the PTX here, so a few lines of Python do.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from skyline.kernels.triton import four_bits
from skyline.kernels.triton.layouts import (
    FP4_WORDS,
    pack_fp4,
    pack_words,
    unpack_fp4,
    unpack_words,
)
from skyline.ops import OPS
from skyline.ops.fp4 import E2M1, Fp4Weight, fp4_case_weight
from tests.kernels.triton.test_ops import DEVICE

_ALL = 0xFFFFFFFF


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("k", [1, 8, 71, 128, 130])
def test_words_give_back_their_nibbles(k: int) -> None:
    nibbles = torch.randint(0, 16, (3, 5, k), generator=_generator(), dtype=torch.uint8)
    words = pack_words(nibbles)
    assert words.dtype == torch.int32 and words.shape[-1] % 16 == 0 and words.shape[-1] * 8 >= k
    assert torch.equal(unpack_words(words, k), nibbles)


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_fp4_words_hold_what_is_written(group: int, lead: tuple[int, ...]) -> None:
    """In pieces that cross from one expert to the next."""
    rows = 10 * max(1, *lead, 1)
    weight = fp4_case_weight(rows, 96, group, _generator())
    layout = FP4_WORDS[group]
    target = layout.allocate((*lead, 10, 96), torch.bfloat16, DEVICE)
    for first, stop in ((0, 7), (7, rows)):
        layout.write(target, first, weight.rows_at(torch.arange(first, stop)))
    assert target.shape == (*lead, 10, 96)
    again = unpack_fp4(target).dequantize().cpu()
    assert torch.equal(again.view(rows, 96), weight.dequantize())


def test_what_words_take_is_what_a_product_reads() -> None:
    words = pack_fp4(fp4_case_weight(10, 96, 32, _generator()))
    assert words.nbytes == 10 * (4 * 16 + 16 + 4), "12 words and 3 scales a row, filled up to 16"
    x = torch.zeros((3, 96), dtype=torch.bfloat16)
    assert OPS["linear_fp4"].cost(x, words, None, False).bytes == words.nbytes + 2 * 3 * (96 + 10)


def test_scales_of_mxfp4_from_end_to_end() -> None:
    """The row's scale takes what a factor cannot hold."""
    weight = fp4_case_weight(4, 64, 32, _generator())
    weight.scales.copy_(torch.tensor([[0, 1], [3, 254], [253, 254], [127, 200]]))
    packed = pack_fp4(weight)
    assert packed.row_scales.tolist() == [1.0, 2.0**126, 2.0**126, 2.0**72]
    again = unpack_fp4(packed)
    assert torch.equal(again.scales, weight.scales) and torch.equal(again.values, weight.values)


def _run(ptx: str, outputs: int, inputs: list[Any]) -> list[Any]:
    """What the PTX leaves in so many outputs: 16 bits each, or a float32. inputs: bits, or floats."""
    registers: dict[str, Any] = {f"${outputs + place}": value for place, value in enumerate(inputs)}

    def value(name: str) -> Any:
        if name == "0f00000000":
            return 0.0
        return int(name, 0) if name[0].isdigit() else registers[name]

    body = re.sub(r"\.reg [^;]*;", "", ptx.strip()[1:-1])
    for line in filter(None, map(str.strip, body.split(";"))):
        op, rest = line.split(None, 1)
        names = [name.strip(" {}") for name in rest.split(",")]
        if op == "mov.b32" and "{" in rest:
            if rest.startswith("{"):
                low, high, source = names
                registers[low], registers[high] = value(source) & 0xFFFF, value(source) >> 16
            else:
                registers[names[0]] = value(names[1]) | value(names[2]) << 16
        elif op == "mov.b32" and names[0] in ("a", "b"):
            registers[names[0]] = float(np.array(value(names[1]), np.uint32).view(np.float32))
        elif op in ("mov.b32", "mov.f32"):
            registers[names[0]] = value(names[1])
        elif op == "shl.b32":
            registers[names[0]] = value(names[1]) << value(names[2]) & _ALL
        elif op == "shr.u32":
            registers[names[0]] = value(names[1]) >> value(names[2])
        elif op == "and.b32":
            registers[names[0]] = value(names[1]) & value(names[2])
        elif op == "lop3.b32":
            assert names[4] == "0xEA"  # a & b | c
            registers[names[0]] = value(names[1]) & value(names[2]) | value(names[3])
        elif op == "fma.rn.f32":
            registers[names[0]] = value(names[1]) * value(names[2]) + value(names[3])
        else:
            dtype = {"fma.rn.bf16x2": torch.bfloat16, "fma.rn.f16x2": torch.float16}[op]
            a, b, c = (value(name) for name in names[1:])
            halves = []
            for at in (0, 16):
                mine, other, more = (_float(register >> at & 0xFFFF, dtype) for register in (a, b, c))
                halves.append(_bits(mine * other + more, dtype))
            registers[names[0]] = halves[0] | halves[1] << 16
    return [registers[f"${place}"] for place in range(outputs)]


def _float(bits: int, dtype: torch.dtype = torch.bfloat16) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(dtype).double())


def _bits(value: float, dtype: torch.dtype = torch.bfloat16) -> int:
    return int(torch.tensor(value, dtype=torch.float64).to(dtype).view(torch.int16)) & 0xFFFF


@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 1.375 * 2.0**-3])
def test_ptx_of_fp4(scale: float) -> None:
    codes = torch.randperm(16, generator=_generator()).to(torch.uint8)
    for half in codes.view(2, 8):
        word = int(pack_words(half)[0]) & _ALL
        found = _run(four_bits._FP4_PTX.value, 8, [word, _bits(scale * 2.0**126)])
        numbers = [(-1.0 if code & 8 else 1.0) * E2M1[code & 7] * scale for code in half.tolist()]
        assert [_float(bits) for bits in found] == numbers


@pytest.mark.parametrize("zero", [8.0, 15.0, 2.375, 300.25])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ptx_of_int4(dtype: torch.dtype, zero: float) -> None:
    """Rounded once: what is taken off, and the rest of a zero point that is no integer, are exact here."""
    ptx, bias = (four_bits._INT4_PTX, 128.0) if dtype == torch.bfloat16 else (four_bits._INT4_HALF_PTX, 1024.0)
    scale = 1.625 * 2.0**-5
    less = _float(_bits(-bias - math.floor(zero + 0.5), dtype), dtype)
    operands = (scale, less, (-bias - less - zero) * scale)
    for half in torch.randperm(16, generator=_generator()).to(torch.uint8).view(2, 8):
        given = [int(pack_words(half)[0]) & _ALL, *(_bits(value, dtype) for value in operands)]
        found = _run(ptx.value, 8, given)
        expected = [(value - zero) * scale for value in half.tolist()]
        if zero < 100:
            assert [_float(bits, dtype) for bits in found] == [_float(_bits(value, dtype), dtype) for value in expected]
        else:  # a level less the zero point has more bits than bfloat16
            assert [_float(bits, dtype) for bits in found] == pytest.approx(expected, rel=1.5 * 2.0**-8)


def test_ptx_of_a_word_times_eight() -> None:
    x = torch.randn(8, dtype=torch.float64, generator=_generator()).tolist()
    for half in torch.randperm(16, generator=_generator()).to(torch.uint8).view(2, 8):
        word = int(pack_words(half)[0]) & _ALL
        (found,) = _run(four_bits._TIMES_INT4.value, 1, [word, *x])
        assert found == pytest.approx(sum((128 + value) * each for value, each in zip(half.tolist(), x, strict=True)))
        numbers = [(-1.0 if code & 8 else 1.0) * E2M1[code & 7] for code in half.tolist()]
        (found,) = _run(four_bits._TIMES_FP4.value, 1, [word, *x])
        assert found * 2.0**126 == pytest.approx(sum(a * b for a, b in zip(numbers, x, strict=True)))


def test_weights_are_words_where_kernels_are_chosen() -> None:
    from skyline.kernels.registry import candidates

    kernel = next(kernel for kernel in candidates("linear_fp4") if kernel.provider == "triton")
    layout = kernel.layouts[1]
    weight = Fp4Weight(
        torch.zeros((4, 16), dtype=torch.uint8), torch.zeros((4, 1), dtype=torch.uint8), torch.ones(4), 32
    )
    assert callable(layout) and layout((None, weight)) is FP4_WORDS[32]
