"""bfloat16 weights in 12 bits: every bit comes back, and products are those of the plain weight."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skyline.kernels import Request, choose, finish_weight
from skyline.kernels.cpu import native
from skyline.kernels.cpu.packed import Format, PackedWeight, pack, packed_layout
from skyline.ops import OPS
from tests.kernels.test_tuning import kernel_of

pytestmark = pytest.mark.skipif(native.available() not in ("avx512", "amx"), reason="compressed weights take AVX-512")

COMPRESSED, PLAIN = packed_layout(Format.COMPRESSED), packed_layout(Format.BFLOAT16)


def bits(weight: Tensor) -> Tensor:
    return weight.view(torch.int16)


def exceptions(weight: PackedWeight) -> int:
    return int(weight.data.view(torch.int32)[:, 9].sum())


def normal(n: int, k: int, seed: int = 0) -> Tensor:
    return (torch.randn((n, k), generator=torch.Generator().manual_seed(seed)) / 32).bfloat16()


def tiny_numbers_in_most_blocks(n: int, k: int) -> Tensor:
    """One, or three beside each other, at the first, the last or some other place of a block of 32 k."""
    weight = normal(n, k)
    weight[0::64, 0::32] = 1e-20
    weight[53::64, 31::96] = -3e-38
    weight[32:35, 13::256] = 2.0**-133  # not a normal number
    return weight


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: normal(72, 1100),
    "uniform": lambda: torch.rand(64, 1024).bfloat16(),
    "zeros": lambda: torch.zeros(64, 96).bfloat16(),
    "rows of other sizes": lambda: (normal(40, 320).float() * torch.logspace(-30, 30, 40)[:, None]).bfloat16(),
    "outliers": lambda: normal(64, 512).index_put_((torch.arange(8), torch.tensor(400)), torch.tensor(1e30).bfloat16()),
    "tiny numbers": lambda: tiny_numbers_in_most_blocks(64, 1056),
    "infinities": lambda: normal(64, 512).index_put_(
        (torch.arange(16), torch.tensor(7)), torch.tensor(-torch.inf).bfloat16()
    ),
    "NaN": lambda: normal(64, 512).index_put_(
        (torch.arange(3), torch.arange(3)), torch.tensor(float("nan")).bfloat16()
    ),
    "one number": lambda: torch.tensor([[-0.75]]).bfloat16(),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_bit_comes_back(name: str, gated: bool) -> None:
    weight = WEIGHTS[name]()
    if gated and len(weight) % 2:
        weight = weight.repeat(2, 1)
    packed = pack(weight, packed_layout(Format.COMPRESSED, gated))
    assert packed.layout.format is Format.COMPRESSED
    finite = ~weight.isnan()
    dense = packed.dense(torch.bfloat16)
    assert torch.equal(bits(dense)[finite], bits(weight)[finite])
    assert bool(dense[~finite].isnan().all())


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 100), st.data())
def test_any_numbers_come_back(n: int, k: int, data: st.DataObject) -> None:
    """Of whatever sizes, in rows that may differ: compressed or not."""
    size, spread = data.draw(st.integers(-60, 60)), data.draw(st.sampled_from([0.5, 3.0, 20.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    exponents = size + spread * torch.randn((n, k), generator=generator)
    weight = (torch.randn((n, k), generator=generator) * 2**exponents).bfloat16()
    weight[torch.rand((n, k), generator=generator) < data.draw(st.sampled_from([0.0, 0.001, 0.9]))] = 0
    packed = pack(weight, COMPRESSED)
    assert torch.equal(packed.dense(torch.bfloat16), weight)
    x = torch.randn((3, k), generator=generator).bfloat16()
    assert torch.equal(product(packed, x), product(pack(weight, PLAIN), x))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["normal", "tiny numbers", "rows of other sizes"])
def test_products_have_the_bits_of_the_plain_weight(name: str, gated: bool) -> None:
    weight = WEIGHTS[name]()
    packed = pack(weight, packed_layout(Format.COMPRESSED, gated))
    assert packed.layout.format is Format.COMPRESSED and (exceptions(packed) > 0 or name == "rows of other sizes")
    plain = pack(weight, packed_layout(Format.BFLOAT16, gated))
    x = (torch.randn((600, weight.shape[1]), generator=torch.Generator().manual_seed(1)) / 8).bfloat16()
    for rows in (1, 2, 5, 8, 9, 12, 13, 24, 25, 36, 48, 49, 70, 150, 600):  # through each way that rows are multiplied
        got, expected = product(packed, x[:rows], gated), product(plain, x[:rows], gated)
        assert torch.equal(bits(got), bits(expected)), rows


def product(weight: PackedWeight, x: Tensor, gated: bool = False) -> Tensor:
    n = weight.shape[0]
    out = torch.empty(len(x), n // 2 if gated else n).bfloat16()
    kernel_of("linear", Format.BFLOAT16, 0).into(out, x, weight, None, gated)
    return out


def test_it_is_three_quarters_of_the_size() -> None:
    weight = normal(512, 2048)
    assert pack(weight, COMPRESSED).nbytes < 0.755 * pack(weight, PLAIN).nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_other_dtypes_are_rounded_first(dtype: torch.dtype) -> None:
    weight = normal(40, 200).to(dtype) * 1.001
    assert torch.equal(pack(weight, COMPRESSED).dense(torch.bfloat16), weight.bfloat16())


@pytest.mark.parametrize("experts", [None, 3])
def test_parts_may_come_in_any_order_and_from_any_thread(experts: int | None) -> None:
    weight = tiny_numbers_in_most_blocks(300, 200)
    shape = (300, 200) if experts is None else (experts, 100, 200)
    together, apart = COMPRESSED.allocate(shape, torch.bfloat16), COMPRESSED.allocate(shape, torch.bfloat16)
    COMPRESSED.write(together, 0, weight)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda first: COMPRESSED.write(apart, first, weight[first : first + 7]), range(294, -1, -7)))
    assert finish_weight(COMPRESSED, together) and finish_weight(COMPRESSED, apart)
    for part in ("data", "sums"):
        assert torch.equal(getattr(together, part), getattr(apart, part))
    for expert, expected in enumerate(weight.view(experts or 1, -1, 200)):
        assert torch.equal(apart.expert(expert).dense(torch.bfloat16), expected)


@pytest.mark.parametrize("shape", [(96, 128), (3, 32, 128)])
@pytest.mark.parametrize("gated", [False, True])
def test_what_is_too_irregular_stays_plain(shape: tuple[int, ...], gated: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = (
        torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-90, 90, shape, generator=generator)
    ).bfloat16()
    layout = packed_layout(Format.COMPRESSED, gated)
    target = layout.allocate(shape, torch.bfloat16)
    layout.write(target, 0, weight.flatten(0, -2))
    assert not finish_weight(layout, target)
    assert target.layout is packed_layout(Format.BFLOAT16, gated)
    expected = pack(weight, packed_layout(Format.BFLOAT16, gated))
    assert torch.equal(target.data, expected.data)


@pytest.mark.parametrize("experts", [None, 3])
@pytest.mark.parametrize("few", [2, 60])
def test_parts_that_do_not_fit_are_kept_aside(experts: int | None, few: int) -> None:
    """From some numbers on their exceptions are not even listed; the rest of the weight may be regular."""
    weight = normal(300, 640)
    weight[10:90] *= 2.0 ** torch.randint(-90, 90, (80, 640), generator=torch.Generator().manual_seed(4))
    weight[200:210, ::few] = 1e-30
    shape = (300, 640) if experts is None else (experts, 100, 640)
    target = COMPRESSED.allocate(shape, torch.bfloat16)
    parts = [(0, 17), (17, 60), (60, 130), (130, 199), (199, 205), (205, 300)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda part: COMPRESSED.write(target, part[0], weight[part[0] : part[1]]), reversed(parts)))
    assert sum(len(part) for part in target.found) < 300 * 640 // 64 + 6 * 64
    assert not finish_weight(COMPRESSED, target)
    assert target.layout is PLAIN
    for expert, expected in enumerate(weight.view(experts or 1, -1, 640)):
        assert torch.equal(target.expert(expert).dense(torch.bfloat16), expected)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("plain", [(), ("down",), ("gate_up",)])
def test_experts_have_the_bits_of_plain_ones(rows: int, plain: tuple[str, ...]) -> None:
    """Each expert with exceptions of its own; one of the two weights may have had to stay plain."""
    experts, hidden, inner = 4, 96, 64
    gate_up = tiny_numbers_in_most_blocks(experts * 2 * inner, hidden).view(experts, 2 * inner, hidden)
    down = tiny_numbers_in_most_blocks(experts * hidden, inner).view(experts, hidden, inner)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((rows, hidden), generator=generator).bfloat16()
    shares = torch.rand((rows, 2), generator=generator)
    ids = torch.rand((rows, experts), generator=generator).argsort(dim=-1)[:, :2].contiguous()
    ids[0] = torch.tensor([3, 2])
    kernel = choose(Request(OPS["moe_experts"], "cpu", torch.bfloat16, isa=native.available())).kernel
    results = []
    for every in (("gate_up", "down"), plain):
        formats = [Format.BFLOAT16 if name in every else Format.COMPRESSED for name in ("gate_up", "down")]
        packed = [pack(gate_up, packed_layout(formats[0], gated=True)), pack(down, packed_layout(formats[1]))]
        assert [weight.layout.format for weight in packed] == formats
        results.append(kernel.run(x, *packed, shares, ids))
    assert torch.equal(bits(results[0]), bits(results[1]))


def test_a_weight_that_was_not_finished_is_not_used() -> None:
    target = COMPRESSED.allocate((32, 64), torch.bfloat16)
    COMPRESSED.write(target, 0, normal(32, 64))
    with pytest.raises(RuntimeError, match="before it was finished"):
        product(target, torch.ones(1, 64).bfloat16())


@pytest.mark.parametrize("op", ["linear", "moe_experts", "moe_experts_clamped"])
def test_when_it_is_chosen(op: str) -> None:
    def layout(isa: str, dtype: torch.dtype = torch.bfloat16, weight: Tensor | None = None) -> object:
        weight = torch.empty(8, 64, dtype=dtype) if weight is None else weight
        kernel = choose(Request(OPS[op], "cpu", dtype, isa=isa)).kernel
        made: Any = kernel.layouts[1]
        assert kernel.provider == native.PROVIDER
        return made((None, weight))

    gated = op != "linear"
    assert layout("avx512") is packed_layout(Format.COMPRESSED, gated)
    assert layout("avx2") is layout("amx") is packed_layout(Format.BFLOAT16, gated)
    assert layout("avx512", torch.float32) is packed_layout(Format.FLOAT32, gated)
    longer = torch.empty((2, 2**19 + 1), dtype=torch.bfloat16, device="meta")
    assert layout("avx512", weight=longer) is packed_layout(Format.BFLOAT16, gated)


def test_avx2_has_no_such_weights() -> None:
    with native.using("avx2"), pytest.raises(ValueError, match="take AVX-512"):
        pack(normal(8, 64), COMPRESSED)
