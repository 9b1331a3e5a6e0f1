"""The compiled kernels: each instruction set against the ops' references, and what they promise beyond the ops."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from skyline.kernels import Kernel, Request, candidates
from skyline.kernels.cpu import native
from skyline.ops import OPS, AttentionBatch, Case, KVCache, Op
from skyline.ops.contract import randn

pytestmark = pytest.mark.skipif(native.available() == "none", reason="no compiled kernels here")

KERNELS = {op: kernel for op in OPS for kernel in candidates(op) if kernel.provider == native.PROVIDER}
DTYPES = [torch.float32, torch.bfloat16]
_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def written(arguments: tuple[Any, ...]) -> list[Tensor]:
    """What an op may write besides its results: caches, with the scales of quantized ones."""
    caches = [value for value in arguments if isinstance(value, KVCache)]
    scales = [getattr(cache, part, None) for cache in caches for part in ("k_scale", "v_scale")]
    return [part for cache in caches for part in cache.tensors] + [part for part in scales if part is not None]


def results(run: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    result = run(*arguments)
    outputs = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    return [*outputs, *written(arguments)]


def widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    if isinstance(value, KVCache) and value.dtype.is_floating_point:
        k, v = value.tensors
        return dataclasses.replace(value, dtype=torch.float32, k=k.float(), v=v.float())
    return value


def kernel_of(op: str, instruction_set: str, dtype: torch.dtype) -> Kernel:
    request = Request(OPS[op], "cpu", dtype, isa=instruction_set)
    found = [kernel for kernel in candidates(op) if kernel.provider == native.PROVIDER]
    reasons = [kernel.supports(request) for kernel in found]
    if None not in reasons:
        pytest.skip("; ".join(str(reason) for reason in reasons))
    return found[reasons.index(None)]


def check(op: Op, case: Case, instruction_set: str, dtype: torch.dtype) -> None:
    kernel = kernel_of(op.name, instruction_set, dtype)
    expected = results(op.reference, tuple(widened(copy.deepcopy(value)) for value in case.args))
    actual = results(kernel.run, copy.deepcopy(case.args))
    rtol, atol = op.tolerance[dtype]
    for want, got in zip(expected, actual, strict=True):
        assert got.shape == want.shape, case.label
        if want.dtype == torch.int8:
            assert (got.int() - want.int()).abs().max() <= 1, case.label  # a value near the middle of two
        else:
            torch.testing.assert_close(
                got.float(), want.float(), rtol=rtol, atol=atol, msg=lambda text: f"{case.label}: {text}"
            )


@pytest.mark.parametrize("op", KERNELS)
@_every_dtype
def test_equals_the_reference(op: str, instruction_set: str, dtype: torch.dtype) -> None:
    for case in OPS[op].cases(dtype, torch.Generator().manual_seed(3)):
        check(OPS[op], case, instruction_set, dtype)


def angles(positions: int, rotary: int, generator: torch.Generator) -> Tensor:
    turns = torch.rand((positions, rotary // 2), generator=generator) * 6
    return torch.cat((turns.cos(), turns.sin()), dim=-1)


def attention_inputs(
    dtype: torch.dtype,
    tokens: int,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary: int,
    norm: bool,
    cached: Any,
    by_head: bool = True,
) -> tuple[Any, ...]:
    """Arguments of rope_kv_write for one request, its blocks in no order."""
    generator = torch.Generator().manual_seed(tokens)
    blocks = -(-tokens // 16) + 2
    cache = KVCache(kv_heads, head_dim, cached, by_head=by_head)
    cache.allocate(blocks, 16, torch.device("cpu"))
    for tensor in written((cache,)):
        tensor.zero_()
    order: list[int] = torch.randperm(blocks, generator=generator).tolist()
    batch = AttentionBatch.build([order], [3], [tokens], 16, torch.device("cpu"))
    qkv = randn((tokens, (heads + 2 * kv_heads) * head_dim), dtype, generator, 3.0)
    weights = [randn((head_dim,), dtype, generator) if norm else None for _ in range(2)]
    table = angles(tokens + 3, rotary, generator)
    return qkv, *weights, 1e-6, torch.arange(3, tokens + 3), table, cache, batch


def large(op: str, dtype: torch.dtype) -> Iterator[Case]:
    """Shapes of real models, and such as fill no vector."""
    g = torch.Generator().manual_seed(5)
    if op in ("rms_norm", "add", "add_rms_norm", "silu_mul", "select_rows"):
        for rows, columns in ((1, 1), (2, 15), (1, 1024), (7, 1026), (300, 200), (70, 4096), (0, 64)):
            x, y = (randn((rows, columns), dtype, g, 3.0) for _ in range(2))
            weight, label = randn((columns,), dtype, g), f"{rows}x{columns}"
            wide = randn((rows, columns + 9), dtype, g)
            if op == "rms_norm":
                yield Case(label, (x, weight, 1e-6))
                yield Case(f"{label} strided", (wide[:, 5 : columns + 5], weight, 1e-6))
            elif op == "add":
                yield Case(label, (x, y))
                yield Case(f"{label} strided", (x, wide[:, 5 : columns + 5]))
            elif op == "add_rms_norm":
                yield Case(label, (x, y, weight, 1e-6))
                yield Case(f"{label} strided", (wide[:, 5 : columns + 5], y, weight, 1e-6))
            elif op == "silu_mul":
                yield Case(label, (torch.cat((x, y), dim=1),))
                yield Case(f"{label} strided", (torch.cat((x, y, y), dim=1)[:, : 2 * columns],))
            elif rows:
                picked = torch.randint(0, rows, (2 * rows,), generator=g)
                yield Case(label, (x, picked))
                yield Case(f"{label} strided", (wide[:, 5 : columns + 5], picked))
    elif op == "head_rms_norm":
        for rows, heads, size in ((1, 16, 128), (130, 5, 80), (9, 3, 256), (40, 2, 17)):
            weight, qkv = randn((size,), dtype, g), randn((rows, (heads + 1) * size), dtype, g)
            yield Case(f"{rows}x{heads}x{size}", (qkv[:, size:], weight, 1e-6))
    elif op == "rope":
        for rows, size, rotary in ((1, 128, 128), (90, 64, 64), (33, 256, 64), (17, 80, 80), (5, 96, 22)):
            qkv, at = randn((rows, 7 * size), dtype, g), torch.randint(0, 99, (rows,), generator=g)
            q, k = qkv[:, : 4 * size], qkv[:, 4 * size : 6 * size]
            yield Case(f"{rows}x{size} R={rotary}", (q, k, at, angles(99, rotary, g), size))
    elif op == "rope_kv_write":
        for tokens, size, rotary in ((1, 128, 128), (200, 64, 64), (33, 256, 256), (70, 128, 32), (20, 80, 80)):
            for norm, by_head in product((False, True), repeat=2):
                shape = {"heads": 8, "kv_heads": 2, "head_dim": size, "rotary": rotary}
                inputs = attention_inputs(dtype, tokens, **shape, norm=norm, cached=dtype, by_head=by_head)
                yield Case(f"{tokens}x{size} R={rotary} norm={norm} by_head={by_head}", inputs)
    elif op == "topk_router":
        for rows, experts, top_k in ((0, 8, 2), (1, 128, 8), (300, 60, 4), (5, 257, 257), (9, 3, 1)):
            spread = torch.stack([torch.randperm(experts, generator=g) for _ in range(rows)] or [torch.empty(0)])
            logits = ((spread - experts // 2) / 16).reshape(rows, experts).to(dtype)
            for renormalize in (False, True):
                yield Case(f"{rows}x{experts} k={top_k} {renormalize}", (logits, top_k, renormalize))


LARGE = [op for op in KERNELS if next(large(op, torch.float32), None) is not None]


def test_a_stopped_pool_gives_its_cores_back() -> None:
    """Its first thread is the caller's, which was pinned to one of them."""
    before = os.sched_getaffinity(0)
    for _ in range(2):
        native.start_threads(len(native.physical_cpus()))
        native.stop_threads()
        assert os.sched_getaffinity(0) == before


