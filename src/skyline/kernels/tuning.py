"""Which tactic a kernel uses for a weight and a number of rows: measured by `skyline tune`, kept on disk.

Tactics are ways to the same bits (Kernel.tactics). Without a measurement each kernel uses its default, so that nothing
has to be measured before a first token.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from skyline.checkpoint.cache import cache_folder
from skyline.kernels.cpu import isa, native
from skyline.kernels.cpu.build import library_path
from skyline.kernels.registry import Kernel

# Numbers of rows that are measured; others use the next larger one's choice, and more rows the largest one's.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Tunings(msgspec.Struct):
    """The fastest tactic by `place`, as a list of integers."""

    measured_on: str  # the machine and the kernels; anything else makes them worthless
    tactics: dict[str, tuple[int, ...]] = {}

    def into(self, kernel: Kernel, rows: int, weight: Any) -> Callable[..., None] | None:
        """`kernel.into` with the fastest tactic; None if that is the default, or was not measured."""
        if not self.tactics or kernel.tactics is None or kernel.into is None or getattr(weight, "layout", None) is None:
            return None
        chosen = self.tactics.get(place(kernel, rows, weight))
        default, *others = kernel.tactics(bucket(rows))
        tactic = next((other for other in others if tuple(other) == chosen), default)
        return None if tactic is default else functools.partial(kernel.into, tactic=tactic)


def bucket(rows: int) -> int:
    return next((size for size in ROWS if rows <= size), ROWS[-1])


def place(kernel: Kernel, rows: int, weight: Any) -> str:
    """What a measurement holds for: the op, the weight's layout and shape, and about how many rows."""
    shape = "x".join(map(str, weight.shape))
    return f"{kernel.op}, {weight.layout.name} {shape}, {bucket(rows)} rows"


def kept(threads: int | None) -> tuple[Path, Tunings]:
    """The file for so many threads of the CPU kernels, and what was measured with this CPU and these kernels."""
    instruction_set, count = native.available(), native.thread_count(threads)
    file = cache_folder() / f"tuning-{instruction_set}-{count}.json"
    nothing = Tunings(f"{isa.cpu_model()}, {library_path(instruction_set).stem}, {count} threads")
    try:
        found = msgspec.json.decode(file.read_bytes(), type=Tunings)
    except (OSError, msgspec.DecodeError):  # none yet, or of another version
        return file, nothing
    return file, found if found.measured_on == nothing.measured_on else nothing


def save(file: Path, tunings: msgspec.Struct) -> None:
    """As JSON, at once or not at all. Raises OSError if the folder cannot be written."""
    temporary = file.with_suffix(f".{os.getpid()}")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(tunings)))
        os.replace(temporary, file)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def fastest(seconds: dict[Any, list[float]], tactics: Iterable[Any], margin: float = 0.02) -> Any:
    """Of tactics with their times, the one with the least median; the first, unless another is better by the margin."""
    first, *others = tactics
    medians = {tactic: statistics.median(times) for tactic, times in seconds.items()}
    best = min(others, key=medians.__getitem__, default=first)
    return best if medians[best] < (1 - margin) * medians[first] else first
