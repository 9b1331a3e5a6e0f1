"""Latent attention on larger shapes: several splits and tiles, contexts of any length, chosen positions, padding."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from skyline.kernels.triton import indexer, latent, latent_absorbed, latent_tactics
from skyline.ops import OPS, AttentionBatch, IndexCache, LatentCache
from skyline.ops.latent import known_latents, quantize_latents
from tests.kernels.test_kernels import _wide
from tests.kernels.triton.test_ops import DEVICE, moved

CPU = torch.device("cpu")
BLOCK = 16


def _generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _batch(starts: list[int], lengths: list[int]) -> AttentionBatch:
    """Requests whose blocks lie mixed in memory."""
    needed = [-(-(start + length) // BLOCK) for start, length in zip(starts, lengths, strict=True)]
    order = torch.randperm(sum(needed), generator=_generator()).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    return AttentionBatch.build(tables, starts, lengths, BLOCK, CPU)


def _fill(shape: tuple[int, ...], dtype: torch.dtype, batch: AttentionBatch) -> Tensor:
    """Memory of a cache, which holds NaN wherever no token of the batch lies."""
    data = torch.randn(shape, generator=_generator(2)).to(dtype)
    used = torch.zeros(shape[:2], dtype=torch.bool)
    for table, context in zip(batch.tables[0].block_tables.tolist(), batch.host_context_lens, strict=True):
        for position in range(context):
            used[table[position // BLOCK], position % BLOCK] = True
    data[~used] = float("nan")
    return data


def _blocks(batch: AttentionBatch) -> int:
    return int(batch.tables[0].block_tables.max()) + 1


def _latents(
    rank: int, rope_dim: int, dtype: torch.dtype, batch: AttentionBatch, quantized: torch.dtype | None
) -> LatentCache:
    shape = (_blocks(batch), BLOCK)
    data = _fill((*shape, rank + rope_dim), dtype, batch)
    if quantized is None:
        return LatentCache(rank, rope_dim, dtype, data)
    values, scales = quantize_latents(data[..., :rank].flatten(0, 1), quantized)
    parts = (values.view(*shape, rank), scales.view(*shape, -1), data[..., rank:].contiguous())
    return LatentCache(rank, rope_dim, dtype, parts[0], quantized, *parts[1:])


def _arguments(
    starts: list[int],
    lengths: list[int],
    dtype: torch.dtype = torch.float32,
    sizes: tuple[int, int, int, int, int] = (5, 24, 64, 16, 40),
    listed: int | None = None,
    quantized: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """sizes: heads, plain, rank, rope_dim, value_dim. q is columns of a wider matrix."""
    heads, plain, rank, rope_dim, value_dim = sizes
    batch, tokens = _batch(starts, lengths), sum(lengths)
    q = torch.randn((tokens, heads * (plain + rope_dim) + 8), generator=_generator(3)).to(dtype)[:, 8:]
    kv_b = (torch.randn((heads * (plain + value_dim), rank), generator=_generator(4)) * rank**-0.5).to(dtype)
    chosen = None
    if listed is not None:
        chosen = torch.full((tokens, listed), -1, dtype=torch.int32)
        positions = [start + index for start, length in zip(starts, lengths, strict=True) for index in range(length)]
        for row, position in enumerate(positions):
            some = torch.randperm(position + 1, generator=_generator(row))[: listed - 3].int()
            # Places that are empty are not only the last ones, nor are positions sorted.
            chosen[row, torch.randperm(listed, generator=_generator(row))[: len(some)]] = some
    scale = 3 * (plain + rope_dim) ** -0.5
    return q, kv_b, _latents(rank, rope_dim, dtype, batch, quantized), batch, heads, value_dim, scale, chosen


def _cpu(cache: LatentCache) -> LatentCache:
    parts = {name: None if (x := getattr(cache, name)) is None else x.cpu() for name in ("data", "scales", "keys")}
    return dataclasses.replace(cache, **parts)


def _compare(arguments: tuple[Any, ...], dtype: torch.dtype = torch.float32) -> None:
    op = OPS["latent_attention"]
    expected = op.reference(*(_wide(copy.deepcopy(value)) for value in arguments))
    actual = latent.latent_attention(*(moved(value) for value in arguments))
    rtol, atol = op.tolerance[dtype]
    torch.testing.assert_close(actual.float().cpu(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "starts,lengths",
    [
        ([0, 16, 299], [1, 1, 1]),
        ([70, 5, 130], [9, 1, 3]),  # few queries: several tiles of queries and heads
        ([300, 20, 0, 90, 3], [1, 70, 66, 1, 2]),  # many of some, between others
    ],
    ids=["single", "few", "mixed"],
)
def test_attention(starts: list[int], lengths: list[int], splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_absorbed, "num_splits", lambda *_: splits)
    monkeypatch.setattr(latent_tactics, "EXPANDED_BYTES", 90 * 2 * (24 + 40) * 4)  # two of the heads at a time
    _compare(_arguments(starts, lengths))


@pytest.mark.parametrize("splits", [1, 3])
def test_chosen(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_absorbed, "num_splits", lambda *_: splits)
    monkeypatch.setattr(latent_absorbed, "LEAST_KEYS", 16)
    monkeypatch.setattr(latent_tactics, "TOKENS_AT_ONCE", 7)  # cuts a request in two
    _compare(_arguments([0, 16, 299, 60], [1, 1, 1, 9], listed=40))


QUANTIZED = [torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("listed", [None, 40])
@pytest.mark.parametrize("quantized", [None, *QUANTIZED])
def test_full_size(listed: int | None, quantized: torch.dtype | None) -> None:
    arguments = _arguments([2, 150], [1, 1], torch.bfloat16, (20, 128, 512, 64, 128), listed, quantized)
    _compare(arguments, torch.bfloat16)


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("rank", [64, 200])
def test_quantized(rank: int, quantized: torch.dtype) -> None:
    """Single queries, many of one request, and choices, with one group a token and with a part of a second one."""
    for starts, lengths, listed in (([0, 299], [1, 1], None), ([20, 3], [66, 2], None), ([60, 0], [9, 1], 20)):
        _compare(_arguments(starts, lengths, torch.float32, (5, 24, rank, 16, 40), listed, quantized))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_tiles_of_either_kind(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_absorbed, "capability", lambda device: capability)
    _compare(_arguments([40, 100], [1, 4], torch.bfloat16, (5, 24, 120, 16, 40)), torch.bfloat16)


@pytest.mark.parametrize("listed", [None, 40])
@pytest.mark.parametrize("splits", [1, 2])
def test_padding_and_unknown_contexts(listed: int | None, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_absorbed, "num_splits", lambda *_: splits)
    arguments = _arguments([70, 30, 12], [1, 1, 1], listed=listed)
    want = OPS["latent_attention"].reference(*copy.deepcopy(arguments))
    q, kv_b, cache, batch, *rest, chosen = (moved(value) for value in arguments)
    batch.host_context_lens = [10**6] * 3  # as where a step is recorded
    batch.context_lens[1] = 0
    batch.tables[0].block_tables[1] = 10**6
    got = latent.latent_attention(q, kv_b, cache, batch, *rest, chosen).cpu()
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]], rtol=1e-4, atol=1e-4)
    assert not got[1].any()


@pytest.mark.parametrize("quantized", [None, *QUANTIZED])
@pytest.mark.parametrize("interleaved,normed", [(True, False), (False, False), (True, True)])
def test_write(interleaved: bool, normed: bool, quantized: torch.dtype | None) -> None:
    batch, dtype = _batch([0, 16, 299], [1, 1, 20]), torch.bfloat16
    cache = LatentCache(96, 24, dtype, quantized=quantized)
    cache.allocate(_blocks(batch), BLOCK, CPU)
    for part in cache.tensors:
        part.copy_(torch.ones(part.shape))
    wide = torch.randn((22, 8 + 96 + 24), generator=_generator()).to(dtype)
    q = torch.randn((22, 11 * 64 + 8), generator=_generator()).to(dtype)[:, 8:]
    angles = torch.rand((320, 12), generator=_generator()) * 6
    table, positions = torch.cat((angles.cos(), angles.sin()), -1), torch.tensor([0, 16, *range(299, 319)])
    kept = [row for row in range(22) if row not in (1, 7)]
    real = copy.deepcopy(batch)
    real.tables[0].slot_mapping = batch.tables[0].slot_mapping[kept]
    wanted, mine = copy.deepcopy(cache), moved(cache)
    inputs = (q, wide[:, 8:104], wide[:, 104:])
    reference = OPS["latent_rope_write"].reference
    _wide_cache = _wide(wanted)
    norm = (1 + torch.randn(96, generator=_generator(4)).to(dtype) / 8, 0.1) if normed else (None, 0.0)
    rows = (*(x[kept].float() for x in inputs), positions[kept])
    want = reference(*rows, table, 64, _wide_cache, real, interleaved, *(_wide(value) for value in norm))
    batch.tables[0].slot_mapping[[1, 7]] = -1
    wide, q = wide.to(DEVICE), q.to(DEVICE)
    inputs = (q, wide[:, 8:104], wide[:, 104:])
    others = (moved(positions), moved(table), 64, mine, moved(batch), interleaved, *(moved(value) for value in norm))
    got = latent.latent_rope_write(*inputs, *others)
    torch.testing.assert_close(got.float().cpu()[kept], want, rtol=1.6e-2, atol=1e-2)
    if quantized is not None and not normed:  # else a number between two of the type may go to either
        assert torch.equal(mine.tensors[0].float().cpu(), _wide_cache.tensors[0])
        assert torch.equal(mine.tensors[1].cpu(), _wide_cache.tensors[1])
    rtol = {None: 1.6e-2, torch.int8: 2e-2, torch.float8_e4m3fn: 0.13}[quantized]
    everything = torch.arange(_blocks(batch))
    read = (known_latents(one, everything, torch.float32) for one in (_cpu(mine), _wide_cache))
    for got_part, want_part in zip(*read, strict=True):
        torch.testing.assert_close(got_part, want_part, rtol=rtol, atol=4e-2 if quantized else 1e-2)  # a level of int8


def _index_arguments(
    starts: list[int], lengths: list[int], top_k: int, quantized: torch.dtype | None = None
) -> tuple[Any, ...]:
    """Small whole numbers, whose products are exact in any order, so that many scores are equal, and some zero."""
    batch, tokens, heads = _batch(starts, lengths), sum(lengths), 5
    data = torch.randint(-2, 3, (_blocks(batch), BLOCK, 24), generator=_generator()).float()
    cache = IndexCache(24, torch.float32, data + _fill(tuple(data.shape), torch.float32, batch) * 0)
    if quantized is not None:  # with scales that are powers of two, by which scores stay exact
        scales = 2.0 ** torch.randint(-2, 3, data.shape[:2], generator=_generator(9))
        cache = dataclasses.replace(cache, keys=data.to(quantized), quantized=quantized, scales=scales)
    q, k, weights = (
        torch.randint(-2, 3, (tokens, size), generator=_generator(size)).float() for size in (heads * 24, 24, heads + 2)
    )
    table = torch.cat((torch.ones((320, 4)), torch.zeros((320, 4))), -1)
    table[::2] = torch.cat((torch.zeros((160, 4)), torch.ones((160, 4))), -1)
    positions = torch.tensor([s + i for s, n in zip(starts, lengths, strict=True) for i in range(n)])
    return q, k, weights[:, 2:], positions, table, cache, batch, top_k, 0.5


@pytest.mark.parametrize("top_k", [1, 40, 130])
@pytest.mark.parametrize("starts,lengths", [([0, 16, 299], [1, 1, 1]), ([0, 290, 60, 7], [1, 12, 1, 3])])
def test_index(starts: list[int], lengths: list[int], top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_tactics, "SCORE_BYTES", 4 * 320 * 5)  # five queries at a time
    monkeypatch.setattr(indexer, "_TILE", 128)
    arguments = _index_arguments(starts, lengths, top_k)
    mine = [moved(value) for value in arguments]
    want = OPS["index_topk"].reference(*arguments)
    got = indexer.index_topk(*mine)
    assert torch.equal(got.cpu(), want)
    torch.testing.assert_close(mine[5].tensors[0].cpu(), arguments[5].tensors[0], equal_nan=True)


@pytest.mark.parametrize("quantized", QUANTIZED)
def test_index_of_quantized_keys(quantized: torch.dtype) -> None:
    """New ones are quantized as by the reference, and the same positions are chosen."""
    arguments = _index_arguments([0, 150, 60, 7], [1, 12, 1, 3], 40, quantized)
    mine = [moved(value) for value in arguments]
    want = OPS["index_topk"].reference(*arguments)
    got = indexer.index_topk(*mine)
    for written, expected in zip(mine[5].tensors, arguments[5].tensors, strict=True):
        assert torch.equal(written.float().cpu(), expected.float())
    # Scales of 1/127 and 1/448 make sums that differ in their last bits: equals may change places.
    assert (got.cpu().sort(1).values == want.sort(1).values).float().mean() > 0.9


@pytest.mark.parametrize("size,rotary,heads", [(128, 64, 20), (24, 24, 5), (40, 6, 3)])
def test_index_norms_its_keys(size: int, rotary: int, heads: int) -> None:
    """Of keys that are columns of a wider matrix; padding writes none."""
    batch, dtype, tokens = _batch([0, 16, 70], [1, 1, 20]), torch.bfloat16, 22
    cache = IndexCache(size, dtype, torch.zeros((_blocks(batch), BLOCK, size), dtype=dtype))
    wide = torch.randn((tokens, (heads + 1) * size + heads + 8), generator=_generator()).to(dtype)
    q, k, weights = torch.split(wide[:, 8:], [heads * size, size, heads], dim=1)
    angles = torch.rand((320, rotary // 2), generator=_generator()) * 6
    table, positions = torch.cat((angles.cos(), angles.sin()), -1), torch.tensor([0, 16, *range(70, 90)])
    norm, bias = (torch.randn(size, generator=_generator(seed)).to(dtype) for seed in (5, 6))
    mine, expected = moved(cache), _wide(copy.deepcopy(cache))
    # More places than there are tokens, so that no two near scores decide what is compared.
    options = (100, 0.5, norm, bias, 0.1)
    rest = [_wide(value) for value in (positions, table, expected, batch, *options)]
    want = OPS["index_topk"].reference(q.float(), k.float(), weights.float(), *rest)
    batch.tables[0].slot_mapping[1] = -1
    on_device = torch.split(wide.to(DEVICE)[:, 8:], [heads * size, size, heads], dim=1)
    others = [moved(value) for value in (positions, table)]
    got = indexer.index_topk(*on_device, *others, mine, *(moved(value) for value in (batch, *options)))
    assert torch.equal(got.cpu().sort(1).values[2:], want.sort(1).values[2:])
    untouched = expected.tensors[0].clone()
    table_of = batch.tables[0].block_tables
    untouched[table_of[1, 1], 0] = 0
    torch.testing.assert_close(mine.tensors[0].float().cpu(), untouched, rtol=1.6e-2, atol=3e-2)


def test_index_of_padding_and_unknown_contexts() -> None:
    arguments = _index_arguments([70, 30, 12], [1, 1, 1], 20)
    mine = [moved(value) for value in arguments]
    want = OPS["index_topk"].reference(*copy.deepcopy(arguments))
    batch = mine[6]
    batch.host_context_lens = [10**6] * 3
    batch.context_lens[1] = 0
    batch.tables[0].slot_mapping[1] = -1
    batch.tables[0].block_tables[1] = 10**6
    got = indexer.index_topk(*mine).cpu()
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert (got[1] == -1).all()


def test_no_rows() -> None:
    batch, cache = moved(AttentionBatch.build([], [], [], BLOCK, CPU)), LatentCache(32, 16, torch.float32)
    cache.allocate(1, BLOCK, DEVICE)
    nothing, table = torch.empty((0, 2 * 40), device=DEVICE), torch.empty((4, 16), device=DEVICE)
    positions = torch.empty((0,), dtype=torch.int64, device=DEVICE)
    write = (nothing, nothing[:, :32], nothing[:, :16], positions, table, 40, cache, batch)
    assert latent.latent_rope_write(*write).shape == (0, 80)
    kv_b = torch.empty((2 * 50, 32), device=DEVICE)
    assert latent.latent_attention(nothing, kv_b, cache, batch, 2, 26, 0.1).shape == (0, 52)
