"""What attention has to know about a step: whose tokens these are, and where they lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skyline.ops.caches import LayerCache


@dataclass(slots=True, eq=False)
class BlockTables:
    """Where the tokens of a step lie in the caches of one group. T tokens of R requests.

    Token t goes to flat position slot_mapping[t] = block * block_size + offset.
    """

    slot_mapping: torch.Tensor  # [T] int64
    block_tables: torch.Tensor  # [R, longest table] int32, padded with 0

    @staticmethod
    def build(
        tables: NDArray[np.int32],
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],
        block_size: int,
        device: torch.device,
    ) -> BlockTables:
        """tables [R, longest], which must not change later; each token's row and position as in `token_positions`."""
        blocks = tables[rows, positions // block_size].astype(np.int64)
        slots = blocks * block_size + positions % block_size
        return BlockTables(to_device(slots, device), to_device(tables, device))


@dataclass(slots=True, eq=False)
class AttentionBatch:
    """The requests of one step, in the order of their tokens. T tokens of R requests.

    Request r owns tokens query_starts[r] to query_starts[r + 1]; they are the last of its context_lens[r] tokens.
    """

    tables: tuple[BlockTables, ...]  # by group of caches; one alone serves them all
    query_starts: torch.Tensor  # [R + 1] int32
    context_lens: torch.Tensor  # [R] int32, counting this step's tokens
    # The same numbers on the host, so that a provider that loops over requests needs no synchronisation.
    host_query_lens: list[int]
    host_context_lens: list[int]
    # Of each request, the block that holds its recurrent state before this step (-1: none, it begins), and after it.
    state_reads: list[int]
    state_writes: list[int]
    # The two on the device, [2, R] int32; a write to -1 is none. Made of the lists when first asked for, unless given.
    state_blocks: torch.Tensor | None = None
    # The numbers on the host are those of no step: what is computed may be recorded, and goes by the device's only.
    device_only: bool = False

    def device_states(self) -> torch.Tensor:
        """`state_blocks`, for kernels that do not go by the host's lists."""
        if self.state_blocks is None:
            host = np.array([self.state_reads, self.state_writes], np.int32)
            self.state_blocks = to_device(host, self.context_lens.device)
        return self.state_blocks

    def of(self, cache: LayerCache) -> BlockTables:
        """The tables that a cache goes by."""
        return self.tables[cache.group] if len(self.tables) > 1 else self.tables[0]

    @staticmethod
    def build(
        block_tables: Sequence[Sequence[int]] | NDArray[np.int32] | Sequence[NDArray[np.int32]],
        starts: list[int],
        lengths: list[int],
        block_size: int,
        device: torch.device,
        states: tuple[list[int], list[int]] | None = None,
    ) -> AttentionBatch:
        """From host numbers: request r computes tokens starts[r] .. starts[r] + lengths[r] of its context.

        block_tables: a table a request; or all of them padded into one array [R, longest], which must not change later;
        or such an array for each group. states: `state_reads` and `state_writes`; by default a request's state is kept
        in the block of that number which is its first.
        """
        if isinstance(block_tables, np.ndarray):
            arrays = [block_tables]
        elif len(block_tables) and isinstance(block_tables[0], np.ndarray):
            arrays = [table for table in block_tables if isinstance(table, np.ndarray)]
        else:
            arrays = [_padded([list(table) for table in block_tables])]
        rows, positions = token_positions(starts, lengths)
        query_starts = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=query_starts[1:])
        context_lens = [start + length for start, length in zip(starts, lengths, strict=True)]
        if states is None:
            first = [int(table[0]) for table in arrays[0]] if arrays[0].size else [0] * len(starts)
            states = ([block if start else -1 for block, start in zip(first, starts, strict=True)], first)
        return AttentionBatch(
            tables=tuple(BlockTables.build(array, rows, positions, block_size, device) for array in arrays),
            query_starts=to_device(query_starts, device),
            context_lens=to_device(np.array(context_lens, np.int32), device),
            host_query_lens=list(lengths),
            host_context_lens=context_lens,
            state_reads=states[0],
            state_writes=states[1],
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
