"""Safetensors folders, and loading them into place."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from skyline.checkpoint import CheckpointError
from skyline.checkpoint import weights as weights_module
from skyline.checkpoint.weights import Destination, SafetensorsWeights, load

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.arange(6, dtype=torch.float32).to(torch.bfloat16),
    "c": torch.tensor([1, 2], dtype=torch.int64),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3.0),
}


def single(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


def sharded(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    save_file({name: TENSORS[name] for name in ("a.weight", "c")}, folder / "m-1.safetensors")
    save_file({name: TENSORS[name] for name in ("b.weight", "empty", "scalar")}, folder / "m-2.safetensors")
    names = {name: "m-1.safetensors" if name in ("a.weight", "c") else "m-2.safetensors" for name in TENSORS}
    index = {"metadata": {}, "weight_map": names if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def without_index(folder: Path) -> Path:
    sharded(folder)
    (folder / "model.safetensors.index.json").unlink()
    save_file(TENSORS, folder / "consolidated.safetensors")
    return folder


@pytest.mark.parametrize("layout", [single, sharded, without_index])
def test_layouts(tmp_path: Path, layout: object) -> None:
    with SafetensorsWeights(layout(tmp_path)) as weights:  # type: ignore[operator]
        assert sorted(weights.names()) == sorted(TENSORS) == sorted(weights) and len(weights) == 5
        for name, tensor in TENSORS.items():
            assert weights.shape(name) == tuple(tensor.shape)
            assert weights.dtype(name) == tensor.dtype
            assert torch.equal(weights.get(name), tensor)
        assert weights.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
        assert "nope" not in weights
        with pytest.raises(CheckpointError, match="no tensor named 'nope'"):
            weights.get("nope")
        view = weights.get("a.weight")
        assert view.data_ptr() == weights.get("a.weight").data_ptr(), "must be a view of one mapping"
    assert torch.equal(view, TENSORS["a.weight"]), "must outlive close"
    with pytest.raises(CheckpointError, match="closed"):
        weights.get("a.weight")


def test_symlinked_shards_as_in_the_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    sharded(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert len(SafetensorsWeights(snapshot)) == 5


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*.safetensors file"):
        SafetensorsWeights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"only pickle weights \(pytorch_model.bin\).*convert"):
        SafetensorsWeights(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..\\x", "", "."])
def test_index_must_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"not a plain file name|is missing"):
        SafetensorsWeights(sharded(tmp_path, {"a.weight": name}))


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"refers to m-9.safetensors, which is missing"):
        SafetensorsWeights(sharded(tmp_path, {"a.weight": "m-9.safetensors"}))
    with pytest.raises(CheckpointError, match=r"'b.weight' into m-1.safetensors, which lacks it"):
        SafetensorsWeights(sharded(tmp_path, {"b.weight": "m-1.safetensors"}))
    for broken in ({}, []):
        with pytest.raises(CheckpointError, match="weight_map must be an object"):
            SafetensorsWeights(sharded(tmp_path, broken))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"is missing|plain file name"):
        SafetensorsWeights(sharded(tmp_path, {"a.weight": 3}))  # type: ignore[dict-item]
    sharded(tmp_path)
    save_file({"a.weight": TENSORS["a.weight"], "b.weight": TENSORS["b.weight"]}, tmp_path / "m-2.safetensors")
    with pytest.raises(CheckpointError, match=r"'a.weight' is in both m-1.safetensors and m-2.safetensors"):
        SafetensorsWeights(tmp_path)


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        header(b"{}", 2**60),
        header(b"{]"),
        header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
        header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}') + b"x" * 8,
        header(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,1]}}') + b"x",
        header(b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}') + b"x",
    ],
)
def test_lying_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a valid safetensors file"):
        SafetensorsWeights(tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    path = single(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        SafetensorsWeights(tmp_path)


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_load_into_place(tmp_path: Path, threads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "PIECE_BYTES", 5000)
    big, other = torch.randn(1000, 7), torch.randn(64, 128).to(torch.bfloat16)
    folder = single(tmp_path, {"big": big, "q": other, "k": other + 1, "t": big + 1, "rotary.inv_freq": torch.ones(3)})
    fused = torch.nn.Parameter(torch.zeros(128, 128))
    destinations = {
        "big": Destination(torch.zeros(1000, 7)),
        "q": Destination(fused[:64]),
        "k": Destination(fused[64:]),
        "t": Destination(torch.zeros(7, 1000), transform=lambda tensor: tensor.t()),
    }
    progress: list[tuple[int, int]] = []
    weights = SafetensorsWeights(folder)
    report = load(weights, destinations, ["*.inv_freq"], threads, lambda done, total: progress.append((done, total)))
    assert torch.equal(destinations["big"].tensor, big)
    assert torch.equal(destinations["t"].tensor, (big + 1).t())
    assert torch.equal(fused.detach(), torch.cat([other, other + 1]).float())
    assert report.bytes == 2 * big.nbytes + 2 * other.nbytes and report.seconds > 0
    assert progress == sorted(progress) and progress[-1] == (report.bytes, report.bytes) and len(progress) > 10
    assert torch.equal(weights.get("big"), big), "the file must read the same after its pages were released"


def test_everything_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    tensors = {"shape": torch.zeros(2, 3), "int": torch.zeros(2, dtype=torch.int64), "turned": torch.zeros(2, 3)}
    tensors |= {f"extra.{i}": torch.zeros(1) for i in range(15)} | {"good": torch.ones(4)}
    good = torch.zeros(4)
    destinations = {
        "shape": Destination(torch.zeros(3, 2)),
        "int": Destination(torch.zeros(2)),
        "turned": Destination(torch.zeros(6), transform=lambda tensor: tensor.view(7)),
        "good": Destination(good),
        "absent": Destination(torch.zeros(5, 6)),
    }
    with pytest.raises(CheckpointError) as caught:
        load(SafetensorsWeights(single(tmp_path, tensors)), destinations)
    message = str(caught.value)
    assert "1 missing from the checkpoint:\n    absent [5, 6]" in message
    assert "15 in the checkpoint, but the model has no place for it" in message and "and 5 more" in message
    assert "shape: expected [3, 2], found [2, 3]" in message
    assert "turned: found [2, 3], which cannot be rearranged" in message
    assert "int: expected torch.float32, found torch.int64" in message
    assert "good" not in message and torch.equal(good, torch.zeros(4)), "nothing may be copied"


def test_float8_is_not_silently_converted(tmp_path: Path) -> None:
    scaled = torch.ones(4, dtype=torch.float8_e4m3fn)
    weights = SafetensorsWeights(single(tmp_path, {"w": scaled}))
    with pytest.raises(CheckpointError, match="cannot be converted"):
        load(weights, {"w": Destination(torch.zeros(4))})
    load(weights, {"w": Destination(torch.zeros(4, dtype=torch.float8_e4m3fn))})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapped_pages_do_not_stay_in_memory(tmp_path: Path) -> None:
    def mapped_mib() -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
        return int(line.split()[1]) / 1024

    big = torch.ones(64, 1024, 1024, dtype=torch.uint8)
    weights = SafetensorsWeights(single(tmp_path, {"w": big}))
    before = mapped_mib()
    load(weights, {"w": Destination(torch.zeros_like(big))})
    assert mapped_mib() - before < 16
