"""Device work recorded into a CUDA graph."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(slots=True)
class Recording(Generic[T]):
    """`result` is what the work returned: its tensors hold what the last replay computed."""

    graph: torch.cuda.CUDAGraph
    result: T


def record(run: Callable[[], T], pool: Any = None) -> Recording[T]:
    """Record what `run` launches, without computing it. pool: of an earlier recording, whose memory it may share.

    Raises what `run` or CUDA raises; torch is then on the stream that it was on before.
    """
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    pool = pool or torch.cuda.graph_pool_handle()
    try:
        # Another thread may allocate or synchronise meanwhile: only this thread's calls count.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = run()
    except BaseException:
        torch.cuda.set_stream(stream)  # where ending a recording raises, torch stays on the recording's
        _give_up(pool)
        raise
    return Recording(graph, result)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The same one each time: cuBLAS keeps memory for each that it has seen, and so does torch's allocator."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def recording_stream(device: torch.device) -> Iterator[None]:
    """For many calls of `record_part`, one after the other; waits for the device once."""
    before = torch.cuda.current_stream(device)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_stream(_stream(device))
        yield
    finally:
        torch.cuda.set_stream(before)


def record_part(run: Callable[[], T], pool: Any = None) -> Recording[T]:
    """`record`, in a `recording_stream`: without waiting, or giving memory back, each time."""
    graph = torch.cuda.CUDAGraph()
    pool = pool or torch.cuda.graph_pool_handle()
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = run()
        finally:
            graph.capture_end()
    except BaseException:
        _give_up(pool)
        raise
    return Recording(graph, result)


def _give_up(pool: Any) -> None:
    """After a recording that CUDA ended: torch's allocator still believes in it, and would neither record another nor
    ever give the memory back. Where torch has seen its end, that refuses, and nothing is left to do."""
    with suppress(Exception):
        index = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)


class _Memory:
    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}


def borrowed(tensor: Tensor) -> Tensor:
    """The same memory, which this does not keep from being given to somebody else: of a recording, to its next call."""
    if not tensor.is_cuda or not tensor.numel():
        return tensor
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = _Memory(tensor.data_ptr(), (last + 1) * tensor.element_size())
    return torch.as_tensor(memory, device=tensor.device).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def replay_seconds(graph: Any, repeats: int, together: int = 1) -> float:
    """Median seconds of a replay, of so many in a row, after two to warm up."""
    times: list[float] = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(together):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / together)
    return statistics.median(times[2:])
