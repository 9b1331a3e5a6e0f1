"""What this machine can do at most: its memory's bandwidth, and the peaks of its arithmetic (csrc/machine.cc).

A kernel is good if it comes close to one of them: the roofline model (Williams, Waterman and Patterson 2009,
doi:10.1145/1498765.1498785).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F

from skyline.checkpoint.cache import cache_folder
from skyline.kernels.cpu import native
from skyline.kernels.cpu.build import library_path
from skyline.kernels.cpu.isa import cpu_model
from skyline.kernels.cpu.packed import Format
from skyline.kernels.registry import Request, choose, finish_weight
from skyline.ops import OPS

_READ_BYTES = 512 << 20  # more than any cache
_SECONDS = 0.25  # for each figure; the best of its runs counts
_PRODUCTS = ((1024, 4096, 1024), (2048, 4096, 1024))  # rows, output columns, length of the sums
# Format -> the op that multiplies in it, and its code in csrc/packed.h.
_FORMATS = {
    "float32": ("linear", torch.float32, Format.FLOAT32),
    "bfloat16": ("linear", torch.bfloat16, Format.BFLOAT16),
    "int8": ("linear_int8", torch.bfloat16, Format.INT8),
    "int4": ("linear_int4", torch.bfloat16, Format.INT4),
}
_FMA = {"amx": "vfmadd, 512 bits", "avx512": "vfmadd, 512 bits", "avx2": "vfmadd, 256 bits"}
_INSTRUCTIONS = {
    "float32": _FMA,
    "bfloat16": {"amx": "tdpbf16ps", "avx512": "vdpbf16ps", "avx2": "vfmadd, 256 bits"},
    "int8": {"amx": "tdpbssd", "avx512": "vpdpbusd", "avx2": "vpmaddwd"},
    "int4": {"amx": "tdpbssd", "avx512": "vpdpbusd", "avx2": "vpmaddubsw"},
}


class Peak(msgspec.Struct, frozen=True):
    """Operations a second, a multiplication and an addition being two. None: not measured here."""

    instruction: str  # that products of this format are made of
    register: float | None  # its rate on all threads, with its operands in registers
    register_one_thread: float | None
    product: float | None  # the best large product of this library's kernel
    torch: float | None  # the best large product of torch

    @property
    def highest(self) -> float:
        """The limit for a roofline. Where torch alone computes, what it reached stands for what is possible."""
        return max(self.register or 0.0, self.product or 0.0, self.torch or 0.0)


class Machine(msgspec.Struct, frozen=True):
    """Measured limits. Bandwidths are of reading memory, in bytes a second."""

    cpu: str
    isa: str
    threads: int
    library: str  # that the figures were measured with
    bandwidth: float
    bandwidth_one_thread: float
    peaks: dict[str, Peak]  # by format: float32, bfloat16, int8, int4


def measure(threads: int | None = None) -> Machine:
    """Measure on an own thread, in about five seconds, and keep the figures in the cache folder."""
    isa = native.available()
    count = native.thread_count(threads)
    # The kernels' first thread gets pinned; torch's threads, started from there, would share its core. So torch
    # computes on a thread of its own.
    with ThreadPoolExecutor(1, "kernels") as kernels, ThreadPoolExecutor(1, "torch") as other:
        if isa != "none":
            kernels.submit(native.start_threads, count).result()
        try:
            reading = kernels if isa != "none" else other
            every, one = reading.submit(_bandwidths, isa, count).result()
            peaks = {}
            for name in _FORMATS:
                register: tuple[float | None, float | None] = (None, None)
                product = None
                if isa != "none":
                    register = kernels.submit(_register_peaks, name).result()
                    product = kernels.submit(_product_peak, name, isa).result()
                rival = None if name in ("int8", "int4") else other.submit(_torch_peak, name, count).result()
                instruction = _INSTRUCTIONS[name].get(isa, "")
                peaks[name] = Peak(instruction, *register, product, rival)
        finally:
            if isa != "none":
                kernels.submit(native.stop_threads).result()
    machine = Machine(cpu_model(), isa, count, _library(isa), every, one, peaks)
    _save(machine)
    return machine


def load_or_measure(threads: int | None = None) -> Machine:
    """The figures of an earlier measurement with this CPU, number of threads and library, if there is one."""
    isa = native.available()
    wanted = (cpu_model(), isa, native.thread_count(threads), _library(isa))
    for machine in _saved():
        if (machine.cpu, machine.isa, machine.threads, machine.library) == wanted:
            return machine
    return measure(threads)


def _bandwidths(isa: str, threads: int) -> tuple[float, float]:
    memory = torch.empty(_READ_BYTES // 8, dtype=torch.int64)
    if isa == "none":
        with _torch_threads(threads):
            memory.fill_(1)
            every = _best(lambda: memory.sum().item() and _READ_BYTES)
        with _torch_threads(1):
            return every, _best(lambda: memory.sum().item() and _READ_BYTES)
    functions = native.library()
    functions.machine_fill(memory)

    def read(all_threads: bool) -> float:
        if functions.machine_read(memory, all_threads) != len(memory):
            raise RuntimeError("the sum of the memory that was read is wrong")
        return _READ_BYTES

    with native.step():
        return _best(lambda: read(True)), _best(lambda: read(False))


def _register_peaks(name: str) -> tuple[float, float]:
    code, functions = int(_FORMATS[name][2]), native.library()
    turns = 1000
    while _seconds(lambda: functions.machine_compute(code, turns, False)) < 5e-3:  # noqa: B023
        turns *= 2
    with native.step():
        every = _best(lambda: functions.machine_compute(code, turns, True), _SECONDS / 2)
    return every, _best(lambda: functions.machine_compute(code, turns, False), _SECONDS / 2)


def _product_peak(name: str, isa: str) -> float:
    op, dtype, _ = _FORMATS[name]
    kernel = choose(Request(OPS[op], "cpu", dtype, isa=isa)).kernel
    best = 0.0
    for rows, columns, length in _PRODUCTS:
        x, weight = torch.randn(rows, length).to(dtype), torch.randn(columns, length).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        layout = kernel.layouts[1]
        if callable(layout):
            layout = layout((x, weight))
        packed = layout.allocate((columns, length), dtype)
        layout.write(packed, 0, weight)
        finish_weight(layout, packed)
        into = kernel.into
        assert into is not None
        work = 2 * rows * columns * length
        with native.step():
            best = max(best, _best(lambda: into(out, x, packed) or work))  # noqa: B023
    return best


def _torch_peak(name: str, threads: int) -> float:
    dtype = _FORMATS[name][1]
    best = 0.0
    with _torch_threads(threads), torch.inference_mode():
        for rows, columns, length in _PRODUCTS:
            x, weight = torch.randn(rows, length).to(dtype), torch.randn(columns, length).to(dtype)
            work = 2 * rows * columns * length
            best = max(best, _best(lambda: F.linear(x, weight) is not None and work))  # noqa: B023
    return best


def _best(run: Callable[[], float], seconds: float = _SECONDS) -> float:
    """The highest rate of several runs. `run` returns the work that it did."""
    best, until = 0.0, time.perf_counter() + seconds
    for done in range(1000):
        began = time.perf_counter()
        if done > 2 and began > until:
            break
        work = run()
        best = max(best, float(work) / (time.perf_counter() - began))
    return best


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _library(isa: str) -> str:
    return f"torch {torch.__version__}" if isa == "none" else library_path(isa).stem


def _file() -> Path:
    return cache_folder() / "machine.json"


def _saved() -> list[Machine]:
    try:
        return msgspec.json.decode(_file().read_bytes(), type=list[Machine])
    except (OSError, msgspec.DecodeError):  # none yet, or of another version
        return []


def _save(machine: Machine) -> None:
    """Beside those of other instruction sets and thread counts; a new library makes the old ones' figures stale."""

    def place(other: Machine) -> tuple[str, str, int]:
        return other.cpu, other.isa, other.threads

    kept = [other for other in _saved() if place(other) != place(machine)]
    temporary = _file().with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):  # a folder that cannot be written: measure again next time
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode([*kept, machine])))
        os.replace(temporary, _file())
