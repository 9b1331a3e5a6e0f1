"""Tiles of prompts' attention (skyline.kernels.triton.attention.prefill_tactic), timed one by one."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch

from gpu.ceilings import median_seconds

# Rows of queries and keys a tile, warps, stages; the first is chosen where there are few tiles.
TACTICS = [(128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3), (128, 128, 8, 2), (128, 32, 8, 4), (64, 64, 4, 3),
           (64, 128, 4, 2), (64, 64, 4, 2), (256, 64, 8, 2)]  # fmt: skip
# Query heads, KV heads, tokens of a prompt: Llama-3.1-8B's, and Qwen3-30B-A3B's.
SHAPES = [(32, 8, 8192), (32, 8, 1024), (32, 4, 8192)]
_SIZE, _BLOCK = 128, 16


def measure() -> list[dict[str, Any]]:
    """A row a shape: microseconds with each tile."""
    jobs = [(shape, tactic) for shape in SHAPES for tactic in TACTICS]
    processes = max(1, (os.cpu_count() or 2) - 1)
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        pool.starmap(_compile, jobs, chunksize=1)
    rows = []
    for shape in SHAPES:
        row: dict[str, Any] = {"heads": shape[0], "kv_heads": shape[1], "tokens": shape[2], "us": {}}
        for tactic in TACTICS:
            name = "/".join(map(str, tactic))
            try:
                row["us"][name] = round(median_seconds(_call(shape, tactic, "cuda")) * 1e6, 1)
            except Exception as error:
                row["us"][name] = f"{type(error).__name__}: {str(error)[:100]}"
        rows.append(row)
    return rows


def _compile(shape: tuple[int, int, int], tactic: tuple[int, int, int, int]) -> None:
    """In a process without a GPU: fills Triton's cache."""
    from tests.kernels.triton.offline import install

    install(90)
    _call(shape, tactic, "cpu")()


def _call(shape: tuple[int, int, int], tactic: tuple[int, int, int, int], device: str) -> Callable[[], torch.Tensor]:
    from skyline.kernels.triton import attention
    from skyline.ops import AttentionBatch, KVCache

    heads, kv_heads, tokens = shape
    place, blocks = torch.device(device), -(-tokens // _BLOCK)
    cache = KVCache(kv_heads, _SIZE, torch.bfloat16)
    cache.allocate(blocks, _BLOCK, place)
    for part in cache.tensors:
        part.normal_()
    order = torch.randperm(blocks).view(1, blocks).tolist()
    batch = AttentionBatch.build(order, [0], [tokens], _BLOCK, place)
    q = torch.randn((tokens, heads * _SIZE), dtype=torch.bfloat16, device=place)

    def run() -> torch.Tensor:
        chosen = attention.prefill_tactic
        attention.prefill_tactic = lambda *_: attention.Tactic(*tactic)
        try:
            return attention.paged_attention(q, cache, batch, _SIZE**-0.5)
        finally:
            attention.prefill_tactic = chosen

    return run
