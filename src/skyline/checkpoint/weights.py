"""Copies a checkpoint's tensors straight from the mapped safetensors files into a model's parameters.

This module and the one it re-exports SafetensorsWeights from are the only ones of this folder that import torch.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.safetensors_weights import SafetensorsWeights

__all__ = ["Destination", "LoadReport", "SafetensorsWeights", "load"]

MAX_LISTED = 10
PIECE_BYTES = 32 * 1024 * 1024

_CONVERTIBLE = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Destination:
    """Where one checkpoint tensor goes.

    `tensor` is a view of the parameter, already sliced to the right place, on any device. `transform` maps the
    checkpoint tensor to the shape and layout of `tensor` (such as `lambda t: t.t()`); it must also work on a tensor of
    the "meta" device, because shapes are checked before any data is read.
    """

    tensor: torch.Tensor
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class LoadReport:
    """`bytes` read from the checkpoint, and the wall-clock `seconds` it took."""

    bytes: int
    seconds: float


def load(
    weights: SafetensorsWeights,
    destinations: Mapping[str, Destination],
    ignore: Iterable[str] = (),
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    write: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> LoadReport:
    """Copy every checkpoint tensor to the destination of the same name, converting between floating-point dtypes.

    There is one copy from the mapped file into the parameter, in `threads` threads (default: up to 4), and pages that
    have been copied are given back to the kernel, so memory does not grow by the size of the checkpoint. Checkpoint
    tensors that match an fnmatch pattern of `ignore` may go without a destination. `on_progress(bytes done, bytes in
    all)` is called from this thread. `write(target, source)`, by default `target.copy_(source)`, puts rows of a
    checkpoint tensor where they belong; it is called from the threads, with targets that do not overlap.

    Nothing is copied unless everything fits: missing, surplus, wrongly shaped and unconvertible tensors (anything but
    equal dtypes or two of float64/32/16 and bfloat16) are named in one CheckpointError.
    """
    start = time.perf_counter()
    _check(weights, destinations, list(ignore))
    pieces = [
        piece for name in weights if name in destinations for piece in _split(weights.get(name), destinations[name])
    ]
    total = sum(piece.source.nbytes for piece in pieces)
    done = 0
    # Always in worker threads, so that each copy stays in one thread of its own instead of waking the OpenMP team.
    with ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1), thread_name_prefix="load") as pool:
        for copied in pool.map(lambda piece: _copy(piece, write), pieces):
            done += copied
            if on_progress is not None:
                on_progress(done, total)
    return LoadReport(bytes=total, seconds=time.perf_counter() - start)


def _check(weights: SafetensorsWeights, destinations: Mapping[str, Destination], ignore: list[str]) -> None:
    missing = [
        f"{name} {list(destination.tensor.shape)}" for name, destination in destinations.items() if name not in weights
    ]
    surplus: list[str] = []
    shapes: list[str] = []
    dtypes: list[str] = []
    for name in weights:
        shape, dtype = weights.shape(name), weights.dtype(name)
        if name not in destinations:
            if not any(fnmatchcase(name, pattern) for pattern in ignore):
                surplus.append(f"{name} {list(shape)}")
            continue
        target = destinations[name].tensor
        try:
            incoming = _meta(shape, dtype, destinations[name].transform)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            shapes.append(f"{name}: found {list(shape)}, which cannot be rearranged: {error}")
            continue
        if incoming.shape != target.shape:
            shapes.append(f"{name}: expected {list(target.shape)}, found {list(incoming.shape)}")
        elif incoming.dtype != target.dtype and not {incoming.dtype, target.dtype} <= _CONVERTIBLE:
            dtypes.append(f"{name}: expected {target.dtype}, found {incoming.dtype}")
    problems = [
        _listed("missing from the checkpoint", missing),
        _listed("in the checkpoint, but the model has no place for it", surplus),
        _listed("of the wrong shape", shapes),
        _listed("of a dtype that cannot be converted", dtypes),
    ]
    if any(problems):
        raise CheckpointError(
            f"the weights in {weights.folder} do not fit the model that its config.json describes:\n"
            + "\n".join(filter(None, problems))
        )


def _meta(
    shape: tuple[int, ...], dtype: torch.dtype, transform: Callable[[torch.Tensor], torch.Tensor] | None
) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor if transform is None else transform(tensor)


def _listed(problem: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f"\n    and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"  {len(names)} {problem}:\n    " + "\n    ".join(names[:MAX_LISTED]) + more


@dataclass(frozen=True)
class _Piece:
    source: torch.Tensor  # a view of the mapped file
    target: torch.Tensor
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None


def _split(source: torch.Tensor, destination: Destination) -> Iterator[_Piece]:
    """Cut along the first dimension into pieces small enough for the threads to finish together."""
    if destination.transform is not None or source.nbytes <= PIECE_BYTES:
        yield _Piece(source, destination.tensor, destination.transform)
        return
    rows = max(1, PIECE_BYTES * source.shape[0] // source.nbytes)
    for part, target in zip(torch.split(source, rows), torch.split(destination.tensor, rows), strict=True):
        yield _Piece(part, target)


def _copy(piece: _Piece, write: Callable[[torch.Tensor, torch.Tensor], None] | None) -> int:
    with torch.no_grad():
        source = piece.source if piece.transform is None else piece.transform(piece.source)
        if write is None:
            piece.target.copy_(source)
        else:
            write(piece.target, source)
    _release_pages(piece.source)
    return piece.source.nbytes


def _release_pages(source: torch.Tensor) -> None:
    """Take the pages of a mapped tensor out of this process's memory; the kernel's page cache keeps them."""
    if _LIBC is None:
        return
    first = -(-source.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (source.data_ptr() + source.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
