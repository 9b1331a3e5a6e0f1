"""Memory on the host for what is large: weights and the KV cache.

Both are best on huge pages: a step reads all of the weights, and each small page of them takes a walk through the page
tables, in a virtual machine through two: 3 to 5 % of the time on Zen 3 (benchmarks/huge_pages.py). Where huge pages are
given only on request (`madvise`, the default of most distributions), they are requested here. But one that is written
for the first time has to be found, and memory compacted for it, which makes filling several times as slow. So weights
are filled in small pages, and exchanged for huge ones while the engine runs already. They lie one after the other, as a
matrix in int4 may be smaller than a huge page, and most of them are no whole number of huge pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
import threading
import time
import weakref
from collections.abc import Sequence

import torch

HUGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25  # Linux 6.1; Python 3.11 has no name for it
_PIECE = 8 * HUGE_PAGE
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

_TOGETHER = 256 << 20  # so much is reserved for weights at once; larger ones have memory of their own
_LINE = 64  # bytes: what weights begin on


class _Mapping:
    """Zeros, beginning on a huge page, of which `used` bytes are given away. The system gives them when first written.

    What is given away keeps the memory alive, nothing else does.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = weakref.ref(memory)
        start = _address(memory)
        self.offset = -start % HUGE_PAGE
        self.first = start + self.offset
        self.room = len(memory) - HUGE_PAGE
        self.used = 0

    @property
    def memory(self) -> mmap.mmap | None:
        return self._memory()

    def take(self, memory: mmap.mmap, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next bytes."""
        count = math.prod(shape)
        tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=self.offset + self.used)
        self.used += -(-count * dtype.itemsize // _LINE) * _LINE
        return tensor.view(tuple(shape))


def _map(nbytes: int) -> mmap.mmap:
    return mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


_lock = threading.Lock()
_waiting: list[_Mapping] = []  # for huge pages
_open: _Mapping | None = None  # one of them, where the next weight goes


def reserve(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor that is filled little by little: on the CPU zeros on huge pages, elsewhere not initialized."""
    if device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < HUGE_PAGE:
        return torch.zeros(tuple(shape), dtype=dtype)
    memory = _map(nbytes)
    mapping = _Mapping(memory)
    with contextlib.suppress(OSError, AttributeError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, mapping.offset, nbytes // HUGE_PAGE * HUGE_PAGE)
    return mapping.take(memory, shape, dtype)


def reserve_weight(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """A tensor that is about to be filled as a whole: on the CPU zeros, which `use_huge_pages` moves to huge pages."""
    global _open
    if device is not None and device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.zeros(tuple(shape), dtype=dtype)
    with _lock:
        if nbytes > _TOGETHER // 4:
            memory = _map(-(-nbytes // HUGE_PAGE) * HUGE_PAGE)
            _waiting.append(_Mapping(memory))
            return _waiting[-1].take(memory, shape, dtype)
        found = None if _open is None or _open.used + nbytes > _open.room else _open.memory
        if found is None or _open is None:
            found = _map(_TOGETHER)
            _open = _Mapping(found)
            _waiting.append(_open)
        return _open.take(found, shape, dtype)


def give_back(weight: torch.Tensor) -> None:
    """Free the memory of what `reserve_weight` returned, which is zeros then, but for pages that others lie on."""
    first = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (weight.data_ptr() + weight.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if _LIBC is not None and length > 0:
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def use_huge_pages(share: float = 0.5) -> int:
    """Move all weights to huge pages, in pieces, for that share of the time; returns how many bytes were moved.

    About half a second a gigabyte of work; anyone may read the weights meanwhile. Kernels older than Linux 6.1 are
    asked to do it when they see fit.
    """
    moved = 0
    while mapping := _next_waiting():
        memory = mapping.memory
        if memory is None:  # all of it has been freed
            continue
        length = -(-mapping.used // HUGE_PAGE) * HUGE_PAGE
        for start in range(0, length, _PIECE):
            began = time.perf_counter()
            if not _collapse(mapping.first + start, min(_PIECE, length - start)):  # or some of it was never written
                with contextlib.suppress(OSError, AttributeError, ValueError):
                    memory.madvise(mmap.MADV_HUGEPAGE, mapping.offset + start, min(_PIECE, length - start))
                continue
            moved += min(_PIECE, length - start)
            time.sleep((time.perf_counter() - began) * (1 - share) / share)
    return moved


def _next_waiting() -> _Mapping | None:
    """To which nothing is added any more."""
    global _open
    with _lock:
        mapping = _waiting.pop() if _waiting else None
        if mapping is _open:
            _open = None
        return mapping


def _collapse(address: int, length: int) -> bool:
    if _LIBC is None:
        return False
    return bool(_LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_COLLAPSE) == 0)


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
