"""The compiled kernels of this process and their threads."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skyline.kernels.cpu import isa
from skyline.kernels.cpu.build import BuildError, load
from skyline.kernels.registry import Kernel, Request, register
from skyline.ops import OPS

log = logging.getLogger(__name__)
PROVIDER = "cpu"

_current: Any = None  # the loaded library, once `available` has been asked


def available() -> str:
    """The instruction set of the kernels in use, which this builds if need be; "none", with a warning, if it cannot."""
    global _current
    if _current is None:
        _current = _load(isa.detect())
    name: str = _current.isa
    return name


def library() -> Any:
    """The library's functions as attributes. Raises RuntimeError if there are none here."""
    if available() == "none":
        raise RuntimeError("the CPU kernels are not available")
    return _current.functions


@contextlib.contextmanager
def using(instruction_set: str) -> Iterator[None]:
    """Run another instruction set's kernels, or "none", for a while: for tests and comparisons. Raises BuildError."""
    global _current
    functions = None if instruction_set == "none" else load(instruction_set)
    before, _current = _current, _Library(instruction_set, functions)
    try:
        if functions is not None and instruction_set == "amx":
            functions.amx_request()
        yield
    finally:
        _current = before


@contextlib.contextmanager
def wrapped(wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Put wrap(functions) in the place of the library's functions for a while, in which one thread calls kernels."""
    global _current
    before = _current
    _current = _Library(available(), wrap(library()))
    try:
        yield
    finally:
        _current = before


class _Library:
    def __init__(self, name: str, functions: Any) -> None:
        self.isa = name
        self.functions = functions


def _load(name: str) -> _Library:
    if name == "none":
        return _Library("none", None)
    try:
        functions = load(name)
    except BuildError as error:
        log.warning("the CPU kernels are not available, torch computes instead: %s", error)
        return _Library("none", None)
    if name == "amx" and not functions.amx_request():
        log.warning("the operating system refuses AMX; AVX-512 is used instead")
        return _load("avx512")
    return _Library(name, functions)


def supports(request: Request) -> str | None:
    """What every kernel of this provider needs: the CPU, an instruction set, and a dtype it was compiled for."""
    if request.device != "cpu":
        return "runs on CPUs"
    if request.isa == "none":
        return "needs a CPU with AVX2 and a C++ compiler"
    if request.dtype not in (torch.float32, torch.bfloat16):
        return f"is not written for {str(request.dtype).removeprefix('torch.')}"
    return None


def cached(request: Request) -> str | None:
    """`supports`, and keys and values as this provider reads them."""
    if request.kv_dtype not in (None, request.dtype, torch.int8):
        return f"reads no keys and values of {str(request.kv_dtype).removeprefix('torch.')}"
    return supports(request)


def only(dtypes: tuple[torch.dtype, ...], why: str) -> Callable[[Request], str | None]:
    """`supports`, and one of these dtypes, else `why`."""

    def check(request: Request) -> str | None:
        if (missing := supports(request)) is not None:
            return missing
        if request.dtype not in dtypes:
            return why
        return None

    return check


def compresses(request: Request) -> str | None:
    """`supports`, and bfloat16 weights that are worth keeping in 12 bits: csrc/compressed.h."""
    if (missing := supports(request)) is not None:
        return missing
    if request.dtype != torch.bfloat16:
        return "keeps bfloat16 in 12 bits"
    return None if request.isa == "avx512" else "keeps bfloat16 in 12 bits with AVX-512 alone"


def provide(
    op: str, into: Callable[..., None], check: Callable[[Request], str | None] = supports, **options: Any
) -> None:
    """Register `into(*outputs, *arguments)` as this provider's kernel of the op."""
    contract = OPS[op]

    def run(*arguments: Any) -> Any:
        bound = contract.signature.bind(*arguments)
        bound.apply_defaults()
        meta = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in bound.args]
        shapes = (contract.meta or contract.reference)(*meta)
        shapes = shapes if isinstance(shapes, tuple) else () if shapes is None else (shapes,)
        outputs = tuple(torch.empty(shape.shape, dtype=shape.dtype) for shape in shapes)
        into(*outputs, *bound.args)
        return outputs[0] if len(outputs) == 1 else outputs or None

    register(Kernel(op, PROVIDER, run, check, into, **options))


def thread_count(count: int | None = None) -> int:
    """How many threads `start_threads` starts for `count`: OMP_NUM_THREADS, else every physical core, unless given."""
    cores = len(physical_cpus())
    return count or _environment_threads() or min(cores, cgroup_cpus() or cores)


def start_threads(count: int | None = None) -> int:
    """Start the kernels' threads, one to a physical core of this process's affinity mask, and return their number.

    The calling thread becomes the first of them. `count` defaults to OMP_NUM_THREADS, else every physical core within
    the control group's quota. With fewer threads than cores none is pinned: several engines may share the machine.
    """
    cpus = physical_cpus()
    wanted = thread_count(count)
    chosen = cpus if wanted == len(cpus) else [-1] * wanted
    library().pool_start(np.array(chosen, np.int32))
    return wanted


@contextlib.contextmanager
def step() -> Iterator[None]:
    """Between the kernels called inside, the threads spin instead of sleeping. Does nothing where there are none."""
    functions = None if _current is None else _current.functions
    if functions is None:
        yield
        return
    functions.begin_step()
    try:
        yield
    finally:
        functions.end_step()


def stop_threads() -> None:
    library().pool_stop()


def _environment_threads() -> int | None:
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else None


def physical_cpus() -> list[int]:
    """One CPU number of each physical core that this process may run on."""
    chosen: dict[tuple[str, str], int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        chosen.setdefault(_core_of(cpu), cpu)
    return sorted(chosen.values())


def _core_of(cpu: int) -> tuple[str, str]:
    folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return (folder / "physical_package_id").read_text().strip(), (folder / "core_id").read_text().strip()
    except OSError:
        return "", str(cpu)


def cgroup_cpus(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The CPU quota of the control group in whole cores, at least 1; None if there is none."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not quota.isdigit():  # "max", or -1
        return None
    return max(1, int(quota) // int(period))
