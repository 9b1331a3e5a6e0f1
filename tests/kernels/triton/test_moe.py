"""Mixture of experts in Triton at shapes that the ops' cases lack: many tiles, ragged ends, every way to find rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skyline import ops
from skyline.kernels.triton import moe, moe_bytes, moe_tiles, router
from skyline.kernels.triton.knobs import Knobs, using
from skyline.ops.fp4 import MXFP4_GROUP, NVFP4_GROUP, Fp4Weight, fp4_case_weight
from skyline.ops.fp8 import Fp8Weight, fp8_case_weight
from skyline.ops.quantized_moe import stacked
from skyline.ops.router import Scoring
from skyline.quantization import quantize_int4, quantize_int8
from tests.kernels.triton.test_ops import DEVICE, moved

Choose = Callable[[int, int, int, torch.Generator], Tensor]


def _spread(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> Tensor:
    return torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])


def _crowd(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> Tensor:
    """The last experts have all tokens."""
    return torch.arange(experts - 1, experts - 1 - top_k, -1).expand(tokens, top_k).contiguous()


def _weights(experts: int, h: int, i: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn((experts, 2 * i, h), generator=generator) / h**0.5
    down = torch.randn((experts, h, i), generator=generator) / i**0.5
    return gate_up.to(dtype), down.to(dtype)


def _close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (1.6e-2, 1e-2)
    assert actual.dtype == dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual.float().cpu(), expected.float(), rtol=rtol, atol=atol)


def _on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


# How, dtype, and (tokens, top_k, experts, h, i): several bands and steps, whole and ragged.
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [
    # streamed
    (_spread, BF16, (1, 5, 7, 72, 24)),
    (_spread, FP32, (1, 3, 5, 520, 12)),
    (_spread, FP16, (1, 1, 2, 24, 520)),
    # grouped by ids
    (_crowd, BF16, (16, 3, 5, 72, 40)),
    (_spread, BF16, (6, 4, 7, 128, 64)),
    (_spread, FP32, (40, 1, 3, 100, 72)),
    # sorted
    (_crowd, BF16, (20, 8, 11, 72, 40)),
    (_crowd, FP16, (150, 1, 5, 200, 72)),
    (_spread, FP32, (20, 8, 11, 100, 40)),
]


@pytest.mark.parametrize("choose,dtype,shape", SHAPES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_experts_at_larger_shapes(choose: Choose, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tokens, top_k, experts, h, i = shape
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((tokens, h), generator=generator).to(dtype)
    gate_up, down = _weights(experts, h, i, dtype, generator)
    ids, weights = choose(tokens, top_k, experts, generator), torch.rand((tokens, top_k), generator=generator)
    expected = ops.moe_experts(x.float(), gate_up.float(), down.float(), weights, ids)
    arguments = _on_device(x, gate_up, down, weights, ids)
    _close(moe.moe_experts(*arguments), expected, dtype)
    stream = torch.randn((tokens, h + 8), generator=generator).to(dtype)
    rows = stream.to(DEVICE)[:, 8:]
    _close(moe.fused_experts(*arguments, rows), expected + stream[:, 8:].float(), dtype)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("choose,shape", [(how, shape) for how, dtype, shape in SHAPES if dtype == BF16])
def test_experts_in_fp8_at_larger_shapes(choose: Choose, shape: tuple[int, ...], blocks: bool) -> None:
    tokens, top_k, experts, h, i = shape
    h, i = 4 * h, (128 if tokens == 1 else 3 * i)  # several blocks, streamed ones whole
    generator = torch.Generator().manual_seed(5)
    x, residual = (torch.randn((tokens, h), generator=generator).to(BF16) for _ in range(2))
    gate_up, down = (
        fp8_case_weight(experts * n, k, blocks and n % 128 == 0, generator) for n, k in ((2 * i, h), (h, i))
    )
    gate_up, down = (
        Fp8Weight(
            each.values.view(torch.uint8).view(experts, n, -1).view(each.values.dtype),
            each.scales.view(experts, -1, each.scales.shape[1]) if each.blocks else each.scales.view(experts, n),
        )
        for each, n in ((gate_up, 2 * i), (down, h))
    )
    ids, weights = choose(tokens, top_k, experts, generator), torch.rand((tokens, top_k), generator=generator)
    expected = ops.moe_experts(x.float(), gate_up.dequantize(), down.dequantize(), weights, ids) + residual.float()
    got = moe_bytes.moe_experts_fp8(*(moved(each) for each in (x, gate_up, down, weights, ids, residual)))
    error = (got.float().cpu() - expected).norm() / expected.norm()
    assert error < (1e-2 if tokens == 1 else 8e-2)  # one token is not quantized


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("choose,shape", [(how, shape) for how, dtype, shape in SHAPES if dtype == BF16])
def test_experts_in_int4_at_larger_shapes(choose: Choose, shape: tuple[int, ...], zeros: bool) -> None:
    tokens, top_k, experts, h, i = shape
    h, i = 2 * h, 3 * i
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((tokens, h), generator=generator).to(BF16)
    gate_up, down = (
        stacked([quantize_int4(matrix, 32, not zeros) for matrix in weight])
        for weight in _weights(experts, h, i, BF16, generator)
    )
    ids, weights = choose(tokens, top_k, experts, generator), torch.rand((tokens, top_k), generator=generator)
    expected = ops.moe_experts_int4_weight_only(x.float(), gate_up, down, weights, ids)
    got = moe.moe_experts_int4_weight_only(*(moved(each) for each in (x, gate_up, down, weights, ids)))
    assert (got.float().cpu() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("choose,shape", [(how, shape) for how, dtype, shape in SHAPES if dtype == BF16])
def test_experts_in_int8_at_larger_shapes(choose: Choose, shape: tuple[int, ...]) -> None:
    tokens, top_k, experts, h, i = shape
    h, i = 2 * h, 2 * i
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((tokens, h), generator=generator).to(BF16)
    gate_up, down = (quantize_int8(weight) for weight in _weights(experts, h, i, BF16, generator))
    ids, weights = choose(tokens, top_k, experts, generator), torch.rand((tokens, top_k), generator=generator)
    expected = ops.moe_experts_int8(x.float(), gate_up, down, weights, ids)
    got = moe_bytes.moe_experts_int8(*(moved(each) for each in (x, gate_up, down, weights, ids)))
    # Activated products that are rounded to bfloat16 may become other integers.
    assert (got.float().cpu() - expected).norm() / expected.norm() < 1e-2
    expected = ops.moe_experts_int8_weight_only(x.float(), gate_up, down, weights, ids)
    got = moe_bytes.moe_experts_int8_weight_only(*(moved(each) for each in (x, gate_up, down, weights, ids)))
    assert (got.float().cpu() - expected).norm() / expected.norm() < 1e-2


def _fp4(experts: int, n: int, k: int, group: int, generator: torch.Generator) -> Fp4Weight:
    matrix = fp4_case_weight(experts * n, k, group, generator)
    scales = matrix.scales.view(torch.uint8).view(experts, n, -1).view(matrix.scales.dtype)
    return Fp4Weight(matrix.values.view(experts, n, -1), scales, matrix.row_scales.view(experts, n), group)


@pytest.mark.parametrize("group", [MXFP4_GROUP, NVFP4_GROUP])
@pytest.mark.parametrize("choose,dtype,shape", SHAPES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_experts_in_fp4_at_larger_shapes(
    choose: Choose, dtype: torch.dtype, shape: tuple[int, ...], group: int
) -> None:
    tokens, top_k, experts, h, i = shape
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((tokens, h), generator=generator).to(dtype)
    gate_up, down = _fp4(experts, 2 * i, h, group, generator), _fp4(experts, h, i, group, generator)
    biases = [torch.randn((experts, n), generator=generator).to(dtype) / 2 for n in (2 * i, h)]
    ids, weights = choose(tokens, top_k, experts, generator), torch.rand((tokens, top_k), generator=generator)
    wide = [each.dequantize() for each in (gate_up, down)]
    most = 1e-5 if dtype == FP32 else 1e-2  # hidden values are rounded
    expected = ops.moe_experts(x.float(), *wide, weights, ids)
    got = moe.moe_experts_fp4(*(moved(each) for each in (x, gate_up, down, weights, ids)))
    assert got.dtype == dtype and (got.float().cpu() - expected).norm() / expected.norm() < most
    clamped = ops.moe_experts_clamped(
        x.float(), wide[0], biases[0].float(), wide[1], biases[1].float(), weights, ids, 1.702, 0.5
    )
    arguments = (moved(each) for each in (x, gate_up, biases[0], down, biases[1], weights, ids))
    got = moe.moe_experts_clamped_fp4(*arguments, 1.702, 0.5)
    assert got.dtype == dtype and (got.float().cpu() - clamped).norm() / clamped.norm() < most


@pytest.mark.parametrize("tokens,top_k", [(1, 3), (6, 3), (50, 3)])
def test_clamped_experts_on_rows_of_a_wider_tensor(tokens: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn((tokens, 200), generator=generator)[:, :144]
    gate_up, down = _weights(5, 144, 80, torch.float32, generator)
    biases = [torch.randn((5, 160), generator=generator), torch.randn((5, 144), generator=generator)]
    ids, weights = _spread(tokens, top_k, 5, generator), torch.rand((tokens, top_k), generator=generator)
    expected = ops.moe_experts_clamped(x, gate_up, biases[0], down, biases[1], weights, ids, 1.702, 0.5)
    wide = torch.empty((tokens, 200), device=DEVICE)[:, :144].copy_(x)
    others = _on_device(gate_up, biases[0], down, biases[1], weights, ids)
    _close(moe.moe_experts_clamped(wide, *others, 1.702, 0.5), expected, torch.float32)


def test_every_tile_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn((150, 128), generator=generator).bfloat16()
    gate_up, down = _weights(2, 128, 144, torch.bfloat16, generator)
    ids, weights = _crowd(150, 1, 2, generator), torch.rand((150, 1), generator=generator)
    expected = ops.moe_experts(x.float(), gate_up.float(), down.float(), weights, ids)
    for _, tile in moe_tiles._TILES:
        monkeypatch.setattr(moe, "tile_for", lambda *_, tile=tile: tile)
        _close(moe.moe_experts(*_on_device(x, gate_up, down, weights, ids)), expected, torch.bfloat16)


def test_every_tile_of_fp4_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn((150, 128), generator=generator).bfloat16()
    gate_up, down = _fp4(2, 288, 128, MXFP4_GROUP, generator), _fp4(2, 128, 144, MXFP4_GROUP, generator)
    ids, weights = _crowd(150, 1, 2, generator), torch.rand((150, 1), generator=generator)
    expected = ops.moe_experts(x.float(), gate_up.dequantize(), down.dequantize(), weights, ids)
    for _, tile in moe_tiles._WORD_TILES:
        monkeypatch.setattr(moe, "tile_for", lambda *_, tile=tile: tile)
        _close(moe.moe_experts_fp4(*map(moved, (x, gate_up, down, weights, ids))), expected, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group,zeros", [(32, True), (128, False)])
def test_every_tile_of_int4_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, group: int, zeros: bool, dtype: torch.dtype
) -> None:
    """Also where a group is wider than the tile is."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn((150, 128), generator=generator).to(dtype)
    gate_up, down = (
        stacked([quantize_int4(matrix, group, not zeros) for matrix in weight])
        for weight in _weights(2, 128, 144, torch.float32, generator)
    )
    ids, weights = _crowd(150, 1, 2, generator), torch.rand((150, 1), generator=generator)
    expected = ops.moe_experts(x.float(), gate_up.dequantize(), down.dequantize(), weights, ids)
    for _, tile in moe_tiles._WORD_TILES:
        monkeypatch.setattr(moe, "tile_for", lambda *_, tile=tile: tile)
        got = moe.moe_experts_int4_weight_only(*map(moved, (x, gate_up, down, weights, ids)))
        assert got.dtype == dtype and (got.float().cpu() - expected).norm() / expected.norm() < 1e-2


