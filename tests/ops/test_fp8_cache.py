"""Keys and values in fp8 with a scale for each head."""

from __future__ import annotations

from pathlib import Path

import torch

from skyline import ops
from skyline.engine.config import EngineConfig
from skyline.engine.sampling_params import SamplingParams
from skyline.kernels import Request, choose
from skyline.models import kv_caches
from skyline.ops import KVCache
from skyline.ops.attention import gather, make_batch
from skyline.runner.explain import explain
from tests.models.harness import PagedRunner, load_ours
from tests.oracle.engine import Job, run_engine

FP8 = torch.float8_e4m3fn


def test_what_is_read_back() -> None:
    """Each value is the nearest fp8 number to value / scale, times the scale; beyond 448 times the scale is cut off."""
    cache = KVCache(2, 8, FP8)
    cache.k_scale = torch.tensor([0.5, 2.0])
    cache.allocate(12, 4, torch.device("cpu"))
    assert cache.v_scale is not None and cache.v_scale.tolist() == [1.0, 1.0]
    assert cache.bytes_per_token() == 2 * 2 * 8
    batch = make_batch([2, 0], [3, 6])
    k, v = (torch.randn(9, 16, generator=torch.Generator().manual_seed(seed)) * 3 for seed in (0, 1))
    k[4, 0], k[4, 8] = 500.0, -5000.0
    ops.kv_write(k, v, cache, batch)
    keys, values = gather(cache, batch.tables[0].block_tables[1, :2])
    scale = torch.tensor([0.5, 2.0]).repeat_interleave(8)
    expected = (k[3:] / scale).clamp(-448, 448).to(FP8).float() * scale
    assert torch.equal(keys[:6].flatten(1), expected) and torch.equal(values[:6].flatten(1), v[3:].to(FP8).float())
    assert keys[1, 0, 0] == 224.0 and keys[1, 1, 0] == -896.0


def test_attention_over_it(tmp_path: Path) -> None:
    """The engine's tokens with a cache in fp8 are those of attention over the rounded keys and values."""
    q = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    batch = make_batch([0, 0], [3, 6])
    narrow, wide = KVCache(2, 8, FP8), KVCache(2, 8, torch.float32)
    for cache in (narrow, wide):
        cache.allocate(12, 4, torch.device("cpu"))
    k, v = (torch.randn(9, 16, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
    ops.kv_write(k, v, narrow, batch)
    ops.kv_write(k.to(FP8).float(), v.to(FP8).float(), wide, batch)
    torch.testing.assert_close(ops.paged_attention(q, narrow, batch, 0.3), ops.paged_attention(q, wide, batch, 0.3))


def test_native_kernels_leave_it_to_torch() -> None:
    choice = choose(Request(ops.paged_attention, "cpu", torch.float32, kv_dtype=FP8, isa="avx2"))
    assert choice.kernel.provider == "torch" and ("cpu", "reads no keys and values of float8_e4m3fn") in choice.rejected


def test_the_engine_runs_on_it(tiny_checkpoint: Path) -> None:
    settings = dict(dtype="float32", num_kv_blocks=64, block_size=8, max_model_len=96)
    jobs = [Job("x", list(range(5, 40)), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))]
    results, _ = run_engine(tiny_checkpoint, jobs, kv_cache_dtype="fp8", **settings)
    model = load_ours(tiny_checkpoint)
    for cache in kv_caches(model):
        cache.dtype = FP8  # type: ignore[attr-defined]
    runner, tokens = PagedRunner(model), []
    fresh = jobs[0].prompt
    while len(tokens) < 12:
        tokens.append(int(runner.step(("x", fresh))[0][-1].argmax()))
        fresh = tokens[-1:]
    assert results["x"].token_ids == tokens
    facts = explain(EngineConfig(model=str(tiny_checkpoint), kv_cache_dtype="fp8"))
    assert (
        facts["memory"][0]["bytes_per_token"] * 4
        == explain(EngineConfig(model=str(tiny_checkpoint)))["memory"][0]["bytes_per_token"]
    )


def test_scales_of_the_checkpoint_go_where_the_cache_is() -> None:
    """They are read on the CPU. Those that the checkpoint has only of keys leave values at 1."""
    cache = KVCache(2, 16, torch.float8_e4m3fn)
    cache.k_scale = torch.tensor([0.5, 2.0])
    cache.allocate(2, 16, torch.device("meta"))
    assert cache.k_scale is not None and cache.v_scale is not None
    assert {part.device.type for part in (*cache.tensors, cache.k_scale, cache.v_scale)} == {"meta"}
    cache.k_scale, cache.v_scale = torch.tensor([0.5, 2.0]), None
    cache.allocate(2, 16, torch.device("cpu"))
    assert cache.scales is not None and [part.tolist() for part in cache.scales] == [[0.5, 2.0], [1.0, 1.0]]
