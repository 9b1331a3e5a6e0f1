"""Memory on the host for what is large: weights and the KV cache."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch

HUGE_PAGE = 2 << 20


def reserve(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor that is about to be filled: on the CPU as `host_zeros`, elsewhere not initialized."""
    return host_zeros(shape, dtype) if device.type == "cpu" else torch.empty(tuple(shape), dtype=dtype, device=device)


def host_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU. The system gives their memory when it is first written, in huge pages if it has them.

    A step reads all of the weights, and each small page of them takes a walk through the page tables, in a virtual
    machine through two: 3 to 5 % of the time on Zen 3 (benchmarks/huge_pages.py).
    Where huge pages are given only on request (`madvise`, the default of most distributions), this requests them.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < HUGE_PAGE:
        return torch.zeros(tuple(shape), dtype=dtype)
    # Beginning on a huge page, so that as much as possible consists of whole ones.
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE
    with contextlib.suppress(OSError, AttributeError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, offset, nbytes // HUGE_PAGE * HUGE_PAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).view(tuple(shape))
