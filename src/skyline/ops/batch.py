"""What attention has to know about a step and about the memory it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True, eq=False)
class KVCache:
    """One layer's paged keys and values. The runner allocates the tensors once it knows how many blocks fit.

    k, v: [num_blocks, block_size, num_kv_heads, head_dim]
    """

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        # Not zeroed: on a CPU the pages are only committed as they are used. No kernel reads what was never written.
        shape = (num_blocks, block_size, self.num_kv_heads, self.head_dim)
        self.k = torch.empty(shape, dtype=self.dtype, device=device)
        self.v = torch.empty(shape, dtype=self.dtype, device=device)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.k is not None and self.v is not None, "KV cache used before it was allocated"
        return self.k, self.v

    def bytes_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


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
        block_tables: list[list[int]], starts: list[int], lengths: list[int], block_size: int, device: torch.device
    ) -> AttentionBatch:
        """From host numbers: request r computes tokens starts[r] .. starts[r] + lengths[r] of its context."""
        longest = max((len(table) for table in block_tables), default=0)
        tables = torch.tensor([table + [0] * (longest - len(table)) for table in block_tables], dtype=torch.int32)
        tables = tables.view(len(block_tables), longest)
        lens = torch.tensor(lengths, dtype=torch.int64)
        query_starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        query_starts[1:] = lens.cumsum(0)
        rows = torch.repeat_interleave(torch.arange(len(lengths)), lens)
        first = torch.tensor(starts, dtype=torch.int64)
        positions = torch.arange(len(rows)) - query_starts[:-1].long()[rows] + first[rows]
        blocks = tables[rows, positions // block_size].long() if len(rows) else torch.zeros(0, dtype=torch.int64)
        return AttentionBatch(
            slot_mapping=(blocks * block_size + positions % block_size).to(device, non_blocking=True),
            block_tables=tables.to(device, non_blocking=True),
            query_starts=query_starts.to(device, non_blocking=True),
            context_lens=(first + lens).to(torch.int32).to(device, non_blocking=True),
            host_query_lens=list(lengths),
            host_context_lens=[start + length for start, length in zip(starts, lengths, strict=True)],
        )
