"""How much memory there is, and how many KV blocks fit into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from skyline.engine.config import EngineConfig
from skyline.engine.kv_memory import KVGroup, blocks_for_one
from skyline.graph import Call, Program
from skyline.ops import IndexCache, KVCache, LatentCache, LayerCache, StateCache

# What the allocator, the sampler's temporaries and the libraries need beside the activations that can be counted.
RESERVE_BYTES = 256 << 20
_CPU_FRACTION = 0.5  # other programs live on the same memory
_GPU_FRACTION = 0.9
_TYPICAL_TOKENS = 2048  # of a request, for dividing memory between groups that keep more and less of it
_STATES_PER_REQUEST = 4  # one that it writes, and those of prefixes that others may go on from
KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_CGROUP = Path("/sys/fs/cgroup")


class OutOfMemoryError(RuntimeError):
    """The model, or one request of it, does not fit; the message says by how much and what to change."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    groups: tuple[KVGroup, ...]
    max_model_len: int
    kv_bytes: int
    activation_bytes: int
    available_bytes: int
    note: str = ""


@dataclass(slots=True)
class CacheGroup:
    """Caches that keep the same tokens for the same time, and so go by the same block tables."""

    group: KVGroup  # its num_blocks still to be decided
    caches: list[LayerCache]

    def block_bytes(self, block_size: int) -> int:
        return sum(cache.bytes_per_block(block_size) for cache in self.caches)


def group_caches(caches: list[LayerCache]) -> list[CacheGroup]:
    """Caches by what they keep, states last; each cache is told its group."""
    found: dict[tuple[bool, int | None], CacheGroup] = {}
    for cache in sorted(caches, key=lambda cache: isinstance(cache, StateCache)):
        state, window = isinstance(cache, StateCache), cache.window if isinstance(cache, KVCache) else None
        key = (state, window)
        if key not in found:
            found[key] = CacheGroup(KVGroup(0, window, state), [])
        cache.group = list(found).index(key)
        found[key].caches.append(cache)
    return list(found.values())


def available_bytes(device: torch.device) -> int:
    """Bytes a new allocation can take: on a CPU also within the limits of the control group."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    available = _meminfo("MemAvailable")
    for limit, usage in (
        (_CGROUP / "memory.max", _CGROUP / "memory.current"),
        (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
    ):
        try:
            # Usage counts the page cache, which gives way; after loading, the whole checkpoint is in there.
            left = int(limit.read_text()) - int(usage.read_text()) + _file_cache(usage.parent / "memory.stat")
        except (OSError, ValueError):  # no such file, or "max"
            continue
        available = min(available, max(left, 0))
    return available


def _file_cache(stat: Path) -> int:
    """Bytes of file pages in a control group; the first version of the format prefixes totals."""
    fields = dict(line.split() for line in stat.read_text().splitlines())
    prefix = "total_" if "total_active_file" in fields else ""
    return sum(int(fields.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))


def _meminfo(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value = line.split(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/meminfo has no {field}")


def peak_activation_bytes(program: Program, num_tokens: int, num_rows: int) -> int:
    """The most that activations occupy at once in a step of `num_tokens`: planned buffers, and what else is made."""
    live = peak = 0
    sizes: dict[int, int] = {}

    def visit(call: Call, arguments: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        nonlocal live, peak
        if not call.is_view and call.kernel.into is None:
            for slot, value in zip(call.results, results, strict=True):
                sizes[slot] = value.numel() * value.element_size()
                live += sizes[slot]
        peak = max(peak, live)
        live -= sum(sizes.pop(slot, 0) for slot in call.frees)

    program.trace_sizes(num_tokens, num_rows, visit)
    by_token, by_row = program.plan.row_bytes()
    return peak + by_token * num_tokens + by_row * num_rows


def set_kv_format(config: EngineConfig, caches: list[LayerCache]) -> None:
    """Before caches are measured and allocated. What is no attention's memory stays as it is."""
    dtype = KV_DTYPES.get(config.kv_cache_dtype)
    for cache in caches:
        if isinstance(cache, KVCache):
            cache.by_head = torch.device(config.device).type == "cpu"
            cache.dtype = dtype or cache.dtype
        elif isinstance(cache, LatentCache | IndexCache):
            cache.quantized = dtype or cache.quantized


