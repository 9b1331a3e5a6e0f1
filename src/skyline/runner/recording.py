"""Device work recorded into a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

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
    try:
        # Another thread may allocate or synchronise meanwhile: only this thread's calls count.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = run()
    except BaseException:
        torch.cuda.set_stream(stream)  # where ending a recording raises, torch stays on the recording's
        raise
    return Recording(graph, result)
