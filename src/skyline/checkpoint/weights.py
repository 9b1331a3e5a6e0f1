"""Copies a checkpoint's tensors straight from the mapped safetensors files into a model's parameters.

This module and the one it re-exports SafetensorsWeights from are the only ones of this folder that import torch.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import torch

from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.safetensors_weights import SafetensorsWeights

__all__ = ["Derived", "Destination", "LoadReport", "SafetensorsWeights", "Weights", "load"]

MAX_LISTED = 10
PIECE_BYTES = 32 * 1024 * 1024

_CONVERTIBLE = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Weights(Protocol):
    """Named tensors that can be looked at before they are read: SafetensorsWeights, for one."""

    folder: Path

    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, name: object) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def get(self, name: str) -> torch.Tensor: ...


class Derived(Protocol):
    """A tensor that is made of others of the checkpoint when its rows are asked for, float32."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self, start: int, stop: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Destination:
    """Where one checkpoint tensor goes.

    `tensor` is a view of the parameter, already sliced to the right place, on any device. `transform` maps the
    checkpoint tensor to the shape and layout of `tensor` (such as `lambda t: t.t()`); it must also work on a tensor of
    the "meta" device, because shapes are checked before any data is read. `by_entry`: it maps each entry of the first
    dimension instead, so that not all of a tensor of experts is in hand at once.

    With `others`, the checkpoint tensor's rows fill `tensor` and then those, one after the other.
    """

    tensor: torch.Tensor
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None
    by_entry: bool = False
    others: tuple[torch.Tensor, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """What the checkpoint tensor has to have after the transform."""
        rows = sum(part.shape[0] for part in (self.tensor, *self.others)) if self.others else 0
        return (rows, *self.tensor.shape[1:]) if self.others else tuple(self.tensor.shape)


@dataclass(frozen=True)
class LoadReport:
    """`bytes` read from the checkpoint, and the wall-clock `seconds` it took."""

    bytes: int
    seconds: float


def load(
    weights: Weights,
    destinations: Mapping[str, Destination],
    ignore: Iterable[str] = (),
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    write: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    derived: Mapping[str, Derived] | None = None,
) -> LoadReport:
    """Copy every checkpoint tensor to the destination of the same name, converting between floating-point dtypes.

    There is one copy from the mapped file into the parameter, in `threads` threads (default: up to 4), and pages that
    have been copied are given back to the kernel, so memory does not grow by the size of the checkpoint. Checkpoint
    tensors that match an fnmatch pattern of `ignore` may go without a destination. `on_progress(bytes done, bytes in
    all)` is called from this thread. `write(target, source)`, by default `target.copy_(source)`, puts rows of a
    checkpoint tensor where they belong; it is called from the threads, with targets that do not overlap. `derived`
    stands for tensors that the checkpoint has only in parts, by the name a destination knows them by; the parts must
    be among `ignore`. What its `read` returns is handed to `write` as it is.

    Nothing is copied unless everything fits: missing, surplus, wrongly shaped and unconvertible tensors (anything but
    equal dtypes or two of float64/32/16 and bfloat16) are named in one CheckpointError.
    """
    start = time.perf_counter()
    derived = derived or {}
    _check(weights, destinations, list(ignore), derived)
    pieces = [
        piece
        for name in (*(n for n in weights if n not in derived), *derived)
        if name in destinations
        for piece in _split(_source(weights, derived, name), destinations[name])
    ]
    total = sum(piece.nbytes for piece in pieces)
    done = 0
    # Always in worker threads, so that each copy stays in one thread of its own instead of waking the OpenMP team.
    # Twice as many as cores: while one waits for the kernel's pages, another packs (6 % of the time on two cores).
    with ThreadPoolExecutor(threads or min(4, 2 * (os.cpu_count() or 1)), thread_name_prefix="load") as pool:
        for copied in pool.map(lambda piece: _copy(piece, write), pieces):
            done += copied
            if on_progress is not None:
                on_progress(done, total)
    return LoadReport(bytes=total, seconds=time.perf_counter() - start)


def _check(
    weights: Weights, destinations: Mapping[str, Destination], ignore: list[str], derived: Mapping[str, Derived]
) -> None:
    missing = [
        f"{name} {list(destination.shape)}"
        for name, destination in destinations.items()
        if name not in weights and name not in derived
    ]
    surplus: list[str] = []
    shapes: list[str] = []
    dtypes: list[str] = []
    known = {name: (weights.shape(name), weights.dtype(name)) for name in weights}
    for name, (shape, dtype) in {**known, **{n: (d.shape, torch.float32) for n, d in derived.items()}}.items():
        if name not in destinations:
            if not any(fnmatchcase(name, pattern) for pattern in ignore):
                surplus.append(f"{name} {list(shape)}")
            continue
        destination = destinations[name]
        expected, target = list(destination.shape), destination.tensor
        try:
            incoming = _meta(shape, dtype, destination)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            shapes.append(f"{name}: found {list(shape)}, which cannot be rearranged: {error}")
            continue
        if list(incoming.shape) != expected:
            shapes.append(f"{name}: expected {expected}, found {list(incoming.shape)}")
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


def _meta(shape: tuple[int, ...], dtype: torch.dtype, destination: Destination) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    if destination.transform is None:
        return tensor
    if not destination.by_entry:
        return destination.transform(tensor)
    entry = destination.transform(tensor[0])
    return torch.empty((shape[0], *entry.shape), dtype=entry.dtype, device="meta")


def _listed(problem: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f"\n    and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"  {len(names)} {problem}:\n    " + "\n    ".join(names[:MAX_LISTED]) + more


@dataclass(frozen=True)
class _Source:
    """A tensor that is read in slices of its first dimension; without dimensions, as a whole."""

    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[int, int], torch.Tensor]
    mapped: bool  # whether what is read are pages of a file


def _source(weights: Weights, derived: Mapping[str, Derived], name: str) -> _Source:
    if name in derived:
        tensor = derived[name]
        return _Source(tensor.shape, 4 * math.prod(tensor.shape), tensor.read, mapped=False)
    whole = weights.get(name)
    return _Source(
        tuple(whole.shape), whole.nbytes, lambda start, stop: whole[start:stop] if whole.dim() else whole, True
    )


@dataclass(frozen=True)
class _Piece:
    source: _Source
    start: int
    stop: int
    nbytes: int
    target: torch.Tensor
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None


def _split(source: _Source, destination: Destination) -> Iterator[_Piece]:
    """Cut along the first dimension into pieces small enough for the threads to finish together."""
    count = source.shape[0] if source.shape else 1
    if destination.by_entry:
        for entry, target in enumerate(destination.tensor):
            yield _Piece(source, entry, entry + 1, source.nbytes // count, target, _of_only(destination.transform))
        return
    if destination.transform is not None:
        yield _Piece(source, 0, count, source.nbytes, destination.tensor, destination.transform)
        return
    rows = max(1, PIECE_BYTES * count // max(1, source.nbytes))
    start = 0
    for tensor in (destination.tensor, *destination.others):
        for target in torch.split(tensor, rows) if tensor.dim() else (tensor,):
            stop = start + (target.shape[0] if tensor.dim() else 1)
            yield _Piece(source, start, stop, source.nbytes * (stop - start) // max(1, count), target)
            start = stop


def _of_only(transform: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """On a slice of one entry."""
    return lambda piece: piece[0] if transform is None else transform(piece[0])


def _copy(piece: _Piece, write: Callable[[torch.Tensor, torch.Tensor], None] | None) -> int:
    with torch.no_grad():
        read = piece.source.read(piece.start, piece.stop)
        source = read if piece.transform is None else piece.transform(read)
        if write is None:
            piece.target.copy_(source)
        else:
            write(piece.target, source)
    if piece.source.mapped:
        _release_pages(read)
    return piece.nbytes


def _release_pages(source: torch.Tensor) -> None:
    """Take the pages of a mapped tensor out of this process's memory; the kernel's page cache keeps them."""
    if _LIBC is None:
        return
    first = -(-source.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (source.data_ptr() + source.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
