"""What attention has to know about a step and about the memory it reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skyline.ops.host_memory import reserve


@dataclass(slots=True, eq=False)
class KVCache:
    """One layer's paged keys and values. The runner allocates the tensors once it knows how many blocks fit.

    k, v: [num_blocks, block_size, num_kv_heads, head_dim]; in int8 what is cached is k * k_scale and v * v_scale.
    k_scale, v_scale: [num_blocks, block_size, num_kv_heads] float32, only beside int8.
    """

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        # On a CPU the pages are only committed as they are used. No kernel reads what was never written.
        shape = (num_blocks, block_size, self.num_kv_heads, self.head_dim)
        self.k = reserve(shape, self.dtype, device)
        self.v = reserve(shape, self.dtype, device)
        if self.dtype == torch.int8:
            self.k_scale = reserve(shape[:3], torch.float32, device)
            self.v_scale = reserve(shape[:3], torch.float32, device)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v, as they are stored."""
        assert self.k is not None and self.v is not None, "KV cache used before it was allocated"
        return self.k, self.v

    @property
    def scales(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """k_scale and v_scale, or None if k and v are not quantized."""
        return None if self.k_scale is None or self.v_scale is None else (self.k_scale, self.v_scale)

    def bytes_per_token(self) -> int:
        scale = torch.float32.itemsize if self.dtype == torch.int8 else 0
        return 2 * self.num_kv_heads * (self.head_dim * self.dtype.itemsize + scale)


@dataclass(slots=True, eq=False)
class AttentionBatch:
    """The requests of one step, in the order of their tokens. T tokens of R requests.

    Request r owns tokens query_starts[r] to query_starts[r + 1]; they are the last of its context_lens[r] tokens.
    Token t's key and value go to flat position slot_mapping[t] = block * block_size + offset.
    """

    slot_mapping: torch.Tensor  # [T] int64
    block_tables: torch.Tensor  # [R, longest table] int32, padded with 0
    query_starts: torch.Tensor  # [R + 1] int32
    context_lens: torch.Tensor  # [R] int32, counting this step's tokens
    # The same numbers on the host, so that a provider that loops over requests needs no synchronisation.
    host_query_lens: list[int]
    host_context_lens: list[int]

    @staticmethod
    def build(
        block_tables: Sequence[Sequence[int]] | NDArray[np.int32],
        starts: list[int],
        lengths: list[int],
        block_size: int,
        device: torch.device,
    ) -> AttentionBatch:
        """From host numbers: request r computes tokens starts[r] .. starts[r] + lengths[r] of its context.

        block_tables: a table a request, or all of them padded into one array [R, longest], which must not change later.
        """
        tables = block_tables if isinstance(block_tables, np.ndarray) else _padded(block_tables)
        rows, positions = token_positions(starts, lengths)
        query_starts = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=query_starts[1:])
        context_lens = [start + length for start, length in zip(starts, lengths, strict=True)]
        blocks = tables[rows, positions // block_size].astype(np.int64)
        return AttentionBatch(
            slot_mapping=to_device(blocks * block_size + positions % block_size, device),
            block_tables=to_device(tables, device),
            query_starts=to_device(query_starts, device),
            context_lens=to_device(np.array(context_lens, np.int32), device),
            host_query_lens=list(lengths),
            host_context_lens=context_lens,
        )


def token_positions(starts: Sequence[int], lengths: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each token of a step its request's row, [T], and its position in that request's context, [T]."""
    counts = np.array(lengths, np.int64)
    rows = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    first_tokens = np.cumsum(counts, dtype=np.int64) - counts
    positions: NDArray[np.int64] = (
        np.arange(len(rows), dtype=np.int64) + (np.array(starts, np.int64) - first_tokens)[rows]
    )
    return rows, positions


def to_device(host: NDArray[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Queue the copy behind the device's work without waiting for that. On a CPU the memory is shared, not copied."""
    tensor = torch.from_numpy(host) if isinstance(host, np.ndarray) else host
    # Only from pinned memory does a copy not wait; torch keeps that memory until the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _padded(tables: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    padded = np.zeros((len(tables), max(map(len, tables), default=0)), np.int32)
    for row, table in enumerate(tables):
        padded[row, : len(table)] = table
    return padded
