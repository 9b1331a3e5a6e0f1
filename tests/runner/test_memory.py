"""What is available to the KV cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skyline.engine.config import EngineConfig
from skyline.engine.kv_memory import blocks_for_one
from skyline.ops import KVCache, LayerCache, StateCache
from skyline.runner import memory


@pytest.mark.parametrize(
    "limit,usage,prefix", [("memory.max", "memory.current", ""), ("limit_in_bytes", "usage_in_bytes", "total_")]
)
def test_page_cache_of_a_container_is_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, usage: str, prefix: str
) -> None:
    """The kernel charges the checkpoint's cached pages to the control group, but takes them back when asked."""
    folder = tmp_path
    if prefix:
        folder = tmp_path / "memory"
        folder.mkdir()
        limit, usage = f"memory.{limit}", f"memory.{usage}"
    (folder / limit).write_text("1000\n")
    (folder / usage).write_text("900\n")
    (folder / "memory.stat").write_text(f"anon 300\n{prefix}active_file 200\n{prefix}inactive_file 350\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_bytes(torch.device("cpu")) == 650


def _groups() -> list[memory.CacheGroup]:
    caches: list[LayerCache] = [KVCache(2, 16, torch.float32) for _ in range(2)]
    caches += [KVCache(2, 16, torch.float32, window=32) for _ in range(4)]
    caches += [StateCache(3, 64, 4, 8, 8, torch.float32)]
    return memory.group_caches(caches)


def test_caches_that_keep_the_same_share_a_group() -> None:
    full, window, state = _groups()
    assert [len(group.caches) for group in (full, window, state)] == [2, 4, 1]
    assert (full.group.window, window.group.window, state.group.state) == (None, 32, True)
    assert [cache.group for group in (full, window, state) for cache in group.caches] == [0, 0, 1, 1, 1, 1, 2]
    assert full.block_bytes(16) == 2 * 2 * 2 * 16 * 4 * 16 and state.block_bytes(16) == (3 * 64 + 4 * 8 * 8) * 4


def test_a_head_lies_together_on_cpus_alone() -> None:
    """GPU kernels read all heads of a token together."""
    for device in ("cpu", "cuda"):
        cache = KVCache(2, 16, torch.float32)
        memory.set_kv_format(EngineConfig(model="", device=device, kv_cache_dtype="int8"), [cache])
        assert cache.by_head == (device == "cpu") and cache.dtype == torch.int8
    with pytest.raises(AssertionError, match="GPU kernels"):
        KVCache(2, 16, torch.float32, by_head=True).allocate(1, 16, torch.device("cuda"))


@pytest.mark.parametrize("budget", [1 << 20, 3 << 20, 64 << 20, 1 << 32])
@pytest.mark.parametrize("longest", [64, 1000, 20_000])
def test_memory_is_shared_between_groups(budget: int, longest: int) -> None:
    """Nothing is exceeded, one request always fits, and no group starves while another has plenty."""
    config = EngineConfig(model="", kv_cache_memory=budget, max_num_seqs=8, max_num_batched_tokens=64)
    groups = _groups()
    plan = memory.plan_memory(config, longest, groups, 0, 1 << 40)
    assert plan.kv_bytes <= budget
    for group in plan.groups:
        assert group.num_blocks >= blocks_for_one(group, 16, plan.max_model_len, 64)
    assert (plan.max_model_len < longest) == bool(plan.note)
    full, window, state = (group.num_blocks for group in plan.groups)
    if not plan.note:
        # As many requests of typical length find room in each, unless it has all that could ever be used.
        typical = min(longest, 2048)
        runs = full * 16 / typical
        assert window * 16 / min(typical, 48) > 0.5 * min(runs, 8) and state >= min(runs, 8)
    if budget == 1 << 32:
        assert full == 8 * -(-longest // 16), "more could never be held"


def test_too_little_memory_is_refused_with_figures() -> None:
    config = EngineConfig(model="", kv_cache_memory=1000)
    with pytest.raises(memory.OutOfMemoryError, match=r"needs .* MiB of KV cache"):
        memory.plan_memory(config, 4096, _groups(), 0, 1 << 40)
