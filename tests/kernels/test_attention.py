"""Attention and cache writes on the CPU: right, and the same bits however a request is cut, batched or threaded."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from skyline.kernels import candidates
from skyline.kernels.cpu import native
from skyline.ops import OPS, AttentionBatch, KVCache

CPU = torch.device("cpu")
REFERENCE = OPS["paged_attention"].reference


def kernel(name: str):  # type: ignore[no-untyped-def]
    return next(candidate.run for candidate in candidates(name) if candidate.provider == native.PROVIDER)


@dataclass
class Shape:
    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    int8: bool = False
    by_head: bool = True  # as the engine has it on a CPU


@dataclass
class Options:
    window: int | None = None
    sinks: Tensor | None = None
    softcap: float | None = None


class Requests:
    """Requests with queries, keys and values for all their positions, in one cache whose unused slots hold NaN."""

    def __init__(self, shape: Shape, contexts: list[int], seed: int = 0) -> None:
        self.shape, self.contexts = shape, contexts
        generator = torch.Generator().manual_seed(seed)
        size, heads = shape.block_size, shape.kv_heads
        blocks = [-(-context // size) for context in contexts]
        order = list(range(sum(blocks) + 1))
        random.Random(seed).shuffle(order)
        self.tables = [[order.pop() for _ in range(count)] for count in blocks]
        dtype = torch.int8 if shape.int8 else shape.dtype
        self.cache = KVCache(heads, shape.head_dim, dtype, by_head=shape.by_head)
        self.cache.allocate(sum(blocks) + 1, size, CPU)
        for part in (*self.cache.tensors, *(self.cache.scales or ())):
            part.fill_(float("nan") if part.is_floating_point() else 77)
        self.q = []
        for row, context in enumerate(contexts):
            self.q.append(self._random((context, heads * shape.group * shape.head_dim), generator))
            k, v = (self._random((context, heads * shape.head_dim), generator) for _ in range(2))
            OPS["kv_write"].reference(k, v, self.cache, self.batch([(row, 0, context)]))

    def _random(self, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(size, generator=generator).to(self.shape.dtype)

    def batch(self, parts: list[tuple[int, int, int]]) -> AttentionBatch:
        """parts: (request, first position, number of queries)."""
        tables = [self.tables[row] for row, _, _ in parts]
        starts, lengths = [first for _, first, _ in parts], [count for _, _, count in parts]
        return AttentionBatch.build(tables, starts, lengths, self.shape.block_size, CPU)

    def attend(self, parts: list[tuple[int, int, int]], options: Options) -> list[Tensor]:
        q = torch.cat([self.q[row][first : first + count] for row, first, count in parts])
        # Queries are columns of a wider matrix.
        wide = torch.cat((q, q[:, :8]), dim=1)[:, : q.shape[1]]
        out = kernel("paged_attention")(
            wide, self.cache, self.batch(parts), 0.4, options.window, options.sinks, options.softcap
        )
        return list(out.split([count for _, _, count in parts]))

    def whole(self, row: int, options: Options) -> Tensor:
        return self.attend([(row, 0, self.contexts[row])], options)[0]

    def expected(self, parts: list[tuple[int, int, int]], options: Options) -> list[Tensor]:
        cache = self.cache
        if not self.shape.int8:
            k, v = cache.tensors
            cache = KVCache(cache.num_kv_heads, cache.head_dim, torch.float32, k.float(), v.float())
        q = torch.cat([self.q[row][first : first + count] for row, first, count in parts]).float()
        out = REFERENCE(q, cache, self.batch(parts), 0.4, options.window, options.sinks, options.softcap)
        return list(out.split([count for _, _, count in parts]))


def option_grid(shape: Shape) -> list[Options]:
    sinks = torch.linspace(-2, 3, shape.kv_heads * shape.group)
    return [
        Options(),
        Options(window=100),
        Options(softcap=2.0),
        Options(window=7, sinks=sinks, softcap=1.5),
        Options(sinks=sinks.to(torch.bfloat16)),
    ]


FLOAT, BF16 = torch.float32, torch.bfloat16
SHAPES = [
    Shape(2, 1, 8, 1, BF16),
    Shape(2, 2, 128, 16, BF16),
    Shape(1, 3, 80, 4, BF16),
    Shape(2, 8, 64, 16, BF16),
    Shape(1, 20, 24, 16, BF16),
    Shape(2, 2, 128, 16, BF16, int8=True),
    Shape(1, 3, 40, 4, BF16, int8=True),
    Shape(2, 2, 64, 16, FLOAT),
    Shape(1, 3, 20, 1, FLOAT),
    Shape(1, 1, 7, 3, FLOAT),
    Shape(2, 2, 64, 4, FLOAT, int8=True),
    Shape(8, 2, 128, 32, BF16),
    Shape(3, 4, 80, 48, BF16),
    Shape(2, 7, 96, 64, BF16, int8=True),
    Shape(3, 2, 64, 4, BF16, int8=True),
    Shape(7, 2, 256, 24, BF16),
    Shape(2, 5, 128, 16, BF16, by_head=False),
    Shape(3, 2, 64, 16, BF16, int8=True, by_head=False),
    Shape(3, 2, 64, 16, FLOAT, by_head=False),
]
_every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@_every_shape
def test_equals_the_reference(instruction_set: str, shape: Shape) -> None:
    requests = Requests(shape, [1, 15, 17, 200, 255, 256, 257, 511, 513, 700])
    parts = [(row, context - 1, 1) for row, context in enumerate(requests.contexts)]
    parts += [(3, 0, 200), (9, 640, 60), (8, 0, 513), (6, 250, 7)]
    tolerance = 2e-5 if shape.dtype == FLOAT else 1.6e-2
    for options in option_grid(shape):
        for got, want in zip(requests.attend(parts, options), requests.expected(parts, options), strict=True):
            torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


@_every_shape
def test_bits_do_not_depend_on_the_batch_or_the_cut(instruction_set: str, shape: Shape) -> None:
    """Unused slots and blocks of the cache hold NaN (int8: other numbers), so reading beyond a context would show."""
    contexts = [1, 31, 33, 255, 256, 258, 514]
    requests = Requests(shape, contexts, seed=1)
    for number, options in enumerate(option_grid(shape)):
        alone = [requests.whole(row, options) for row in range(len(contexts))]
        assert all(bool(result.isfinite().all()) for result in alone)
        for result, got in zip(
            alone, requests.attend([(r, 0, n) for r, n in enumerate(contexts)], options), strict=True
        ):
            assert torch.equal(result, got)
        choose = random.Random(number)
        for _ in range(4):
            parts = []
            for row in choose.sample(range(len(contexts)), len(contexts)):
                first = choose.randrange(contexts[row])
                parts.append(
                    (row, first, choose.randint(1, min(contexts[row] - first, choose.choice((1, 5, 40, 500)))))
                )
            for (row, first, count), got in zip(parts, requests.attend(parts, options), strict=True):
                assert torch.equal(got, alone[row][first : first + count]), (row, first, count, options)


@_every_shape
def test_decoding_equals_prefill(instruction_set: str, shape: Shape) -> None:
    requests = Requests(shape, [530], seed=2)
    for options in option_grid(shape):
        whole = requests.whole(0, options)
        for position in (*range(0, 40), *range(250, 262), *range(508, 530)):
            (one,) = requests.attend([(0, position, 1)], options)
            assert torch.equal(one, whole[position : position + 1]), (position, options)


def test_decoding_equals_prefill_on_denormal_values(instruction_set: str) -> None:
    """Tiles take denormal numbers for zeros, vectors by themselves do not."""
    requests = Requests(SHAPES[1], [100], seed=4)
    assert requests.cache.v is not None
    requests.cache.v *= 1e-38
    whole = requests.whole(0, Options())
    for position in (0, 1, 50, 99):
        (one,) = requests.attend([(0, position, 1)], Options())
        assert torch.equal(one, whole[position : position + 1])


@pytest.mark.parametrize("shape", [*(SHAPES[at] for at in (1, 5, 7)), Shape(7, 2, 128, 16, BF16)], ids=str)
def test_bits_do_not_depend_on_the_threads(instruction_set: str, shape: Shape) -> None:
    requests = Requests(shape, [1030, 40, 300], seed=3)
    parts = [(0, 1029, 1), (1, 39, 1), (2, 0, 300)]
    batches = [parts, parts[:1], parts[2:], [(0, 990, 40)], [(0, 1000, 30), *parts[1:]]]
    for options in option_grid(shape):
        results = []
        for threads in (1, 2, 3, 8):
            try:
                native.start_threads(threads)
                results.append([torch.cat(requests.attend(batch, options)) for batch in batches])
            finally:
                native.stop_threads()
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), options


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[7]], ids=str)
def test_nan_stays_in_its_request(instruction_set: str, shape: Shape) -> None:
    requests = Requests(shape, [300, 300, 20], seed=4)
    parts = [(0, 299, 1), (1, 280, 20), (2, 0, 20)]
    before = requests.attend(parts, Options())
    requests.cache.tensors[1][requests.tables[1][0]] = float("nan")
    after = requests.attend(parts, Options())
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert bool(after[1].isnan().all())
    requests.q[0][299] = float("nan")
    after = requests.attend([(0, 290, 10), (2, 0, 20)], Options())
    assert bool(after[0][9].isnan().all()) and bool(after[0][:9].isfinite().all())
    assert torch.equal(before[2], after[1])


@pytest.mark.parametrize("shape", [SHAPES[at] for at in (1, 5, 7, 9, 10, -3, -2, -1)], ids=str)
def test_kv_write_equals_the_reference(instruction_set: str, shape: Shape) -> None:
    contexts = [1, 40, 7]
    native_cache, reference = (Requests(shape, contexts, seed=5) for _ in range(2))
    generator = torch.Generator().manual_seed(6)
    batch = native_cache.batch([(row, 0, context) for row, context in enumerate(contexts)])
    width = shape.kv_heads * shape.head_dim
    kv = torch.randn((sum(contexts), 2 * width), generator=generator).to(shape.dtype)
    kv[3] = 0
    k, v = kv.split(width, dim=1)
    kernel("kv_write")(k, v, native_cache.cache, batch)
    OPS["kv_write"].reference(k, v, reference.cache, batch)
    parts = [(*each.cache.tensors, *(each.cache.scales or ())) for each in (native_cache, reference)]
    for got, want in zip(*parts, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("int8", [False, True])
def test_no_tokens(instruction_set: str, int8: bool) -> None:
    shape = Shape(2, 2, 64, 16, BF16, int8)
    requests = Requests(shape, [20])
    out = kernel("paged_attention")(requests.q[0][:0], requests.cache, requests.batch([(0, 20, 0)]), 1.0)
    assert out.shape == (0, 256)
    kernel("kv_write")(out[:, :128], out[:, :128], requests.cache, requests.batch([]))


def test_int8_cache_is_accounted_for() -> None:
    cache = KVCache(2, 64, torch.int8)
    cache.allocate(3, 16, CPU)
    held = [*cache.tensors, *(cache.scales or ())]
    assert len(held) == 4
    assert sum(part.numel() * part.element_size() for part in held) == 3 * 16 * cache.bytes_per_token()


def test_int8_is_close_to_float() -> None:
    shape = Shape(2, 2, 64, 16, FLOAT)
    exact, quantized = (Requests(Shape(**{**vars(shape), "int8": int8}), [90], seed=7) for int8 in (False, True))
    parts = [(0, 0, 90)]
    (a,), (b,) = exact.expected(parts, Options()), quantized.expected(parts, Options())
    assert (a - b).abs().max() < 0.05 and not torch.equal(a, b)


def test_bad_arguments_are_refused(instruction_set: str) -> None:
    requests = Requests(Shape(2, 2, 64, 16, BF16), [20])
    q, cache, batch = requests.q[0], requests.cache, requests.batch([(0, 0, 20)])
    run = kernel("paged_attention")
    for arguments in (
        (q[:, :192], cache, batch, 1.0),
        (q[:5], cache, batch, 1.0),
        (q.float(), cache, batch, 1.0),
        (q, cache, batch, 1.0, 0),
        (q, cache, batch, 1.0, None, torch.zeros(3)),
        (q, cache, batch, 1.0, None, None, -1.0),
        (q, cache, replace(batch, context_lens=torch.tensor([40], dtype=torch.int32)), 1.0),
    ):
        with pytest.raises(ValueError):
            run(*arguments)


def test_a_cache_lies_in_one_order(instruction_set: str) -> None:
    requests = Requests(Shape(2, 2, 64, 16, BF16, int8=True), [20])
    k, v = requests.cache.tensors
    k_scale, v_scale = requests.cache.scales or (None, None)
    assert k_scale is not None and v_scale is not None
    by_token = {"k": k.contiguous(), "v": v.contiguous(), "k_scale": k_scale.contiguous()}
    batch, q = requests.batch([(0, 0, 20)]), requests.q[0]
    fresh = q[:, : 2 * 64]
    assert not k.is_contiguous()
    for wrong in (
        {"k": by_token["k"]},
        {"v": by_token["v"]},
        {"k_scale": by_token["k_scale"]},
        {"k": k[..., ::2], "v": v[..., ::2]},
        {"k": k[::2], "v": v[::2], "k_scale": k_scale[::2], "v_scale": v_scale[::2]},
    ):
        cache = replace(requests.cache, **wrong)
        with pytest.raises(ValueError, match=r"contiguous blocks|scales do not match"):
            kernel("paged_attention")(q, cache, batch, 1.0)
        with pytest.raises(ValueError, match=r"contiguous blocks|scales do not match"):
            kernel("kv_write")(fresh, fresh, cache, batch)


def test_more_tasks_than_a_job_of_the_pool_can_number() -> None:
    """2^20 less one of them fit into a job: a request here is a task."""
    count = (1 << 20) + 5
    shape = Shape(1, 1, 8, 16, torch.bfloat16)
    requests = Requests(shape, [3])
    q = torch.randn(count, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    batch = AttentionBatch.build(requests.tables, [2], [1], shape.block_size, CPU)
    (tables,) = batch.tables
    many = replace(
        batch,
        query_starts=torch.arange(count + 1, dtype=torch.int32),
        context_lens=batch.context_lens.expand(count).contiguous(),
        tables=(replace(tables, block_tables=tables.block_tables.expand(count, -1).contiguous()),),
    )
    native.library().pool_start(torch.full((2,), -1, dtype=torch.int32).numpy())
    try:
        out = kernel("paged_attention")(q, requests.cache, many, 0.4)
    finally:
        native.stop_threads()
    for row in (0, 1, count - 6, count - 1):
        assert torch.equal(out[row : row + 1], kernel("paged_attention")(q[row : row + 1], requests.cache, batch, 0.4))