def test_a_token_may_choose_an_expert_twice() -> None:
    generator = torch.Generator().manual_seed(8)
    gate_up, down = _weights(3, 32, 16, torch.float32, generator)
    for tokens in (1, 30, 60):
        x, weights = torch.randn((tokens, 32), generator=generator), torch.rand((tokens, 4), generator=generator)
        ids = torch.randint(0, 3, (tokens, 4), generator=generator)
        expected = ops.moe_experts(x, gate_up, down, weights, ids)
        _close(moe.moe_experts(*_on_device(x, gate_up, down, weights, ids)), expected, torch.float32)


@pytest.mark.parametrize("capacity,counts", [(40, [0, 33, 40, 16]), (17, [17, 0, 1, 16]), (16, [0, 0, 0, 16])])
def test_padded_experts_of_several_tiles(capacity: int, counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(9)
    rows = torch.randn((4, capacity, 72), generator=generator)
    for expert, count in enumerate(counts):
        rows[expert, count:] = float("nan")
    gate_up, down = _weights(4, 72, 200, torch.float32, generator)
    held = torch.tensor(counts, dtype=torch.int32)
    expected = ops.moe_experts_padded(rows, held, gate_up, down)
    _close(moe.moe_experts_padded(*_on_device(rows, held, gate_up, down)), expected, torch.float32)


@pytest.mark.parametrize("choose", [_spread, _crowd])
def test_sorting_in_several_blocks(choose: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "_SORT_BLOCK", 128)
    generator = torch.Generator().manual_seed(10)
    x, ids = torch.randn((70, 1100), generator=generator), choose(70, 5, 7, generator)
    for actual, expected in zip(moe.moe_sort(*_on_device(x, ids), 7), ops.moe_sort(x, ids, 7), strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual.cpu(), expected)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 5), st.booleans(), st.integers(0, 1000))
