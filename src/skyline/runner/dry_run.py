"""The memory of a step's activations, measured: kernels make temporaries that the Program does not know of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from skyline.graph import Program
from skyline.ops import AttentionBatch, LayerCache

# Temporaries that grow with the context are bounded, and have reached their bounds by then.
_LONGEST = 32_768


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes at once of a step of as many tokens as there can be, of one in which as many requests decode, and of one of
    as many tokens as steps with prompts are recorded with."""

    largest: int
    decode: int
    prompts: int


def measure(
    program: Program,
    caches: Sequence[LayerCache],
    device: torch.device,
    *,
    tokens: int,
    recorded: int,
    requests: int,
    rows: int,
    max_model_len: int,
    block_size: int,
    peak: Callable[[Callable[[], object]], int] | None = None,
) -> Measured:
    """Compute these steps of a model that has its weights, but no caches yet; those are empty afterwards.

    tokens, recorded: of the first and of the last step. rows: of logits, of the first. peak: what tells the bytes that
    a call takes at once, by default CUDA's allocator. Raises torch.OutOfMemoryError.
    """
    context = min(max_model_len, _LONGEST)
    for cache in caches:  # of one block, which is all that the tables name
        cache.allocate(1, block_size, device)
        for part in cache.tensors:
            part.view(torch.uint8).zero_()

    def step(lengths: list[int], rows: int) -> None:
        blocks = [[0] * -(-context // block_size)] * len(lengths)
        batch = AttentionBatch.build(blocks, [context - length for length in lengths], lengths, block_size, device)
        ids = torch.zeros(sum(lengths), dtype=torch.int64, device=device)
        program(ids, ids, batch, torch.arange(rows, device=device) % len(ids))

    def lengths(tokens: int) -> list[int]:
        tokens = min(tokens, requests * context)
        return [context] * (tokens // context) + [tokens % context] * (tokens % context > 0)

    of = peak or (lambda run: _peak(run, device))
    with torch.inference_mode():
        found = Measured(
            of(lambda: step(lengths(tokens), rows)),
            of(lambda: step([1] * requests, requests)),
            of(lambda: step(lengths(recorded), 1)),
        )
    for cache in caches:
        cache.allocate(0, block_size, device)
    return found


def _peak(run: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
