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

    vector, gated            products of one row of x: rows of the weight and columns a tile, warps; gated: silu_mul
    fp8_vector, fp8_normed,  the same of FP8: plain, behind a norm, with silu_mul
    fp8_gated
    words, words_gated,      the same of four bits: plain, with silu_mul, and one token's experts on their way down
    words_down
    bands                    FP8 products of few rows: rows and columns, warps, stages
    early_scales             whether attention writes FP8 also for weights with scales by rows
    splits, keys, stages     attention: programs a multiprocessor, keys of a tile, stages of its pipeline
    experts_rows, _band,     tiles of experts' rows (skyline.kernels.triton.moe_tiles), where not 0
    _warps, _stages
    experts_stream           one token's experts: rows of gate and up, and of down, that are streamed together, stages
    experts_fp8              the same of FP8: such rows, columns, warps
    """

    vector: tuple[int, int, int] = (2, 1024, 4)
    gated: tuple[int, int, int] = (4, 1024, 4)
    fp8_vector: tuple[int, int, int] = (8, 2048, 4)
    fp8_normed: tuple[int, int, int] = (8, 1024, 2)
    fp8_gated: tuple[int, int, int] = (2, 1024, 2)
    words: tuple[int, int, int] = (4, 1024, 1)
    words_gated: tuple[int, int, int] = (4, 1024, 2)
    words_down: tuple[int, int, int] = (8, 1024, 2)
    bands: tuple[int, int, int, int] = (64, 256, 4, 5)
    early_scales: bool = False
    splits: int = 2
    keys: int = 64
    stages: int = 3
    experts_rows: int = 0
    experts_band: int = 0
    experts_warps: int = 0
    experts_stages: int = 0
    experts_stream: tuple[int, int, int] = (4, 2, 4)
    experts_fp8: tuple[int, int, int, int] = (2, 8, 1024, 2)


# What each is tried with, the default first.
CANDIDATES: dict[str, tuple[object, ...]] = {
    "splits": (2, 4, 8),
    "stages": (3, 5),
    "keys": (64, 32, 128),
    "vector": ((2, 1024, 4), (4, 512, 4), (8, 512, 8), (2, 2048, 4)),
    "gated": ((4, 1024, 4), (4, 512, 4), (2, 1024, 4), (2, 2048, 4)),
    "fp8_vector": ((8, 2048, 4), (4, 2048, 4), (4, 2048, 1)),
    "fp8_normed": ((8, 1024, 2), (4, 1024, 2), (4, 1024, 1)),
    "fp8_gated": ((2, 1024, 2), (4, 1024, 2), (4, 2048, 4)),
    "words": ((4, 1024, 1), (4, 1024, 2), (8, 1024, 2)),
    "words_gated": ((4, 1024, 2), (2, 1024, 1), (4, 1024, 1)),
    "words_down": ((8, 1024, 2), (4, 1024, 2), (16, 1024, 4)),
    "early_scales": (False, True),
    "experts_rows": (0, 16, 32, 64, 128),
    "experts_band": (0, 32, 64, 128, 256),
    "experts_warps": (0, 4, 8),
    "experts_stages": (0, 3, 5, 6),
    "experts_stream": ((4, 2, 4), (2, 1, 4), (8, 2, 4), (8, 4, 3), (4, 2, 6)),
    "experts_fp8": ((2, 8, 1024, 2), (4, 8, 1024, 4), (2, 4, 2048, 4), (4, 4, 1024, 2), (1, 4, 1024, 1)),
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
