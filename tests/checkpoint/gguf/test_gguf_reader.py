"""The header of GGUF files: what the package gguf writes, and what nobody should have written."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from skyline.checkpoint import CheckpointError
from skyline.checkpoint.gguf.reader import GGUFFile, open_gguf
from tests.checkpoint.gguf.convert import finish

STRING, ARRAY, UINT32 = 8, 9, 4


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(keys: list[bytes], tensors: list[bytes], version: int = 3) -> bytes:
    content = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return content + b"\0" * (-len(content) % 32)


GOOD = header([key("a", UINT32, struct.pack("<I", 7))], [tensor()]) + bytes(128)


def opened(folder: Path, content: bytes) -> GGUFFile:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return GGUFFile(path)


def test_what_the_package_writes_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_custom_alignment(64)
    numbers = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 2**32 - 1, "int32": -(2**31)}
    numbers |= {"uint64": 2**64 - 1, "int64": -(2**63)}
    for name, number in numbers.items():
        getattr(writer, f"add_{name}")(name, number)
    writer.add_float32("eps", 1e-6)
    writer.add_float64("double", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "Grüße 🙂")
    writer.add_array("texts", ["a", "", "ø"])
    writer.add_array("floats", [0.5, -1.0])
    writer.add_array("bools", [True, False])
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float16)
    writer.add_tensor("a", a)
    writer.add_tensor("b", b)
    finish(writer)
    file = GGUFFile(tmp_path / "model.gguf")
    assert {name: file.metadata[name] for name in numbers} == numbers
    assert file.metadata["eps"] == 1e-6 and file.metadata["double"] == 0.1 and file.metadata["yes"] is True
    assert file.metadata["text"] == "Grüße 🙂" and file.metadata["texts"] == ["a", "", "ø"]
    assert file.metadata["floats"].tolist() == [0.5, -1.0] and file.metadata["bools"].tolist() == [True, False]
    assert list(file.tensors) == ["a", "b"] and file.tensors["a"].shape == (2, 3)
    assert np.array_equal(file.rows(file.tensors["a"]).view("<f4"), a)
    assert np.array_equal(file.rows(file.tensors["b"]).view("<f2").reshape(-1), b)


def test_version_2_is_read_and_every_shorter_file_refused(tmp_path: Path) -> None:
    assert opened(tmp_path, GOOD.replace(b"GGUF\3", b"GGUF\2")).metadata == {"a": 7}
    for length in range(len(GOOD)):
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            opened(tmp_path, GOOD[:length])


HOSTILE = {
    "another kind of file": (b"PK\3\4" + GOOD[4:], "does not begin with GGUF"),
    "version 1": (header([], [], 1), "version is 1"),
    "version 4": (header([], [], 4), "version is 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "more than any model"),
    "many keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "more than any model"),
    "more tensors than bytes": (b"GGUF" + struct.pack("<IQQ", 3, 2**16, 0), "ends behind the end"),
    "long key": (header([struct.pack("<Q", 2**60)], []), "too long"),
    "long text": (header([text("k") + struct.pack("<IQ", STRING, 2**60)], []), "too long"),
    "long text in an array": (
        header([key("k", ARRAY, struct.pack("<IQQ", STRING, 1, 2**60))], []),
        "ends behind the end",
    ),
    "many texts": (header([key("k", ARRAY, struct.pack("<IQ", STRING, 2**60))], []), "more than 4194304 texts"),
    "fewer texts than said": (header([key("k", ARRAY, struct.pack("<IQ", STRING, 2**20))], []), "ends behind the end"),
    "many numbers": (header([key("k", ARRAY, struct.pack("<IQ", UINT32, 2**62))], []), "ends behind the end"),
    "array of arrays": (header([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1))], []), "arrays of arrays"),
    "unknown type of value": (header([key("k", 13, bytes(8))], []), "unknown type 13"),
    "key twice": (header([key("k", UINT32, bytes(4))] * 2, []), "there twice"),
    "text that is not UTF-8": (header([key("k", STRING, text(b"\xff"))], []), "not UTF-8"),
    "texts that are not UTF-8": (
        header([key("k", ARRAY, struct.pack("<IQ", STRING, 1) + text(b"\xff"))], []),
        "not UTF-8",
    ),
    "name twice": (header([], [tensor()] * 2) + bytes(128), "two tensors named 't'"),
    "no dimensions": (header([], [tensor(shape=())]) + bytes(128), "0 dimensions"),
    "many dimensions": (header([], [text("t") + struct.pack("<I", 2**31)]), "2147483648 dimensions"),
    "nothing in a dimension": (header([], [tensor(shape=(32, 0))]) + bytes(128), r"\[0, 32\], which F32 cannot have"),
    "half a block": (header([], [tensor(shape=(16,), kind=2)]) + bytes(128), "Q4_0 cannot have"),
    "unknown type of tensor": (header([], [tensor(kind=99)]) + bytes(128), "type 99, which is not supported"),
    "big dimensions": (header([], [tensor(shape=(2**63, 2**63))]) + bytes(128), "behind the end"),
    "offset behind the end": (header([], [tensor(offset=2**40)]) + bytes(128), "behind the end"),
    "unaligned offset": (header([], [tensor(offset=4)]) + bytes(256), "not aligned to 32"),
    "no alignment": (header([key("general.alignment", UINT32, bytes(4))], []), "must be a power of two"),
    "alignment of a text": (header([key("general.alignment", STRING, text("32"))], []), "must be a power of two"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message):
            opened(tmp_path, content)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 1.0


def test_random_damage_gives_nothing_but_checkpoint_errors(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    keys = [key("a", UINT32, bytes(4)), key("b", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + text("yy"))]
    good = np.frombuffer(header(keys, [tensor(), tensor("u", (32, 2), 2, 128)]) + bytes(256), np.uint8)
    assert len(opened(tmp_path, good.tobytes()).tensors) == 2
    refused = 0
    for _ in range(300):
        damaged = good.copy()
        places = generator.integers(0, len(good) - 256, 3)
        damaged[places] = generator.integers(0, 256, 3)
        try:
            opened(tmp_path, damaged.tobytes())
        except CheckpointError:
            refused += 1
    assert refused > 100


def split(folder: Path, count: int = 3) -> list[Path]:
    paths = []
    for number in range(count):
        paths.append(folder / f"m-{number + 1:05d}-of-{count:05d}.gguf")
        writer = gguf.GGUFWriter(paths[-1], "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", count)
        writer.add_tensor(f"t{number}", np.full(4, number, np.float32))
        finish(writer)
    return paths


def test_split_models(tmp_path: Path) -> None:
    paths = split(tmp_path)
    blob, link = tmp_path / "blobs" / "0123", tmp_path / "elsewhere" / "model.gguf"
    for path in (blob, link):
        path.parent.mkdir()
    paths[0].rename(blob)
    paths[0].symlink_to(Path("blobs") / "0123")
    link.symlink_to(paths[0])
    assert [list(file.tensors) for file in open_gguf(link)] == [["t0"], ["t1"], ["t2"]]
    with pytest.raises(CheckpointError, match="is part 2 of 3; pass the first, m-00001-of-00003"):
        open_gguf(paths[1])
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(CheckpointError, match="is not part 2 of 3"):
        open_gguf(paths[0])
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf cannot be read"):
        open_gguf(paths[0])
    alone = blob.rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="must be named like"):
        open_gguf(alone)
