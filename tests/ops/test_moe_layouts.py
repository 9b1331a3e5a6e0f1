"""The two layouts in which tokens travel to experts give what experts give on tokens in their own order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skyline import ops
from skyline.kernels import Request, choose
from skyline.kernels.cpu import native
from skyline.ops.router import Scoring


@st.composite
def routed(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """Tokens [T, 8], ids [T, k] and weights [T, k] for E experts, some of which may get nothing or everything."""
    experts = draw(st.integers(1, 7))
    tokens, top_k = draw(st.integers(1, 12)), draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    favourite = draw(st.booleans())
    some = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]
    ids = torch.stack([torch.arange(top_k)] * tokens if favourite else some)
    x = torch.randn((tokens, 8), generator=generator)
    return x, ids, torch.rand((tokens, top_k), generator=generator), experts


@settings(max_examples=150, deadline=None)
@given(routed())
def test_no_token_is_lost_or_doubled(case: tuple[Tensor, Tensor, Tensor, int]) -> None:
    x, ids, _, experts = case
    rows, offsets, places = ops.moe_sort(x, ids, experts)
    assert sorted(places.flatten().tolist()) == list(range(ids.numel()))
    assert offsets[0] == 0 and offsets[-1] == ids.numel() and (offsets.diff() >= 0).all()
    for token in range(ids.shape[0]):
        for choice in range(ids.shape[1]):
            place, expert = int(places[token, choice]), int(ids[token, choice])
            assert int(offsets[expert]) <= place < int(offsets[expert + 1])
            assert torch.equal(rows[place], x[token])


@settings(max_examples=100, deadline=None)
@given(routed(), st.integers(0, 3))
def test_both_layouts_equal_the_experts(case: tuple[Tensor, Tensor, Tensor, int], spare: int) -> None:
    x, ids, weights, experts = case
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn((experts, 12, 8), generator=generator) / 3
    down = torch.randn((experts, 8, 6), generator=generator) / 3
    expected = ops.moe_experts(x, gate_up, down, weights, ids)
    rows, offsets, places = ops.moe_sort(x, ids, experts)
    counts = offsets.diff()
    padded = torch.full((experts, int(counts.max()) + spare, 8), 1e30)
    for expert in range(experts):
        padded[expert, : counts[expert]] = rows[offsets[expert] : offsets[expert + 1]]
    for provider in {"torch", native.PROVIDER} if native.available() != "none" else {"torch"}:
        isa = native.available() if provider == native.PROVIDER else "none"
        ragged_run, padded_run = (
            choose(Request(op, "cpu", torch.float32, isa=isa)).kernel.run
            for op in (ops.moe_experts_ragged, ops.moe_experts_padded)
        )
        ragged = ragged_run(rows, offsets, gate_up, down)
        torch.testing.assert_close(ops.moe_combine(ragged, places, weights), expected, rtol=1e-4, atol=1e-5)
        result = padded_run(padded, counts.int(), gate_up, down)
        for expert in range(experts):
            torch.testing.assert_close(
                result[expert, : counts[expert]], ragged[offsets[expert] : offsets[expert + 1]], rtol=1e-4, atol=1e-5
            )
            assert not result[expert, counts[expert] :].any()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 9),
    st.sampled_from([(8, 1, 1), (8, 4, 2), (12, 3, 3), (6, 2, 1)]),
    st.sampled_from(["softmax", "sigmoid", "softmax of the chosen"]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_a_router_chooses_and_weighs_as_specified(
    tokens: int, shape: tuple[int, int, int], scoring: Scoring, correct: bool, seed: int
) -> None:
    experts, groups, top_groups = shape
    top_k = min(3, experts // groups * top_groups)
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn((tokens, 5), generator=generator), torch.randn((experts, 5), generator=generator)
    correction = torch.randn(experts, generator=generator) / 10 if correct else None
    weights, ids = ops.router(x, weight, None, correction, top_k, scoring, True, 2.5, groups, top_groups)
    torch.testing.assert_close(weights.sum(-1), torch.full((tokens,), 2.5))
    for row in range(tokens):
        chosen = ids[row].tolist()
        assert len(set(chosen)) == top_k and all(0 <= expert < experts for expert in chosen)
        assert len({expert // (experts // groups) for expert in chosen}) <= top_groups


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax of the chosen"])
def test_equal_scores_go_to_the_lower_expert(scoring: Scoring) -> None:
    _, ids = ops.router(torch.zeros(2, 4), torch.zeros(6, 4), None, None, 3, scoring, True)
    assert ids.tolist() == [[0, 1, 2]] * 2