def test_no_token_is_lost_between_the_layouts(experts: int, tokens: int, top_k: int, crowded: bool, seed: int) -> None:
    top_k = min(top_k, experts)
    generator = torch.Generator().manual_seed(seed)
    choose = _crowd if crowded else _spread
    x, ids = torch.randn((tokens, 16), generator=generator), choose(tokens, top_k, experts, generator)
    gate_up, down = _weights(experts, 16, 16, torch.float32, generator)
    weights = torch.rand((tokens, top_k), generator=generator)
    expected = ops.moe_experts(x, gate_up, down, weights, ids)
    x, ids, weights, gate_up, down = _on_device(x, ids, weights, gate_up, down)
    rows, offsets, places = moe.moe_sort(x, ids, experts)
    assert sorted(places.flatten().tolist()) == list(range(ids.numel()))
    ragged = moe.moe_experts_ragged(rows, offsets, gate_up, down)
    _close(moe.moe_combine(ragged, places, weights), expected, torch.float32)
    _close(moe.moe_experts(x, gate_up, down, weights, ids), expected, torch.float32)


def test_no_tokens() -> None:
    x, ids = torch.empty((0, 32), device=DEVICE), torch.empty((0, 2), dtype=torch.int64, device=DEVICE)
    gate_up, down = _on_device(*_weights(3, 32, 16, torch.float32, torch.Generator()))
    weights = torch.empty((0, 2), device=DEVICE)
    assert moe.moe_experts(x, gate_up, down, weights, ids).shape == (0, 32)
    rows, offsets, places = moe.moe_sort(x, ids, 3)
    assert rows.shape == (0, 32) and offsets.tolist() == [0] * 4 and places.shape == (0, 2)
    assert moe.moe_experts_ragged(rows, offsets, gate_up, down).shape == (0, 32)
    assert moe.moe_combine(rows, places, weights).shape == (0, 32)
    assert moe.moe_experts_padded(x.view(3, 0, 32), offsets[1:], gate_up, down).shape == (3, 0, 32)
    weights, ids = router.router(x, torch.empty((3, 32), device=DEVICE), None, None, 2, "softmax", True)
    assert weights.shape == ids.shape == (0, 2) and ids.dtype == torch.int64
    norm, gate = torch.empty(32, device=DEVICE), torch.empty((3, 32), device=DEVICE)
    normed, weights, ids = router.norm_router(x, norm, 0.1, gate, None, None, 2, "softmax", True)
    assert normed.shape == (0, 32) and weights.shape == ids.shape == (0, 2)


