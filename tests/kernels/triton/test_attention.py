"""Paged attention in Triton: several tiles and splits, mixed batches, quantized caches, padding."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from skyline.kernels.triton import attention
from skyline.ops import OPS, AttentionBatch, KVCache
from skyline.ops.attention import make_batch
from tests.kernels.triton.test_ops import moved

REFERENCE, TURNED = OPS["paged_attention"].reference, OPS["rope_attention"].reference
CONTEXTS = [1, 15, 17, 63, 64, 65, 130, 300]
BLOCK = 4


class Requests:
    """Keys and values of all contexts in one cache, whose unused slots hold NaN (int8: numbers that are not theirs)."""

    def __init__(
        self, heads: int, group: int, size: int, dtype: torch.dtype, cached: torch.dtype | None = None
    ) -> None:
        self.heads, self.group, self.size, self.dtype = heads, group, size, dtype
        generator = torch.Generator().manual_seed(0)
        blocks = [-(-context // BLOCK) for context in CONTEXTS]
        order = list(range(sum(blocks) + 1))
        random.Random(0).shuffle(order)
        self.tables = [[order.pop() for _ in range(count)] for count in blocks]
        self.cache = KVCache(heads, size, cached or dtype)
        if cached == torch.float8_e4m3fn:
            self.cache.k_scale, self.cache.v_scale = torch.linspace(0.5, 2, heads), torch.linspace(2, 0.5, heads)
        self.cache.allocate(sum(blocks) + 1, BLOCK, torch.device("cpu"))
        for part in self.cache.tensors:
            part.fill_(float("nan")) if cached != torch.int8 else part.fill_(77)
        self.q = torch.randn((sum(CONTEXTS), heads * group * size), generator=generator).to(dtype)
        k, v = (torch.randn((sum(CONTEXTS), heads * size), generator=generator).to(dtype) for _ in range(2))
        OPS["kv_write"].reference(k, v, self.cache, self.batch(list(range(len(CONTEXTS))), CONTEXTS))

    def batch(self, rows: list[int], lengths: list[int]) -> AttentionBatch:
        """The last `lengths` tokens of these requests."""
        starts = [CONTEXTS[row] - length for row, length in zip(rows, lengths, strict=True)]
        return AttentionBatch.build([self.tables[row] for row in rows], starts, lengths, BLOCK, torch.device("cpu"))

    def check(self, rows: list[int], lengths: list[int], **options: object) -> None:
        batch = self.batch(rows, lengths)
        q = self.q[: sum(lengths)]
        wide = self.cache
        if wide.dtype in (torch.bfloat16, torch.float16):
            k, v = (part.float() for part in wide.tensors)
            wide = KVCache(self.heads, self.size, torch.float32, k, v)
        expected = REFERENCE(q.float(), wide, batch, 0.3, **options)
        strided = torch.cat((q, q[:, :8]), dim=1)[:, : q.shape[1]]  # columns of a wider matrix
        given = {key: moved(value) for key, value in options.items()}
        got = attention.paged_attention(moved(strided), moved(self.cache), moved(batch), 0.3, **given)
        tolerance = 2e-5 if self.dtype == torch.float32 else 1.6e-2
        torch.testing.assert_close(got.float().cpu(), expected, rtol=tolerance, atol=tolerance)

    def check_turned(self, rows: list[int], norm: bool, **options: object) -> None:
        """The newest token's key and value come with its queries, and its place in the cache holds none yet."""
        batch, heads, size = self.batch(rows, [1] * len(rows)), self.heads, self.size
        generator = torch.Generator().manual_seed(1)
        qkv = torch.randn((len(rows), heads * (self.group + 2) * size), generator=generator).to(self.dtype)
        norms = [1 + torch.randn(size, generator=generator).to(self.dtype) / 8 if norm else None for _ in "qk"]
        angles = torch.rand((max(CONTEXTS), size // 4), generator=generator) * 6  # half of a head turns
        positions = torch.tensor([CONTEXTS[row] - 1 for row in rows])
        turn = (norms[0], norms[1], 1e-6, positions, torch.cat((angles.cos(), angles.sin()), -1))
        for part in self.cache.tensors:
            part.view(-1, heads, size)[batch.tables[0].slot_mapping] = float("nan") if part.dtype != torch.int8 else 55
        caches = [copy.deepcopy(self.cache) for _ in range(2)]
        expected = TURNED(qkv, *turn, caches[0], batch, 0.3, **options)
        given = {key: moved(value) for key, value in options.items()}
        there = moved(caches[1])
        got = attention.rope_attention(moved(qkv), *(moved(part) for part in turn), there, moved(batch), 0.3, **given)  # type: ignore[arg-type]
        tolerance = 2e-5 if self.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got.float().cpu(), expected.float(), rtol=tolerance, atol=2 * tolerance)
        quantized = self.cache.scales is not None
        for scale, wanted in zip(there.scales or (), caches[0].scales or (), strict=True):
            torch.testing.assert_close(scale.cpu(), wanted, rtol=1e-2, atol=0.0)
        for part, other in zip(there.tensors, caches[0].tensors, strict=True):
            step = 0.13 * other.float().abs() if quantized else tolerance
            close = (part.cpu().float() - other.float()).abs() <= step + (1 if other.dtype == torch.int8 else tolerance)
            assert bool((close | other.isnan()).all()) and torch.equal(part.cpu().isnan(), other.isnan())


SHAPES = [
    (2, 4, 16, torch.bfloat16, None),
    (1, 3, 20, torch.float32, None),
    (2, 1, 64, torch.bfloat16, torch.float8_e4m3fn),
    (2, 2, 16, torch.bfloat16, torch.int8),
]


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoding_with_the_rotation(monkeypatch: pytest.MonkeyPatch, shape: tuple, splits: int) -> None:
    monkeypatch.setattr(attention, "num_splits", lambda *_: splits)
    rows, sinks = list(range(len(CONTEXTS))), torch.linspace(-1, 2, shape[0] * shape[1])
    for norm, options in ((False, {}), (True, {"window": 40}), (True, {"sinks": sinks, "softcap": 2.0, "window": 1})):
        Requests(*shape).check_turned(rows, norm, **options)


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoding_in_splits(monkeypatch: pytest.MonkeyPatch, shape: tuple, splits: int) -> None:
    monkeypatch.setattr(attention, "num_splits", lambda *_: splits)
    requests = Requests(*shape)
    rows = list(range(len(CONTEXTS)))
    sinks = torch.linspace(-1, 2, shape[0] * shape[1])
    for options in ({}, {"window": 40}, {"sinks": sinks, "softcap": 2.0}, {"window": 1, "sinks": sinks}):
        requests.check(rows, [1] * len(rows), **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prompts_and_mixed_batches(shape: tuple) -> None:
    requests = Requests(*shape)
    sinks = torch.linspace(-1, 2, shape[0] * shape[1])
    for options in ({}, {"window": 30, "sinks": sinks}, {"softcap": 1.5}):
        requests.check([7, 3, 6], [300, 1, 70], **options)
    requests.check([6, 0, 7], [1, 1, 33])


def test_padding_reads_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed step has rows of context 0, whose block tables may say anything."""
    for splits in (1, 4):
        monkeypatch.setattr(attention, "num_splits", lambda *_, splits=splits: splits)
        requests = Requests(*SHAPES[0])
        batch = requests.batch([6, 7], [1, 1])
        batch.context_lens[1] = 0
        got = attention.paged_attention(moved(requests.q[:2]), moved(requests.cache), moved(batch), 0.3)
        expected = REFERENCE(requests.q[:1], requests.cache, requests.batch([6], [1]), 0.3)
        torch.testing.assert_close(got[:1].cpu(), expected, rtol=1.6e-2, atol=1.6e-2)
        assert not got[1].any()
        again = attention.paged_attention(moved(requests.q[:2]), moved(requests.cache), moved(batch), 0.3)
        assert torch.equal(got, again)  # what counts arrivals is back at zero


@pytest.mark.parametrize("splits", [1, 4])
def test_padding_has_no_place_in_the_cache(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """Where attention rotates heads and writes keys and values itself."""
    monkeypatch.setattr(attention, "num_splits", lambda *_: splits)
    requests = Requests(*SHAPES[0])
    batch, heads, size = requests.batch([6, 7], [1, 1]), requests.heads, requests.size
    batch.context_lens[1], batch.tables[0].slot_mapping[1] = 0, -1
    qkv = torch.randn((2, heads * (requests.group + 2) * size), generator=torch.Generator().manual_seed(2)).bfloat16()
    turn = (None, None, 0.0, torch.tensor([CONTEXTS[6] - 1, 0]), torch.ones((max(CONTEXTS), size)))
    before, cache = copy.deepcopy(requests.cache), moved(requests.cache)
    got = attention.rope_attention(moved(qkv), *moved(turn), cache, moved(batch), 0.3)
    expected = TURNED(qkv[:1], *turn[:3], turn[3][:1], turn[4], requests.cache, requests.batch([6], [1]), 0.3)
    torch.testing.assert_close(got[:1].cpu(), expected, rtol=1.6e-2, atol=1.6e-2)
    assert not got[1].any()
    mine = int(batch.tables[0].slot_mapping[0])
    for part, other in zip(cache.tensors, before.tensors, strict=True):
        now, was = (each.view(-1, heads, size) for each in (part.cpu(), other))
        changed = (now != was) & ~(now.isnan() & was.isnan())
        assert set(changed.any(-1).any(-1).nonzero().flatten().tolist()) == {mine}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_a_window_has_left_behind_is_not_read(monkeypatch: pytest.MonkeyPatch, shape: tuple) -> None:
    """Such blocks are let go: others write to them, and a table that starts from a cached prefix names none there."""
    rows, window = [5, 6, 7], 40
    for lengths, splits in (([1, 1, 1], 1), ([1, 1, 1], 4), ([20, 1, 70], 1)):
        monkeypatch.setattr(attention, "num_splits", lambda *_, splits=splits: splits)
        requests = Requests(*shape)
        batch, q = requests.batch(rows, lengths), requests.q[: sum(lengths)]
        arguments = moved((q, requests.cache, batch, 0.3, window))
        expected = attention.paged_attention(*arguments)
        used = {block for table in requests.tables for block in table}
        (spare,) = set(range(len(used) + 1)) - used
        for row, (request, length) in enumerate(zip(rows, lengths, strict=True)):
            batch.tables[0].block_tables[row, : max(0, CONTEXTS[request] - length - window + 1) // BLOCK] = spare
        for part in (*requests.cache.tensors, *((requests.cache.scales or ()) if shape[4] == torch.int8 else ())):
            if part.is_floating_point():
                part[spare] = float("nan")
        got = attention.paged_attention(*moved((q, requests.cache, batch, 0.3, window)))
        assert torch.equal(got, expected)


def test_few_different_splits() -> None:
    seen = {attention.num_splits(requests, 8, 131_072, 132) for requests in range(1, 300)}
    assert seen == {1, 2, 4, 8, 16, 32}
    assert attention.num_splits(1, 8, 400, 132) == 1 and attention.num_splits(1, 8, 8704, 132) == 16


@pytest.mark.parametrize("shared", [101_376, 166_912, 232_448])
@pytest.mark.parametrize("item", [2, 4])
def test_tiles_of_prompts_fit_into_shared_memory(item: int, shared: int) -> None:
    for head_dim in (64, 128, 192, 256):
        for group in (1, 8, 16):
            for rounds in (0.5, 4.0):
                tactic = attention.prefill_tactic(group, head_dim, item, shared, rounds)
                wide = 256 if head_dim > 128 else head_dim
                bytes_taken = (tactic.rows + 2 * tactic.keys * tactic.stages) * wide * item
                assert bytes_taken <= shared, (head_dim, group, tactic)


def test_prompts_in_larger_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of long prompts, of several requests, one of which has a single query."""
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(2, 128, torch.bfloat16)
    cache.allocate(12, 64, torch.device("cpu"))
    for part in cache.tensors:
        part.copy_(torch.randn(part.shape, generator=generator))
    batch = make_batch([60, 0, 70], [100, 70, 1], 64)
    q = torch.randn((171, 6 * 128), generator=generator).bfloat16()
    expected = OPS["paged_attention"].reference(q.float(), cache, batch, 0.1)
    seen = []
    monkeypatch.setattr(attention, "_ROUNDS", 0)
    chosen = attention.prefill_tactic
    monkeypatch.setattr(attention, "prefill_tactic", lambda *given: seen.append(chosen(*given)) or seen[-1])
    got = attention.paged_attention(*moved((q, cache, batch, 0.1)))
    assert seen == [(256, 64, 8, 2)]
    torch.testing.assert_close(got.float().cpu(), expected, rtol=1.6e-2, atol=1e-2)


def test_single_queries_do_not_make_tiles_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(8, 128, torch.bfloat16)
    cache.allocate(1, 16, torch.device("cpu"))
    seen: list[float] = []

    def chosen(*given: float) -> None:
        seen.append(given[-1])
        raise LookupError

    monkeypatch.setattr(attention, "prefill_tactic", chosen)
    for lengths in ([512], [512, *[1] * 63], [8192]):
        batch = AttentionBatch.build([[0] * 512] * len(lengths), [0] * len(lengths), lengths, 16, torch.device("cpu"))
        with monkeypatch.context() as patch, pytest.raises(LookupError):
            patch.setattr(type(attention.decode_kernel), "run", lambda *_, **__: None)
            attention.paged_attention(torch.empty((sum(lengths), 32 * 128), dtype=torch.bfloat16), cache, batch, 0.1)
    assert seen[0] == seen[1] < 1 and seen[2] > attention._ROUNDS
