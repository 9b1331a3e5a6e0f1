"""A GGUF file as a folder like those on the Hugging Face hub, which the rest of Skyline reads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from skyline.checkpoint.cache import cache_folder
from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.gguf.architectures import Header, make_config
from skyline.checkpoint.gguf.reader import open_gguf
from skyline.checkpoint.gguf.tensors import place
from skyline.checkpoint.gguf.tokenizer import make_tokenizer, make_tokenizer_config, read_vocabulary

VERSION = 1  # of what is written; a change of anything in this folder that changes it needs another number
WEIGHTS_FILE = "model.gguf"

_SETTINGS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def materialize(path: Path) -> Path:
    """A folder with config.json, tokenizer.json, tokenizer_config.json and a link model.gguf to the file.

    It lies in Skyline's cache folder (SKYLINE_CACHE, else ~/.cache/skyline) and is made once for a file of this path,
    size and time of change, also if several processes ask for it together. Reads the header only. CheckpointError if
    the file cannot be read, or holds a model that is not supported.
    """
    path = path.absolute()
    try:
        state = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    described = f"{VERSION} {path} {state.st_size} {state.st_mtime_ns}"
    base = cache_folder() / "gguf"
    folder = base / f"{path.stem[:40]}-{hashlib.sha256(os.fsencode(described)).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    files = _files_for(path)
    try:
        base.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=base))
        try:
            for name, content in files.items():
                (partial / name).write_text(json.dumps(content, ensure_ascii=False), "utf-8")
            (partial / WEIGHTS_FILE).symlink_to(path)
            _publish(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{base} cannot be written ({error.strerror or error}); set SKYLINE_CACHE to a folder that can"
        ) from error
    return folder


def _publish(partial: Path, folder: Path) -> None:
    """Rename, unless another process was faster: a folder that is there is whole."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _files_for(path: Path) -> dict[str, dict[str, Any]]:
    files = open_gguf(path)
    header = Header(files)
    metadata, where = files[0].metadata, str(path)
    config = make_config(header)
    place(header)  # to refuse now what the engine's process would refuse later
    vocabulary = read_vocabulary(metadata, where)
    config |= {
        "bos_token_id": vocabulary.special_ids.get("bos_token"),
        "eos_token_id": vocabulary.ends() or None,
        "pad_token_id": vocabulary.special_ids.get("pad_token"),
    }
    contents = {
        "config.json": config,
        "tokenizer.json": make_tokenizer(metadata, where, vocabulary),
        "tokenizer_config.json": make_tokenizer_config(metadata, where, vocabulary),
    }
    said = {name: _optional_number(header, f"general.sampling.{key}") for name, key in _SETTINGS.items()}
    settings = {name: value for name, value in said.items() if value is not None}
    if settings:
        contents["generation_config.json"] = settings
    return contents


def _optional_number(header: Header, key: str) -> float | int | None:
    """Of any size: load_generation_defaults says what is out of range."""
    value = header.optional_number(key, -1e30, 1e30)
    return value if value is None or isinstance(header.values[key], float) else int(value)