RouterCase = tuple[int, int, int, Scoring, int, int, bool]
ROUTERS: list[RouterCase] = [  # rows, experts, top_k, scoring, groups, top_groups, whether with correction
    (1, 128, 8, "softmax", 1, 1, False),
    (40, 60, 4, "softmax", 1, 1, False),
    (17, 256, 8, "sigmoid", 8, 4, True),
    (5, 48, 6, "sigmoid", 3, 2, True),
    (3, 6, 2, "sigmoid", 6, 3, False),
    (130, 32, 4, "softmax of the chosen", 1, 1, False),
    (2, 512, 16, "softmax", 1, 1, False),
]


@pytest.mark.parametrize("case", ROUTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_router_at_real_numbers_of_experts(case: RouterCase, dtype: torch.dtype) -> None:
    rows, experts, top_k, scoring, groups, top_groups, correct = case
    generator = torch.Generator().manual_seed(11)
    # Whole numbers below 256: products and sums are exact, so that both choose alike whatever the order of the sum.
    x = torch.randint(-2, 3, (rows, 200), generator=generator).to(dtype)
    weight = torch.randint(-2, 3, (experts, 200), generator=generator).to(dtype) / 16
    bias = torch.randint(-9, 9, (experts,), generator=generator).to(dtype) / 8
    correction = torch.randn(experts, generator=generator) / 4 if correct else None
    options = (top_k, scoring, True, 2.5, groups, top_groups)
    want_weights, want_ids = ops.router(x, weight, bias, correction, *options)
    moved = None if correction is None else correction.to(DEVICE)
    weights, ids = router.router(*_on_device(x, weight, bias), moved, *options)
    torch.testing.assert_close(weights.cpu(), want_weights, rtol=1e-5, atol=1e-6)
    assert torch.equal(ids.cpu(), want_ids)


# The interpreter takes ten seconds for many rows.
_NORMED = [(case, dtype) for case in ROUTERS for dtype in (BF16, FP32, FP16) if case[0] < 100 or dtype == BF16]


@pytest.mark.parametrize("case,dtype", _NORMED, ids=str)
def test_norm_and_router(case: RouterCase, dtype: torch.dtype) -> None:
    """In float16, of rows whose products with the norm's weight alone do not fit into it."""
    rows, experts, top_k, scoring, groups, top_groups, correct = case
    generator = torch.Generator().manual_seed(13)
    x = torch.where(torch.rand((rows, 1300), generator=generator) < 0.5, 1.0, -1.0).to(dtype)
    x[:, ::3] *= 2
    x *= 20000 if dtype == torch.float16 else 1
    norm = torch.full((1300,), 4.0)
    norm[::2] = 2
    weight = torch.randint(-2, 3, (experts, 1300), generator=generator).to(dtype) / 64
    bias = torch.randn(experts, generator=generator)  # products of whole numbers are often equal
    correction = torch.randn(experts, generator=generator) / 4 if correct else None
    wide = (x.float(), norm, 0.01, weight.float(), bias, correction)
    options = (top_k, scoring, True, 2.5, groups, top_groups)
    want_normed, want_weights, want_ids = ops.norm_router(*wide, *options)
    moved = None if correction is None else correction.to(DEVICE)
    held = torch.empty((rows, 1304), dtype=dtype, device=DEVICE)[:, 4:].copy_(x)
    others = (norm.to(DEVICE, dtype), 0.01, *_on_device(weight, bias), moved)
    normed, weights, ids = router.norm_router(held, *others, *options)
    _close(normed, want_normed, dtype)
    torch.testing.assert_close(weights.cpu(), want_weights, rtol=1e-3, atol=1e-4)
    assert torch.equal(ids.cpu(), want_ids)


def test_router_of_two_dtypes() -> None:
    generator = torch.Generator().manual_seed(12)
    x, weight = torch.randn((3, 300), generator=generator).bfloat16(), torch.randn((20, 300), generator=generator)
    weights, ids = router.router(*_on_device(x, weight), None, None, 5, "softmax of the chosen", False)
    want_weights, want_ids = ops.router(x, weight, None, None, 5, "softmax of the chosen", False)
    torch.testing.assert_close(weights.cpu(), want_weights, rtol=1e-4, atol=1e-5)
    assert torch.equal(ids.cpu(), want_ids)


@pytest.mark.parametrize("groups", [1, 3])
def test_equal_scores_go_to_the_lower_expert(groups: int) -> None:
    x, weight = _on_device(torch.zeros(2, 4), torch.zeros(6, 4))
    _, ids = router.router(x, weight, None, None, 3, "sigmoid", True, 1.0, groups, min(2, groups))
    assert ids.tolist() == [[0, 1, 2]] * 2
    _, ids = router.topk_router(torch.zeros((2, 6), device=DEVICE), 3, True)
    assert ids.tolist() == [[0, 1, 2]] * 2


def test_ids_of_rows_without_numbers_are_experts() -> None:
    x = torch.full((2, 16), float("nan"), device=DEVICE)
    weight = torch.ones((12, 16), device=DEVICE)
    for scoring in ("softmax", "sigmoid", "softmax of the chosen"):
        _, ids = router.router(x, weight, None, None, 4, scoring, True, 1.0, 3, 2)
        assert all(len(set(row)) == 4 and set(row) <= set(range(12)) for row in ids.tolist())


@pytest.mark.parametrize(
    "knobs",
    [Knobs(experts_rows=64, experts_band=32), Knobs(experts_band=256, experts_warps=8, experts_stages=6)],
    ids=["high", "wide"],
)
def test_other_tiles_give_the_same(knobs: Knobs) -> None:
    """As `skyline tune` tries them: of a few tokens, and of so many that they are sorted."""
    generator = torch.Generator().manual_seed(2)
    gate_up, down = _weights(5, 72, 40, BF16, generator)
    for tokens in (6, 50):
        x, ids = torch.randn((tokens, 72), generator=generator).to(BF16), _spread(tokens, 3, 5, generator)
        weights = torch.rand((tokens, 3), generator=generator)
        with using(knobs):
            got = moe.moe_experts(*_on_device(x, gate_up, down, weights, ids))
        wide = [part.float() for part in (x, gate_up, down, weights)]
        _close(got, ops.moe_experts.reference(*wide, ids), BF16)


@pytest.mark.parametrize("stream", [(8, 4, 3), (4, 8, 6)])
@pytest.mark.parametrize("fp8", [False, True])
def test_other_ways_to_stream_give_the_same(fp8: bool, stream: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    x, ids = torch.randn((1, 128), generator=generator).to(BF16), _spread(1, 3, 5, generator)
    weights = torch.rand((1, 3), generator=generator)
    if fp8:
        each = [[fp8_case_weight(n, k, True, generator) for _ in range(5)] for n, k in ((256, 128), (128, 128))]
        gate_up, down = (
            Fp8Weight(torch.stack([w.values.view(torch.uint8) for w in part]).view(part[0].values.dtype),
                      torch.stack([w.scales for w in part]))
            for part in each
        )  # fmt: skip
        with using(Knobs(experts_fp8=(*stream[:2], 512, 4))):
            got = moe_bytes.moe_experts_fp8(*(moved(part) for part in (x, gate_up, down, weights, ids)))
        _close(got, ops.moe_experts_fp8.reference(x.float(), gate_up, down, weights, ids), BF16)
    else:
        plain = _weights(5, 128, 64, BF16, generator)
        with using(Knobs(experts_stream=stream)):
            got = moe.moe_experts(*_on_device(x, *plain, weights, ids))
        wide = [part.float() for part in (x, *plain, weights)]
        _close(got, ops.moe_experts.reference(*wide, ids), BF16)
