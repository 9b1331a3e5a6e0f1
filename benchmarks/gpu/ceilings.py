"""What the device can do at most: the rates that shares are of. And how device time is measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

CUDA = torch.device("cuda")


def median_seconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median seconds of one run by events, after warm-up; what the host takes to launch counts where it is longer."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def measure() -> dict[str, float]:
    """Bytes read plus written per second by a large copy, and FLOP/s of large products of random data."""
    found = {"copy_bytes_per_s": 2 * 2 * (1 << 30) / _copy_seconds(1 << 30)}
    a, b = (torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    found["bfloat16"] = 2 * 8192**3 / median_seconds(lambda: a @ b)
    if torch.cuda.get_device_capability() >= (8, 9):
        x, y = (part.to(torch.float8_e4m3fn) for part in (a, b))
        ones = torch.ones((8192, 1), device=CUDA)

        def product() -> torch.Tensor:
            return torch._scaled_mm(x, y.t(), ones, ones.t(), out_dtype=torch.bfloat16, use_fast_accum=True)

        found["float8"] = 2 * 8192**3 / median_seconds(product)
    return found


def _copy_seconds(count: int) -> float:
    """Of so many bfloat16 numbers."""
    source = torch.randn(count, device=CUDA, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source))
