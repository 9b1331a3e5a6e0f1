"""The header of a GGUF file: its metadata, and where its tensors lie.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The file may be
anybody's: every count, length and offset is checked against what is there before anything is read or allocated, and
what a header may make in memory is bounded.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.fields import Fields
from skyline.checkpoint.gguf.types import GGML_TYPES, GGMLType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 256 * 1024 * 1024  # the largest vocabularies of today take 20 MiB
MAX_STRINGS = 4 * 1024 * 1024  # in all arrays together; each costs some 60 bytes of memory
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 1024
DEFAULT_ALIGNMENT = 32

_FLOAT32, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    _FLOAT32: np.dtype("<f4"),
    _BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_LENGTH = struct.Struct("<Q")
_DAMAGED = "it is truncated or damaged: download it again"
_TOO_LONG = f"its header ends behind the end of the file, or is above 256 MiB; {_DAMAGED}"


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies. `shape` is in the order of torch and numpy: rows first, the contiguous dimension last."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int  # of its first byte in the file
    nbytes: int


class GGUFFile:
    """A GGUF file, memory-mapped. Raises CheckpointError if it is not one, or not one that can be read.

    metadata: key to int, float, bool, str, list of str, or numpy array of numbers.
    tensors: by name, in the order of the file. `data` are all bytes of the file; nothing is read before they are used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = _map(path)
        # A slice of the map would be a copy; numpy's is a view.
        reader = _Reader(path, self.data[:MAX_HEADER_BYTES])
        tensor_count, key_count = reader.start()
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = reader.string(MAX_NAME_BYTES)
            if key in self.metadata:
                raise reader.error(f"the key {key!r} is there twice")
            self.metadata[key] = reader.value(key)
        infos = [reader.tensor() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise reader.error(f"general.alignment must be a power of two from 8 on, not {alignment!r}")
        start = -(-reader.offset // alignment) * alignment
        self.tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in infos:
            nbytes = kind.nbytes(shape)
            if name in self.tensors:
                raise reader.error(f"there are two tensors named {name!r}")
            if offset % alignment:
                raise reader.error(f"tensor {name!r} is not aligned to {alignment} bytes")
            if start + offset + nbytes > self.data.size:
                raise reader.error(f"tensor {name!r} ends behind the end of the file; {_DAMAGED}")
            self.tensors[name] = GGUFTensor(name, shape, kind, start + offset, nbytes)

    def rows(self, tensor: GGUFTensor) -> NDArray[np.uint8]:
        """A view of the tensor's bytes [shape[0], bytes of an entry of the first dimension]."""
        return self.data[tensor.offset : tensor.offset + tensor.nbytes].reshape(tensor.shape[0], -1)


def open_gguf(path: Path) -> list[GGUFFile]:
    """The file, or all files of a model that was split (gguf-split): metadata are in the first, tensors in each.

    `path`: of the first, or a link to it. CheckpointError if another is missing, or they do not belong together.
    """
    first = GGUFFile(path)
    header = Fields(first.metadata, str(path))
    count = header.integer("split.count", 1, 99_999, 1)
    if count == 1:
        return [first]
    # Not to the end: in the hub's cache the names of the parts are links to files with other names.
    while _SPLIT_NAME.fullmatch(path.name) is None and path.is_symlink():
        path = path.parent / path.readlink()
    name = _SPLIT_NAME.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts; they must be named like model-00001-of-00003.gguf, in one folder"
        )
    if int(name[2]) != 1:
        first_name = f"{name[1]}-00001-of-{name[3]}.gguf"
        raise CheckpointError(f"{path} is part {int(name[2])} of {count}; pass the first, {first_name}")
    files = [first]
    for number in range(2, count + 1):
        part = path.with_name(f"{name[1]}-{number:05d}-of-{name[3]}.gguf")
        files.append(GGUFFile(part))
        fields = Fields(files[-1].metadata, str(part))
        if (fields.integer("split.no", 0, 99_999), fields.integer("split.count", 1, 99_999)) != (number - 1, count):
            raise CheckpointError(f"{part} is not part {number} of {count}; download it again")
    tensors = sum(len(file.tensors) for file in files)
    if tensors != header.integer("split.tensors.count", 0, MAX_TENSORS):
        raise CheckpointError(
            f"the parts of {path} hold {tensors} tensors, not as many as it says; download them again"
        )
    return files


def _map(path: Path) -> NDArray[np.uint8]:
    """The file's bytes. Copy-on-write, because torch takes no read-only arrays."""
    try:
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
    except ValueError as error:  # mmap's word for an empty file
        raise CheckpointError(f"{path} is empty; download it again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


class _Reader:
    """Reads the header from front to back. `offset`: of the next byte."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path = path
        self.data = data.data
        self.offset = 0
        self.strings_left = MAX_STRINGS

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path} cannot be read as GGUF: {problem}")

    def start(self) -> tuple[int, int]:
        """Magic and version. Returns the numbers of tensors and of keys."""
        if bytes(self.take(4)) != MAGIC:
            raise self.error("it does not begin with GGUF, so it is another kind of file")
        version = self.unsigned(4)
        if version not in VERSIONS:
            if version & 0xFFFF == 0:
                raise self.error("it is big-endian; convert it with gguf-convert-endian of the package gguf")
            raise self.error(f"its version is {version}, supported are 2 and 3; convert the model again")
        tensors, keys = self.unsigned(8), self.unsigned(8)
        if tensors > MAX_TENSORS or keys > MAX_KEYS:
            raise self.error(f"{tensors} tensors and {keys} keys are more than any model has; {_DAMAGED}")
        return tensors, keys

    def take(self, count: int) -> memoryview:
        """The next bytes, if there are that many."""
        end = self.offset + count
        if end > len(self.data):
            raise self.error(_TOO_LONG)
        taken = self.data[self.offset : end]
        self.offset = end
        return taken

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def string(self, limit: int = MAX_HEADER_BYTES) -> str:
        length = self.unsigned(8)
        if length > limit:
            raise self.error(f"a text of {length} bytes is too long; {_DAMAGED}")
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"a text is not UTF-8 ({error})") from error

    def value(self, key: str) -> Any:
        kind = self.unsigned(4)
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(key)
        value = self._numbers(key, kind, 1)[0]
        # The decimal number that was written down, such as 1e-06, where a float32 is 9.99999997e-07.
        return float(str(value)) if kind == _FLOAT32 else value.item()

    def _array(self, key: str) -> Any:
        kind, count = self.unsigned(4), self.unsigned(8)
        if kind != _STRING:
            return self._numbers(key, kind, count)
        self.strings_left -= count
        if self.strings_left < 0:
            raise self.error(f"the arrays up to {key!r} hold more than {MAX_STRINGS} texts; {_DAMAGED}")
        return self._strings(count)

    def _strings(self, count: int) -> list[str]:
        """`string`, `count` times, in a loop of its own: there may be hundreds of thousands."""
        data, offset, end = self.data, self.offset, len(self.data)
        texts: list[str] = []
        try:
            for _ in range(count):
                start = offset + 8
                offset = start + _LENGTH.unpack_from(data, offset)[0]
                if offset > end:
                    break
                texts.append(str(data[start:offset], "utf-8"))
        except struct.error:
            pass
        except UnicodeDecodeError as error:
            raise self.error(f"a text is not UTF-8 ({error})") from error
        if len(texts) < count:
            raise self.error(_TOO_LONG)
        self.offset = offset
        return texts

    def _numbers(self, key: str, kind: int, count: int) -> NDArray[Any]:
        """A view of `count` numbers."""
        dtype = _SCALARS.get(kind)
        if dtype is None:
            raise self.error(f"the key {key!r} has values of the unknown type {kind}, or arrays of arrays")
        numbers: NDArray[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return numbers != 0 if kind == _BOOL else numbers

    def tensor(self) -> tuple[str, tuple[int, ...], GGMLType, int]:
        """Name, shape in the order of torch, type, and offset in the part of the file that holds the tensors."""
        name = self.string(MAX_NAME_BYTES)
        dimensions = self.unsigned(4)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.error(f"tensor {name!r} has {dimensions} dimensions, not 1 to {MAX_DIMENSIONS}")
        shape = tuple(reversed(struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))))
        number, offset = self.unsigned(4), self.unsigned(8)
        kind = GGML_TYPES.get(number)
        if kind is None:
            names = ", ".join(known.name for known in GGML_TYPES.values())
            raise self.error(f"tensor {name!r} has the type {number}, which is not supported; supported are {names}")
        if 0 in shape or shape[-1] % kind.block_size:
            raise self.error(f"tensor {name!r} has the shape {list(shape)}, which {kind.name} cannot have")
        return name, shape, kind, offset
