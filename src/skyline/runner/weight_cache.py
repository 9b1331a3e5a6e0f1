"""Weights as the kernels want them, packed and quantized, kept on disk from one start to the next.

An entry is one safetensors file in `cache_folder()/weights/`, named after all that its bytes follow from. It has the
tensors of a WeightStore and `crc32`, the checksums of their pieces. Old entries stay until a user deletes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from skyline.checkpoint.cache import cache_folder
from skyline.checkpoint.safetensors_weights import DTYPES, INDEX_FILE
from skyline.engine.config import EngineConfig
from skyline.kernels.cpu.build import library_path

log = logging.getLogger(__name__)

PIECE_BYTES = 16 * 1024 * 1024  # one thread's work, with a checksum of its own
# Read or written, and summed while it is in the core's own cache: summed later, reading takes half as long again.
STEP_BYTES = 256 * 1024
CHECKSUMS = "crc32"  # 4.4 GB/s in two threads here, where blake2b does 1.5 and sha256 2.6

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Folders of Python sources that say which values of a checkpoint go where, and as what.
_SOURCES = ("checkpoint/gguf", "kernels", "layers", "models", "quantization")

_Move = Callable[[memoryview, int], int]  # some memory and its place in the file -> how many bytes were moved


class WeightCache:
    """One entry: for one checkpoint, as the kernels of one program want it.

    `tensors` are what `read` fills and `write` saves, by name: contiguous, in the CPU's memory.
    """

    def __init__(self, config: EngineConfig, dtype: torch.dtype, isa: str, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        count = sum(-(-tensor.nbytes // PIECE_BYTES) for tensor in tensors.values())
        self._checksums = torch.zeros(count, dtype=torch.int64)
        entries = _entries({**tensors, CHECKSUMS: self._checksums})
        description = describe(config, dtype, isa, entries)
        self._header = _header(entries, description)
        self.path = cache_folder() / "weights" / f"{_digest(description.encode())}.safetensors"

    def read(self) -> bool:
        """Fill the tensors. False if there is no entry or, after a warning, a damaged one, which is removed."""
        try:
            file = os.open(self.path, os.O_RDONLY)
        except OSError:
            return False  # if that is because of the folder, `write` will say so
        try:
            self._read(file)
        except (OSError, ValueError) as error:
            log.warning("the cached weights in %s cannot be used, the checkpoint is read instead: %s", self.path, error)
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
            for tensor in self._tensors.values():
                tensor.zero_()  # layouts count on zeros where nothing is written: their padding
            return False
        finally:
            os.close(file)
        return True

    def write(self) -> bool:
        """Save the tensors. False if another process is at it or, after a warning, if that fails: a full disk, say."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released with the file, also when this process dies
                if not self.path.exists():  # else another process was faster
                    self._write(self.path.with_suffix(".part"))
        except BlockingIOError:
            return False
        except OSError as error:
            log.warning("the weights cannot be cached in %s: %s; the next start is no faster", self.path, error)
            return False
        return True

    def _read(self, file: int) -> None:
        if os.pread(file, len(self._header), 0) != self._header:
            raise ValueError("its header is not that of these weights")
        size = len(self._header) + self.nbytes + self._checksums.nbytes
        if os.fstat(file).st_size != size:
            raise ValueError(f"it has {os.fstat(file).st_size} bytes instead of {size}")

        def move(memory: memoryview, at: int) -> int:
            return os.preadv(file, [memory], at)

        _in_steps(move, _bytes(self._checksums), len(self._header) + self.nbytes)
        if self._move_all(move) != self._checksums.tolist():
            raise ValueError("its checksums are wrong")

    def _write(self, part: Path) -> None:
        """By way of `part`. A file that a crash of the machine leaves incomplete is for the checksums to find."""
        # Weights may be confidential: for this user alone, whatever the checkpoint's permissions.
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            try:

                def move(memory: memoryview, at: int) -> int:
                    return os.pwrite(file, memory, at)

                self._checksums[:] = torch.tensor(self._move_all(move), dtype=torch.int64)
                _in_steps(move, _bytes(self._checksums), len(self._header) + self.nbytes)
                _in_steps(move, memoryview(self._header), 0)
            finally:
                os.close(file)
            os.replace(part, self.path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _move_all(self, move: _Move) -> list[int]:
        """Every tensor between memory and file, in threads; returns the pieces' checksums."""
        at = len(self._header)
        pieces: list[tuple[memoryview, int]] = []
        for tensor in self._tensors.values():
            memory = _bytes(tensor)
            pieces += ((memory[i : i + PIECE_BYTES], at + i) for i in range(0, len(memory), PIECE_BYTES))
            at += len(memory)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="weights") as pool:
            return list(pool.map(lambda piece: _in_steps(move, *piece), pieces))


def describe(config: EngineConfig, dtype: torch.dtype, isa: str, entries: dict[str, Any]) -> str:
    """All that an entry's bytes follow from, as JSON. Its SHA-256 names the entry.

    files: path, size and time of change (ns) of the checkpoint's files: it may be replaced, and reading it all to be
    sure would take longer than the cache saves. config: how the checkpoint's tensors are arranged.
    dtype, quantization, group: what values become. isa: each instruction set's kernels pack and round for themselves.
    kernels: names the state of the C++ sources, which pack. python: of those that say which values go where.
    tensors: names, shapes and dtypes, which vary with whatever option makes a program choose other kernels.
    """
    folder = Path(config.model)
    names = sorted([*folder.glob("*.safetensors"), *folder.glob(INDEX_FILE), *folder.glob("*.gguf")])
    files = [path.resolve() for path in names if path.is_file()]  # reading the checkpoint is what complains of others
    package = Path(__file__).parents[1]
    sources = [path.read_bytes() for name in _SOURCES for path in sorted((package / name).rglob("*.py"))]
    quantized = config.quantization not in (None, "none")
    fields = {
        "files": [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files],
        "config": _digest((folder / "config.json").read_bytes()),
        "dtype": str(dtype),
        "quantization": config.quantization if quantized else "none",
        "group": config.quantization_group if config.quantization == "int4" else None,
        "isa": isa,
        "kernels": None if isa == "none" else library_path(isa).stem,
        "python": _digest(b"\0".join(sources)),
        "tensors": _digest(json.dumps(entries).encode()),
    }
    return json.dumps(fields)


def _entries(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The tensors as a safetensors header lists them, one after the other."""
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    return entries


def _header(entries: dict[str, Any], description: str) -> bytes:
    """What a safetensors file begins with: the length of a JSON object, 8 bytes, and the object, padded with spaces."""
    text = json.dumps({"__metadata__": {"skyline": description}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _in_steps(move: _Move, memory: memoryview, at: int) -> int:
    """Move all of the memory, and return its checksum. Raises OSError if that fails."""
    checksum = 0
    for begin in range(0, len(memory), STEP_BYTES):
        step = memory[begin : begin + STEP_BYTES]
        if move(step, at + begin) != len(step):
            raise OSError("it was cut short")
        checksum = zlib.crc32(step, checksum)
    return checksum
