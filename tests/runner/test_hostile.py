"""Checkpoints that are damaged, lie, or bring code: a clear refusal from the engine's loader, and no code is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.hub import resolve
from skyline.engine.config import EngineConfig
from skyline.runner.export import export
from skyline.runner.loader import load_model
from tests.models.harness import save_tiny
from tests.tiny import make_tokenizer

SIZES: dict[str, Any] = dict(hidden_size=128, intermediate_size=256, head_dim=32, vocab_size=512)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    save_tiny(folder, "Qwen3", **SIZES)
    make_tokenizer(folder)
    return folder


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def _start(folder: Path, **settings: Any) -> None:
    load_model(EngineConfig(model=str(resolve(str(folder))), num_kv_blocks=8, threads=1, **settings)).runner.close()


def test_code_of_a_repository_does_not_run(plain: Path, tmp_path: Path) -> None:
    folder = _copy(plain, tmp_path / "evil")
    marker = tmp_path / "it ran"
    for name in ("modeling_evil.py", "configuration_evil.py", "__init__.py", "tokenization_evil.py", "setup.py"):
        (folder / name).write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    _start(folder)
    assert not marker.exists()


def _change_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def _change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _lie_about_sizes(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes((2**62).to_bytes(8, "little") + data[8:])


SCALE = "model.layers.1.mlp.up_proj.weight_scale"
DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated": ("int8", _truncate, "model.safetensors is not a valid safetensors file"),
    "a header of 2^62 bytes": ("int8", _lie_about_sizes, "model.safetensors is not a valid safetensors file"),
    "a NaN scale": ("int8", _change_tensors(lambda t: t[SCALE].__setitem__((3, 0), float("nan"))), SCALE),
    "an infinite scale": ("fp8", _change_tensors(lambda t: t[SCALE].__setitem__((3, 0), float("inf"))), SCALE),
    "a missing scale": ("fp8", _change_tensors(lambda t: t.pop(SCALE)), "up_proj"),
    "scales of another shape": ("int4", _change_tensors(lambda t: t.update({SCALE: t[SCALE][:-1]})), SCALE),
    "a method nobody knows": (
        "int8",
        _change_config(lambda c: c["quantization_config"].update(quant_method="magic")),
        r"'magic' is not supported.*awq.*compressed-tensors",
    ),
    "a method that is no text": (
        "int8",
        _change_config(lambda c: c["quantization_config"].update(quant_method=["a"] * 10_000)),
        "is not supported",
    ),
    "no sizes": ("int8", _change_config(lambda c: c.pop("hidden_size")), "hidden_size is missing"),
    "an architecture nobody knows": (
        "int8",
        _change_config(lambda c: c.update(architectures=["Qwen9ForCausalLM"])),
        "nearest supported one is Qwen",
    ),
    "a pattern that would take for ever": (
        "int8",
        _change_config(lambda c: c["quantization_config"].update(ignore=["re:(a+)+" * 20 + "$"])),
        "",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_refused(name: str, plain: Path, tmp_path: Path) -> None:
    format, damage, message = DAMAGES[name]
    export(plain, tmp_path / "small", format)
    _start(tmp_path / "small")  # it is fine as it is
    damage(tmp_path / "small")
    if not message:  # nothing is wrong with it but the attempt
        _start(tmp_path / "small")
        return
    with pytest.raises((CheckpointError, ValueError), match=message):
        _start(tmp_path / "small")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth"])
def test_pickle_is_refused(name: str, plain: Path, tmp_path: Path) -> None:
    folder = _copy(plain, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError, match="pickle"):
        _start(folder)