def test_the_row_ops_are_here() -> None:
    assert set(LARGE) == {
        "add", "add_rms_norm", "head_rms_norm", "rms_norm", "rope", "rope_kv_write", "select_rows", "silu_mul",
        "topk_router",
    }  # fmt: skip


@pytest.mark.parametrize("op", LARGE)
@_every_dtype
def test_equals_the_reference_on_large_and_odd_shapes(op: str, instruction_set: str, dtype: torch.dtype) -> None:
    for case in large(op, dtype):
        check(OPS[op], case, instruction_set, dtype)


@functools.cache
def by_token(op: str) -> tuple[int, ...]:
    """Which arguments have a row for each token."""
    return {"add": (0, 1), "add_rms_norm": (0, 1), "rope": (0, 1, 2), "rope_kv_write": (0, 4), "select_rows": (1,)}.get(
        op, (0,)
    )


def only(op: str, arguments: tuple[Any, ...], rows: list[int]) -> tuple[Any, ...]:
    values = list(arguments)
    for place in by_token(op):
        values[place] = values[place][rows]
    for place, value in enumerate(values):
        if isinstance(value, AttentionBatch):
            (tables,) = value.tables
            some = dataclasses.replace(tables, slot_mapping=tables.slot_mapping[rows])
            values[place] = dataclasses.replace(value, tables=(some,))
    return tuple(values)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", LARGE)
