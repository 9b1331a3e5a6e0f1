"""Safetensors files, memory-mapped.

Format: https://huggingface.co/docs/safetensors and, for sharded checkpoints, `model.safetensors.index.json` with a
`weight_map` from tensor name to file name. Pickle-based files are never read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.fields import read_json_object
from skyline.checkpoint.hub import refuse_pickle

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 * 1024 * 1024

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsWeights:
    """The tensors of a checkpoint folder, read from disk only when they are used.

    Takes `model.safetensors`, or the shards of `model.safetensors.index.json`, or else every `*.safetensors` file
    (without Mistral's second copy, `consolidated*`). Opening reads the headers and checks them; CheckpointError names
    the file if a shard is missing, truncated or malformed, if the index and the shards disagree, or if two shards hold
    the same tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._headers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        weight_map: dict[str, str] = {}
        if (folder / SINGLE_FILE).exists():
            file_names = [SINGLE_FILE]
        elif (folder / INDEX_FILE).exists():
            weight_map = _read_index(folder)
            file_names = sorted(set(weight_map.values()))
        else:
            file_names = _list_files(folder)
        for file_name in file_names:
            self._open(file_name)
        for name, file_name in weight_map.items():
            if self._file_of.get(name) != file_name:
                raise CheckpointError(
                    f"{folder / INDEX_FILE} puts tensor {name!r} into {file_name}, which lacks it; "
                    "download the checkpoint again"
                )

    def names(self) -> list[str]:
        """Every tensor's name, in the order of the files and of the bytes in them."""
        return list(self._headers)

    def __contains__(self, name: object) -> bool:
        return name in self._headers

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header alone. Raises CheckpointError for an unknown name, as do the others."""
        return self._header(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype, from the header alone."""
        return self._header(name)[1]

    def tensor_nbytes(self, name: str) -> int:
        """The tensor's size in bytes, from the header alone."""
        shape, dtype = self._header(name)
        return math.prod(shape) * dtype.itemsize

    @property
    def nbytes(self) -> int:
        """The size of all tensors together in bytes."""
        return sum(self.tensor_nbytes(name) for name in self._headers)

    def get(self, name: str) -> torch.Tensor:
        """The tensor as a view of the memory-mapped file: nothing is read until its elements are. Do not write to it.

        The view stays valid after `close`. It lives on the CPU.
        """
        self._header(name)
        file_name = self._file_of[name]
        if file_name not in self._files:
            raise CheckpointError(f"{self.folder / file_name} has been closed")
        try:
            tensor: torch.Tensor = self._files[file_name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file_name}: tensor {name!r} cannot be read: {error}") from error
        return tensor

    def close(self) -> None:
        """Let go of the files; each mapping ends with the last view of it. Names, shapes and dtypes stay readable."""
        self._files.clear()

    def __enter__(self) -> SafetensorsWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _header(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        try:
            return self._headers[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} holds no tensor named {name!r}") from None

    def _open(self, file_name: str) -> None:
        path = self.folder / file_name
        try:
            file: Any = safe_open(path, framework="pt", device="cpu")
            for name in file.offset_keys():
                if name in self._headers:
                    raise CheckpointError(f"tensor {name!r} is in both {self._file_of[name]} and {file_name}")
                header = file.get_slice(name)
                dtype = DTYPES.get(header.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"{path}: tensor {name!r} has the unsupported dtype {header.get_dtype()}")
                self._headers[name] = (tuple(header.get_shape()), dtype)
                self._file_of[name] = file_name
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a valid safetensors file ({error}); it may be truncated: download it again"
            ) from error
        self._files[file_name] = file


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX_FILE
    weight_map = read_json_object(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must be an object from tensor names to file names")
    for file_name in {str(value): None for value in weight_map.values()}:
        # A name from a stranger's file must not lead out of the folder.
        if os.path.basename(file_name) != file_name or "\\" in file_name or "\0" in file_name:
            raise CheckpointError(f"{path}: {file_name!r} is not a plain file name")
        if not (folder / file_name).is_file():
            raise CheckpointError(f"{path} refers to {file_name}, which is missing; download the checkpoint again")
    return weight_map


def _list_files(folder: Path) -> list[str]:
    refuse_pickle(folder)
    file_names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not file_names:
        raise CheckpointError(f"{folder} holds no *.safetensors file; download or export the weights in that format")
    # Mistral's repositories carry a second copy of the weights under names of its own.
    return [name for name in file_names if not name.startswith("consolidated")] or file_names
