"""How much memory there is, and how many KV blocks fit into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skyline.engine.config import EngineConfig
from skyline.graph import Call, Program
from skyline.ops import KVCache, LatentCache, LayerCache

# What the allocator, the sampler's temporaries and the libraries need beside the activations that can be counted.
RESERVE_BYTES = 256 << 20
_CPU_FRACTION = 0.5  # other programs live on the same memory
_GPU_FRACTION = 0.9
_CGROUP = Path("/sys/fs/cgroup")


class OutOfMemoryError(RuntimeError):
    """The model, or one request of it, does not fit; the message says by how much and what to change."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    num_blocks: int
    max_model_len: int
    kv_bytes: int
    activation_bytes: int
    available_bytes: int
    note: str = ""


def available_bytes(device: torch.device) -> int:
    """Bytes a new allocation can take: on a CPU also within the limits of the control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
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


def set_kv_dtype(config: EngineConfig, caches: list[LayerCache]) -> None:
    """Before caches are measured and allocated. Raises ValueError for kinds of memory that have no such form."""
    if config.kv_cache_dtype == "int8":
        for cache in caches:
            if isinstance(cache, KVCache):
                cache.dtype = torch.int8
            elif isinstance(cache, LatentCache):
                raise ValueError("kv_cache_dtype int8 is for keys and values; this model's memory of latents has none")


def plan_memory(
    config: EngineConfig, model_max_len: int, caches: list[LayerCache], activation_bytes: int, available: int
) -> MemoryPlan:
    """How many blocks to allocate, and how long a request may be. Raises OutOfMemoryError if nothing useful fits."""
    device = torch.device(config.device)
    block_bytes = sum(cache.bytes_per_token() for cache in caches) * config.block_size
    wanted_len = config.max_model_len or model_max_len
    per_request = -(-wanted_len // config.block_size)
    useful = per_request * config.max_num_seqs  # more could never be held at once

    if config.num_kv_blocks is not None:
        blocks = config.num_kv_blocks
        if blocks * block_bytes > available:
            raise OutOfMemoryError(
                f"{blocks} KV blocks take {_mib(blocks * block_bytes)}, but only {_mib(available)} are available"
            )
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
        blocks = min(useful, max(budget, 0) // block_bytes)

    note = ""
    if blocks < per_request:
        if config.max_model_len is not None or blocks == 0:
            raise OutOfMemoryError(
                f"a request of {wanted_len} tokens needs {_mib(per_request * block_bytes)} of KV cache, but "
                f"{_mib(blocks * block_bytes)} fit ({_mib(available)} available, {_mib(activation_bytes)} kept for "
                "activations): lower max_model_len or max_num_batched_tokens, or free memory"
            )
        wanted_len = blocks * config.block_size
        note = f"context reduced from {model_max_len} to {wanted_len} tokens to fit the memory"
    return MemoryPlan(blocks, wanted_len, blocks * block_bytes, activation_bytes, available, note)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
