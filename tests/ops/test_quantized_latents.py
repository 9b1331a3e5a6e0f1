"""Latents of multi-head latent attention in int8 and fp8, with a scale for each 128 neighbours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from skyline import ops
from skyline.engine.config import EngineConfig
from skyline.engine.sampling_params import SamplingParams
from skyline.kernels import Request, choose
from skyline.kernels.gpu import GPUS
from skyline.models import kv_caches
from skyline.ops import IndexCache, LatentCache
from skyline.ops.attention import make_batch
from skyline.ops.latent import known_latents, quantize_latents
from skyline.runner.explain import explain
from skyline.runner.memory import KV_DTYPES
from tests.models.families import FAMILIES
from tests.models.harness import PagedRunner, load_ours, save_tiny
from tests.oracle.engine import Job, run_engine
from tests.tiny import make_tokenizer

FP8 = torch.float8_e4m3fn
CPU = torch.device("cpu")


def _rows(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def _write(cache: LatentCache, latents: torch.Tensor, keys: torch.Tensor) -> Any:
    """Nine tokens of two requests; no rotation. -> their batch"""
    batch = make_batch([2, 0], [3, 6])
    cache.allocate(12, 4, CPU)
    positions = torch.tensor([2, 3, 4, *range(6)])
    table = torch.cat((torch.ones((9, 4)), torch.zeros((9, 4))), 1)
    ops.latent_rope_write(torch.zeros((9, 8)), latents, keys, positions, table, 8, cache, batch, False)
    return batch


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
@pytest.mark.parametrize("rank", [16, 128, 200])
def test_what_is_read_back(rank: int, dtype: torch.dtype) -> None:
    """Of each 128 numbers the largest is exact, and each other one the nearest that there is."""
    cache = LatentCache(rank, 8, torch.float32, quantized=dtype)
    latents, keys = _rows(9, rank, 1), _rows(9, 8, 2)
    latents[5] = 0
    latents[:, :16] *= 40
    batch = _write(cache, latents, keys)
    read, turned = known_latents(cache, batch.tables[0].block_tables[1, :2], torch.float32)
    assert torch.equal(turned[:6], keys[3:])
    for row, wanted in zip(read[:6].tolist(), latents[3:].tolist(), strict=True):
        for first in range(0, rank, 128):
            group, got = wanted[first : first + 128], row[first : first + 128]
            largest = max(map(abs, group))
            for value, found in zip(group, got, strict=True):
                if dtype == torch.int8:
                    assert abs(value - found) <= largest / 127 * 0.5001
                else:  # half of the last of three bits; the least number is 2^-9 of a range of 448
                    assert abs(value - found) <= max(abs(value) / 16, largest / 448 * 2**-10) * 1.0001
            place = max(range(len(group)), key=lambda i: abs(group[i]))
            assert math.isclose(got[place], group[place], rel_tol=1e-6)
    assert cache.bytes_per_token() == rank + 4 * -(-rank // 128) + 4 * 8
    assert sum(part.nbytes for part in cache.tensors) == 48 * cache.bytes_per_token()


def test_numbers_that_are_none() -> None:
    """They spoil their own group of one token, and in int8 its scale says so."""
    x = _rows(2, 256, 3)
    x[0, 5] = float("nan")
    for dtype in (torch.int8, FP8):
        values, scales = quantize_latents(x, dtype)
        read = values.float() * scales.repeat_interleave(128, 1)
        assert read[0, 5].isnan() and read[0, 128:].isfinite().all() and read[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
@pytest.mark.parametrize("chosen", [False, True])
def test_attention_over_it(dtype: torch.dtype, chosen: bool) -> None:
    """It is attention over the rounded latents."""
    narrow, wide = LatentCache(200, 8, torch.float32, quantized=dtype), LatentCache(200, 8, torch.float32)
    latents, keys, q = _rows(9, 200, 4), _rows(9, 8, 5), _rows(9, 3 * 20, 6)
    batch = _write(narrow, latents, keys)
    values, scales = quantize_latents(latents, dtype)
    _write(wide, values.float() * scales.repeat_interleave(128, 1)[:, :200], keys)
    for cache in (narrow, wide):  # the first request has two tokens of before this step
        for part in cache.tensors:
            part[batch.tables[0].block_tables[0, 0].item(), :2] = 0
    kv_b = _rows(3 * 22, 200, 7) * 200**-0.5
    some = torch.tensor([[position, max(0, position - 1), -1] for position in (2, 3, 4, *range(6))]).int()
    got, want = (
        ops.latent_attention(q, kv_b, cache, batch, 3, 10, 0.3, some if chosen else None) for cache in (narrow, wide)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_choices_over_it(dtype: torch.dtype) -> None:
    """They are those of the rounded keys: of 9 tokens and 5 places, with scores that are far from each other."""
    narrow, wide = IndexCache(24, torch.float32, quantized=dtype), IndexCache(24, torch.float32)
    q, k, weights = _rows(9, 2 * 24, 1), _rows(9, 24, 2), _rows(9, 2, 3).abs()
    values, scales = quantize_latents(k, dtype)
    table, positions = torch.cat((torch.ones((9, 4)), torch.zeros((9, 4))), 1), torch.tensor([0, 1, 2, *range(6)])
    chosen = []
    for cache, keys in ((narrow, k), (wide, values.float() * scales)):
        cache.allocate(12, 4, CPU)
        batch = make_batch([0, 0], [3, 6])
        chosen.append(ops.index_topk(q, keys, weights, positions, table, cache, batch, 5, 0.3, None, None, 0.0))
    assert torch.equal(*chosen)
    assert narrow.bytes_per_token() == 24 + 4 and sum(part.nbytes for part in narrow.tensors) == 48 * 28


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("family", ["DeepseekV3", "DeepseekV32"])
def test_the_engine_runs_on_it(family: str, dtype: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path, family, vocab_size=512, eos_token_id=2, **FAMILIES[family])
    make_tokenizer(tmp_path)
    settings = dict(dtype="float32", num_kv_blocks=64, block_size=8, max_model_len=96)
    jobs = [Job("x", list(range(5, 40)), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))]
    results, _ = run_engine(tmp_path, jobs, kv_cache_dtype=dtype, **settings)
    model = load_ours(tmp_path)
    for cache in kv_caches(model):
        if isinstance(cache, LatentCache | IndexCache):
            cache.quantized = KV_DTYPES[dtype]
    runner, tokens = PagedRunner(model), []
    fresh = jobs[0].prompt
    while len(tokens) < 12:
        tokens.append(int(runner.step(("x", fresh))[0][-1].argmax()))
        fresh = tokens[-1:]
    assert results["x"].token_ids == tokens
    config = EngineConfig(model=str(tmp_path), kv_cache_dtype=dtype)
    memory = explain(config, context=9, prefill=9)["memory"]
    for kind in {cache.kind for cache in kv_caches(model)}:
        per_token = sum(cache.bytes_per_token() for cache in kv_caches(model) if cache.kind == kind)
        assert [part["bytes_per_token"] for part in memory if part["kind"] == kind] == [per_token]


def test_gpus_without_fp8_leave_it_to_torch() -> None:
    for gpu, provider in (("a100", "torch"), ("l4", "triton")):
        asked = Request(ops.latent_attention, "cuda", torch.bfloat16, kv_dtype=FP8, gpu=GPUS[gpu])
        assert choose(asked).kernel.provider == provider
