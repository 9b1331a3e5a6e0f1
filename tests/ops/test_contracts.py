"""Every op keeps its contract: its reference is right, and its cases, meta function and cost can be relied on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx

from skyline import ops
from skyline.ops import OPS, Case, Op
from skyline.ops.attention import make_batch, make_cache

from . import (
    oracles_fp4,  # noqa: F401  (registers its oracles)
    oracles_fused,  # noqa: F401  (registers its oracles)
    oracles_hybrid,  # noqa: F401  (registers its oracles)
)
from .oracles import ORACLES, as_list, tokens_of

DTYPES = [torch.float32, torch.bfloat16]
_every_op = pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def cases(op: Op, dtype: torch.dtype) -> Iterator[Case]:
    yield from op.cases(dtype, torch.Generator().manual_seed(0))


def output_count(op: Op, case: Case) -> int:
    return op.num_outputs(*case.args) if callable(op.num_outputs) else op.num_outputs


def test_every_op_has_an_oracle_and_a_public_name() -> None:
    assert ORACLES.keys() == OPS.keys()
    assert all(getattr(ops, name) is op and op.__doc__ for name, op in OPS.items())


@_every_op
@_every_dtype
def test_reference_equals_oracle(op: Op, dtype: torch.dtype) -> None:
    rtol, atol = op.tolerance[dtype]
    for case in cases(op, dtype):
        expected = ORACLES[op.name](*case.args)
        outputs = as_list(op(*case.args))
        assert len(outputs) == output_count(op, case)
        for got, want in zip([*outputs, *case.mutated], expected, strict=True):
            torch.testing.assert_close(
                got.to(want.dtype), want, rtol=rtol, atol=atol, msg=lambda text, case=case: f"{case.label}: {text}"
            )


@_every_op
@_every_dtype
def test_cases_are_labelled_repeatable_and_of_the_dtype(op: Op, dtype: torch.dtype) -> None:
    first, second = list(cases(op, dtype)), list(cases(op, dtype))
    assert len({case.label for case in first}) == len(first) > 0
    for case, again in zip(first, second, strict=True):
        assert any(isinstance(arg, Tensor) and arg.dtype == dtype for arg in case.args)
        for arg, same in zip(case.args, again.args, strict=True):
            assert not isinstance(arg, Tensor) or torch.equal(arg, same)


@_every_op
def test_only_declared_tensors_are_written(op: Op) -> None:
    for case in cases(op, torch.float32):
        held = [*(arg for arg in case.args if isinstance(arg, Tensor))]
        held += [t for arg in case.args if isinstance(arg, ops.LayerCache) for t in arg.tensors]
        before = [tensor.clone() for tensor in held]
        op(*case.args)
        changed = [id(now) for now, then in zip(held, before, strict=True) if not torch.equal(now, then)]
        assert changed == [id(tensor) for tensor in case.mutated], case.label


@_every_op
@_every_dtype
def test_meta_gives_shapes_and_dtypes(op: Op, dtype: torch.dtype) -> None:
    for case in cases(op, dtype):
        real = as_list(op(*case.args))
        args = [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in case.args]
        shadow = as_list((op.meta or op.reference)(*args))
        assert [(t.shape, t.dtype) for t in shadow] == [(t.shape, t.dtype) for t in real], case.label
        assert all(tensor.is_meta for tensor in shadow)


@pytest.mark.parametrize("name", ["rope", "kv_write", "head_rms_norm", "paged_attention"])
def test_columns_of_a_wider_tensor_are_as_good(name: str) -> None:
    """Queries, keys and values come as views of the merged projection, and no model may copy them first."""
    op = OPS[name]
    dense = {"rope": 2, "kv_write": 2, "head_rms_norm": 1, "paged_attention": 1}[name]  # leading activations
    for case in cases(op, torch.float32):
        wide = [torch.cat((arg + 1, arg, arg - 1), dim=1) for arg in case.args[:dense]]
        views = [w[:, w.shape[1] // 3 : 2 * w.shape[1] // 3] for w in wide]
        assert all(torch.equal(view, arg) for view, arg in zip(views, case.args[:dense], strict=True))
        expected = [tensor.clone() for tensor in (*as_list(op(*case.args)), *case.mutated)]
        got = [*as_list(op(*views, *case.args[dense:])), *case.mutated]
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, msg=lambda text, case=case: f"{case.label}: {text}")


@_every_op
def test_capture_records_one_leaf(op: Op) -> None:
    """Whatever an op does inside, the graph shows one node with every argument in the order of the signature."""
    case = next(cases(op, torch.float32))
    tracer = fx.Tracer()
    tracer.graph = fx.Graph()
    args = [
        arg if isinstance(arg, (int, float, bool, tuple)) else fx.Proxy(tracer.graph.placeholder(f"arg{i}"), tracer)
        for i, arg in enumerate(case.args)
    ]
    result = op(*args)
    (node,) = [node for node in tracer.graph.nodes if node.target is op]
    assert len(node.args) == len(op.signature.parameters) and not node.kwargs
    assert isinstance(result, tuple) == (output_count(op, case) > 1)


# Costs


@_every_op
def test_cost_is_sane(op: Op) -> None:
    for dtype in DTYPES:
        for case in cases(op, dtype):
            cost = op.cost(*case.args)
            outputs = as_list(op(*case.args))
            assert type(cost.bytes) is int and type(cost.flops) is int, case.label
            assert cost.flops >= 0
            if op.name == "split":  # views
                assert cost.bytes == cost.flops == 0
            else:
                written = sum(t.numel() * t.element_size() for t in (outputs or case.args[:2]))
                assert cost.bytes >= written, case.label


def test_cost_halves_with_the_dtype() -> None:
    for name in ("linear", "rms_norm", "silu_mul", "add", "paged_attention"):
        for wide, narrow in zip(cases(OPS[name], torch.float32), cases(OPS[name], torch.bfloat16), strict=True):
            full, half = OPS[name].cost(*wide.args), OPS[name].cost(*narrow.args)
            assert full.bytes == 2 * half.bytes and full.flops == half.flops, (name, wide.label)


def test_cost_of_linear_by_hand() -> None:
    cost = OPS["linear"].cost(torch.empty(3, 24), torch.empty(40, 24), torch.empty(40))
    assert cost.bytes == 4 * (3 * 24 + 40 * 24 + 40 + 3 * 40)
    assert cost.flops == 2 * 3 * 24 * 40


@pytest.mark.parametrize("window", [None, 1, 4])
def test_cost_of_attention_counts_what_is_seen(window: int | None) -> None:
    """A key is read once a request however many queries see it; each (query, key) pair costs two products."""
    generator = torch.Generator().manual_seed(0)
    batch, cache = make_batch([9, 0, 2], [1, 5, 3]), make_cache(torch.float32, generator)
    q = torch.empty(9, 48)
    seen: set[tuple[int, int]] = set()
    pairs = 0
    for _, request, position in tokens_of(batch):
        visible = range(0 if window is None else max(0, position - window + 1), position + 1)
        pairs += len(visible)
        seen.update((request, key) for key in visible)
    cost = OPS["paged_attention"].cost(q, cache, batch, 1.0, window)
    assert cost.flops == pairs * 48 * 4
    assert cost.bytes == len(seen) * cache.bytes_per_token() + 2 * q.numel() * 4


# What the batch says about itself


def test_batch_agrees_with_itself() -> None:
    batch = make_batch([9, 0, 2], [1, 5, 3])
    assert batch.host_context_lens == batch.context_lens.tolist() == [10, 5, 5]
    assert batch.host_query_lens == batch.query_starts.diff().tolist() == [1, 5, 3]
    slots = [int(batch.tables[0].block_tables[r, p // 4]) * 4 + p % 4 for _, r, p in tokens_of(batch)]
    assert batch.tables[0].slot_mapping.tolist() == slots
    assert len(set(slots)) == len(slots)


def test_empty_batch() -> None:
    batch = ops.AttentionBatch.build([], [], [], 4, torch.device("cpu"))
    assert batch.tables[0].slot_mapping.shape == (0,) and batch.query_starts.tolist() == [0]


def test_unallocated_cache_says_so() -> None:
    with pytest.raises(AssertionError, match="before it was allocated"):
        _ = ops.KVCache(1, 8, torch.float32).tensors
