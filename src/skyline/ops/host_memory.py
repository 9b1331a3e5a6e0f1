"""Memory on the host for what is large: weights and the KV cache.

Both are best on huge pages: a step reads all of the weights, and each small page of them takes a walk through the page
tables, in a virtual machine through two: 3 to 5 % of the time on Zen 3 (benchmarks/huge_pages.py). Where huge pages are
given only on request (`madvise`, the default of most distributions), they are requested here. But one that is written
for the first time has to be found, and memory compacted for it, which makes filling several times as slow. So weights
are filled in small pages, and exchanged for huge ones while the engine runs already.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
import time
from collections.abc import Sequence

import torch

HUGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25  # Linux 6.1; Python 3.11 has no name for it
_PIECE = 8 * HUGE_PAGE
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

# Memory that waits for huge pages: the mapping, which keeps it alive, its first byte and its length.
_waiting: list[tuple[mmap.mmap, int, int]] = []


def reserve(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor that is filled little by little: on the CPU zeros on huge pages, elsewhere not initialized."""
    if device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return _zeros(shape, dtype, at_once=True)


def reserve_weight(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """A tensor that is about to be filled as a whole: on the CPU zeros, which `use_huge_pages` moves to huge pages."""
    if device is not None and device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return _zeros(shape, dtype, at_once=False)


def _zeros(shape: Sequence[int], dtype: torch.dtype, at_once: bool) -> torch.Tensor:
    """Zeros on the CPU, beginning on a huge page. The system gives their memory when it is first written."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < HUGE_PAGE:
        return torch.zeros(tuple(shape), dtype=dtype)
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    offset = -first % HUGE_PAGE
    whole = nbytes // HUGE_PAGE * HUGE_PAGE
    if at_once:
        with contextlib.suppress(OSError, AttributeError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, offset, whole)
    else:
        _waiting.append((memory, first + offset, whole))
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).view(tuple(shape))


def use_huge_pages(share: float = 0.5) -> int:
    """Move all weights to huge pages, in pieces, for that share of the time; returns how many bytes were moved.

    About half a second a gigabyte of work; anyone may read the weights meanwhile. Kernels older than Linux 6.1 are
    asked to do it when they see fit.
    """
    moved = 0
    while _waiting:
        memory, first, length = _waiting.pop()
        for start in range(0, length, _PIECE):
            began = time.perf_counter()
            if not _collapse(first + start, min(_PIECE, length - start)):
                with contextlib.suppress(OSError, AttributeError, ValueError):
                    memory.madvise(mmap.MADV_HUGEPAGE, first - _address(memory), length)
                break
            moved += min(_PIECE, length - start)
            time.sleep((time.perf_counter() - began) * (1 - share) / share)
    return moved


def _collapse(address: int, length: int) -> bool:
    if _LIBC is None:
        return False
    return bool(_LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_COLLAPSE) == 0)


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