def plan_memory(
    config: EngineConfig, model_max_len: int, groups: list[CacheGroup], activation_bytes: int, available: int
) -> MemoryPlan:
    """How many blocks of each group to allocate, and how long a request may be.

    Groups get room for the same number of requests of typical length, so that none of them runs out much earlier than
    the others. Raises OutOfMemoryError if nothing useful fits.
    """
    device = torch.device(config.device)
    size = config.block_size
    block_bytes = [group.block_bytes(size) for group in groups]
    wanted_len = config.max_model_len or model_max_len

    def least(length: int) -> list[int]:
        """Blocks of each group for one request of this length."""
        return [blocks_for_one(group.group, size, length, config.max_num_batched_tokens) for group in groups]

    def cost(counts: list[int]) -> int:
        return sum(count * nbytes for count, nbytes in zip(counts, block_bytes, strict=True))

    if config.num_kv_blocks is not None:
        # Of the first group; the others have enough for as many tokens.
        states = max(2, _STATES_PER_REQUEST * config.max_num_seqs)
        counts = [states if group.group.state else config.num_kv_blocks for group in groups]
        if cost(counts) > available:
            raise OutOfMemoryError(
                f"{config.num_kv_blocks} KV blocks take {_mib(cost(counts))}, but only {_mib(available)} are available"
            )
        budget = cost(counts)
    else:
        if config.kv_cache_memory is not None:
            budget = config.kv_cache_memory
            if budget > available:
                raise OutOfMemoryError(
                    f"a KV cache of {_mib(budget)} was asked for, but only {_mib(available)} are available"
                )
        else:
            fraction = config.memory_fraction or (_GPU_FRACTION if device.type == "cuda" else _CPU_FRACTION)
            budget = int(available * fraction) - activation_bytes - RESERVE_BYTES
        counts = _share(config, groups, block_bytes, least(wanted_len), wanted_len, budget)

    note = ""
    if any(count < one for count, one in zip(counts, least(wanted_len), strict=True)):
        fitting = _longest(least, cost, wanted_len, budget, size)
        if config.max_model_len is not None or fitting == 0:
            raise OutOfMemoryError(
                f"a request of {wanted_len} tokens needs {_mib(cost(least(wanted_len)))} of KV cache, but "
                f"{_mib(max(0, budget))} fit ({_mib(available)} available, {_mib(activation_bytes)} kept for "
                "activations): lower max_model_len or max_num_batched_tokens, or free memory"
            )
        wanted_len = fitting
        counts = [max(count, one) for count, one in zip(counts, least(fitting), strict=True)]
        if cost(counts) > budget:
            counts = least(fitting)
        note = f"context reduced from {model_max_len} to {wanted_len} tokens to fit the memory"
    planned = tuple(replace(g.group, num_blocks=count) for g, count in zip(groups, counts, strict=True))
    return MemoryPlan(planned, wanted_len, cost(counts), activation_bytes, available, note)


def _share(
    config: EngineConfig,
    groups: list[CacheGroup],
    block_bytes: list[int],
    least: list[int],
    longest: int,
    budget: int,
) -> list[int]:
    """Blocks by group: those of one longest request, and the rest of the budget for requests of typical length."""
    size = config.block_size
    typical = min(longest, _TYPICAL_TOKENS)
    each, most = [], []
    for group in groups:
        if group.group.state:
            each.append(_STATES_PER_REQUEST)
            most.append(_STATES_PER_REQUEST * config.max_num_seqs)
            continue
        kept = typical if group.group.window is None else min(typical, group.group.window + size)
        each.append(-(-kept // size))
        # More could never be held at once.
        most.append(least[len(most)] * config.max_num_seqs)
    spare = budget - sum(one * nbytes for one, nbytes in zip(least, block_bytes, strict=True))
    if spare < 0:
        return [0] * len(groups)
    counts = list(least)
    # What a group cannot use goes to the others.
    open_groups = set(range(len(groups)))
    while open_groups:
        unit = sum(each[index] * block_bytes[index] for index in open_groups)
        requests = spare / unit if unit else 0
        full = {index for index in open_groups if counts[index] + int(requests * each[index]) >= most[index]}
        for index in full or open_groups:
            more = min(int(requests * each[index]), most[index] - counts[index])
            counts[index] += more
            spare -= more * block_bytes[index]
        open_groups -= full or open_groups
    return counts


def _longest(
    least: Callable[[int], list[int]], cost: Callable[[list[int]], int], wanted: int, budget: int, size: int
) -> int:
    """The largest whole number of blocks' tokens whose one request fits into the budget; 0 if none does."""
    low, high = 0, wanted // size
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(least(middle * size)) <= budget else (low, middle - 1)
    return low * size


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