@_every_dtype
def test_a_row_does_not_depend_on_the_others(op: str, instruction_set: str, dtype: torch.dtype, threads: int) -> None:
    """Bitwise: all rows at once on some threads, and in random parts on one."""
    for case in large(op, dtype):
        count = case.args[by_token(op)[0]].shape[0]
        native.library().pool_start(torch.full((threads,), -1, dtype=torch.int32).numpy())
        try:
            together = results(KERNELS[op].run, copy.deepcopy(case.args))
        finally:
            native.stop_threads()
        rows: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
        arguments = copy.deepcopy(case.args)
        while rows:
            part, rows = rows[: 1 + len(rows) // 3], rows[1 + len(rows) // 3 :]
            apart = results(KERNELS[op].run, only(op, arguments, part))
            for whole, some in zip(together[: len(together) - len(written(arguments))], apart, strict=False):
                assert torch.equal(whole[part], some), case.label
        for whole, some in zip(written(arguments), together[len(together) - len(written(arguments)) :], strict=True):
            assert torch.equal(whole, some), case.label


@pytest.mark.parametrize("op", [op for op in LARGE if op not in ("select_rows",)])
@_every_dtype
def test_a_nan_stays_in_its_row(op: str, instruction_set: str, dtype: torch.dtype) -> None:
    for case in large(op, dtype):
        place = by_token(op)[0]
        count = case.args[place].shape[0]
        if count < 2:
            continue
        clean = results(KERNELS[op].run, copy.deepcopy(case.args))
        arguments = copy.deepcopy(case.args)
        arguments[place][count // 2, 0] = math.nan
        dirty = results(KERNELS[op].run, arguments)
        others = [row for row in range(count) if row != count // 2]
        for index, (before, after) in enumerate(zip(clean, dirty, strict=True)):
            if index >= len(clean) - len(written(arguments)):
                slots = arguments[7].tables[0].slot_mapping[others]
                before, after = before.flatten(0, 1)[slots], after.flatten(0, 1)[slots]
            else:
                if after.is_floating_point() and not (op == "rope" and index == 1):
                    assert after[count // 2].isnan().any(), case.label
                before, after = before[others], after[others]
            assert torch.equal(before, after), case.label
        if op == "topk_router":
            ids = dirty[1][count // 2].tolist()
            assert len(set(ids)) == len(ids) and all(0 <= i < arguments[0].shape[1] for i in ids)


def test_router_prefers_the_lower_id_among_equals(instruction_set: str) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0], [0.0] * 6])
    _, ids = KERNELS["topk_router"].run(logits, 4, False)
    assert ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


@_every_dtype
def test_int8_cache_has_a_scale_for_each_token_and_head(instruction_set: str, dtype: torch.dtype) -> None:
    for tokens, size in ((1, 128), (50, 64), (7, 20)):
        inputs = attention_inputs(
            dtype, tokens, heads=4, kv_heads=2, head_dim=size, rotary=size, norm=True, cached=torch.int8
        )
        inputs[0][0, -size:] = 0.0
        check(OPS["rope_kv_write"], Case(f"{tokens}x{size}", inputs), instruction_set, dtype)
        KERNELS["rope_kv_write"].run(*inputs)
        cache, slot = inputs[6], int(inputs[7].tables[0].slot_mapping[0])
        assert not cache.v.flatten(0, 1)[slot, 1].any() and cache.v_scale.flatten(0, 1)[slot, 1] == 0
        assert cache.v.flatten(0, 1)[slot, 0].abs().max() == 127


@_every_dtype
def test_no_rows_are_no_work(instruction_set: str, dtype: torch.dtype) -> None:
    """Where the references cannot tell the shape."""
    rows, table = torch.empty((0, 64), dtype=dtype), torch.ones(4, 16)
    for op, outputs, arguments in (
        ("head_rms_norm", 1, (rows, torch.ones(16, dtype=dtype), 1e-6)),
        ("rope", 2, (rows, rows, torch.empty(0, dtype=torch.int64), table, 16)),
    ):
        into = KERNELS[op].into
        assert into is not None
        into(*(rows.clone() for _ in range(outputs)), *arguments)


@pytest.mark.parametrize(
    "op,arguments,message",
    [
        ("silu_mul", (torch.zeros(2, 3, dtype=torch.float64),), "one dtype"),
        ("rms_norm", (torch.zeros(2, 8), torch.zeros(4), 1e-6), "rows of 8 and a weight of 4"),
        ("rms_norm", (torch.zeros(2, 8), torch.zeros(8, dtype=torch.bfloat16), 1e-6), "dtype of the rows"),
        ("add_rms_norm", (torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(4), 1e-6), "shapes do not match"),
        ("add", (torch.zeros(2, 8), torch.zeros(2, 7)), "shapes do not match"),
        ("add", (torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bfloat16)), "one dtype"),
        ("select_rows", (torch.zeros(2, 8), torch.tensor([2])), "row 2 of 2"),
        ("select_rows", (torch.zeros(2, 8), torch.tensor([-1])), "row -1 of 2"),
        ("rope", (torch.zeros(1, 8), torch.zeros(1, 8), torch.tensor([4]), torch.zeros(4, 8), 8), "4 is not below 4"),
        ("rope", (torch.zeros(1, 8), torch.zeros(1, 8), torch.tensor([0]), torch.zeros(4, 16), 8), "do not match"),
    ],
)
def test_misfits_are_refused(op: str, arguments: tuple[Any, ...], message: str) -> None:
    into = KERNELS[op].into
    assert into is not None
    outputs = [torch.zeros(arguments[0].shape) for _ in range(2 if op in ("rope", "add_rms_norm") else 1)]
    if op == "select_rows":
        outputs = [torch.zeros(1, 8)]
    with pytest.raises(ValueError, match=message):
        into(*outputs, *arguments)
