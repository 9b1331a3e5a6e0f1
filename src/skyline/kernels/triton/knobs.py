"""What can be turned on kernels of decode steps, beyond what shapes tell: measured on whole steps, by `skyline tune`.

A decode step is a chain of short launches, each of which begins while the one before it ends. What is the fastest for a
kernel alone need not be so in the chain, so settings are compared on recorded steps (skyline.runner.tune_gpu).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec


class Knobs(msgspec.Struct, frozen=True):
    """The defaults go by what was timed of Llama-3.1-8B on an H200, which was not every one (docs/gpu.md).

    vector, gated: rows of a weight and columns a tile, and warps, of products of one row of x; gated: with silu_mul.
    fp8_vector, fp8_normed, fp8_gated: of such products of FP8, plain, behind a norm, with silu_mul. bands: rows,
    columns, warps and stages of FP8 products of few rows. prefetch: columns of its weight's rows that a program of a
    product asks for, into the second-level cache, while it waits for the launch before it. early_scales: whether
    attention writes FP8 also for weights that have scales by rows. splits: programs a multiprocessor that attention is
    cut into. keys: of a tile of it. stages: of its pipeline.
    """

    vector: tuple[int, int, int] = (4, 512, 4)
    gated: tuple[int, int, int] = (4, 1024, 4)
    fp8_vector: tuple[int, int, int] = (8, 2048, 4)
    fp8_normed: tuple[int, int, int] = (8, 1024, 2)
    fp8_gated: tuple[int, int, int] = (2, 1024, 2)
    bands: tuple[int, int, int, int] = (64, 256, 4, 5)
    prefetch: int = 0
    early_scales: bool = False
    splits: int = 2
    keys: int = 64
    stages: int = 3


# What each is tried with, the default first.
CANDIDATES: dict[str, tuple[object, ...]] = {
    "prefetch": (0, 4096),
    "splits": (2, 4, 8),
    "stages": (3, 5),
    "keys": (64, 32, 128),
    "vector": ((4, 512, 4), (2, 1024, 4), (2, 2048, 4), (8, 512, 8), (2, 4096, 4)),
    "gated": ((4, 1024, 4), (4, 512, 4), (2, 1024, 4), (2, 2048, 4)),
    "fp8_vector": ((8, 2048, 4), (4, 2048, 1), (4, 1024, 1)),
    "fp8_normed": ((8, 1024, 2), (4, 1024, 1), (4, 2048, 4)),
    "fp8_gated": ((2, 1024, 2), (2, 1024, 1), (4, 2048, 4)),
    "early_scales": (False, True),
    "bands": ((64, 256, 4, 5), (64, 256, 4, 4), (64, 512, 4, 3), (128, 256, 8, 3), (64, 128, 4, 5)),
}

_current = Knobs()


def current() -> Knobs:
    return _current


@contextlib.contextmanager
def using(knobs: Knobs) -> Iterator[None]:
    """Until the end of the block; kernels read them when they are launched, or recorded."""
    global _current
    before, _current = _current, knobs
    try:
        yield
    finally:
        _current = before
