"""The weight cache: the same bits as without it, and never worse than without it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from skyline import LLM, SamplingParams
from skyline.checkpoint.cache import cache_folder
from skyline.cli import app, console
from skyline.engine.config import EngineConfig
from skyline.engine.messages import EngineOutput
from skyline.kernels.cpu import native
from skyline.kernels.cpu.packed import Format
from skyline.runner import weight_cache
from skyline.runner.checkpoint import Checkpoint
from skyline.runner.loader import LoadedModel, load_model
from tests.oracle.engine import Job, run_engine
from tests.tiny import make_tiny_checkpoint

SCHEMES = ["none", "int8", "int8-weight-only", "int4"]
MOE: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, decoder_sparse_step=1)


@pytest.fixture(scope="module")
def moe_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe") / "tiny-qwen3-moe"
    return make_tiny_checkpoint(folder, "qwen3moe", tie_word_embeddings=False, **MOE)


@pytest.fixture(params=["dense", "mixture"])
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> Path:
    if request.param == "dense":
        return tiny_checkpoint
    folder: Path = request.getfixturevalue("moe_checkpoint")
    return folder


@pytest.fixture(autouse=True)
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the entries, empty. The compiled kernels are those of the real cache."""
    kernels = cache_folder() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(kernels)
    monkeypatch.setenv("SKYLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, nobody reads the checkpoint's tensors; of their headers follows what is wanted of them."""

    def read(*_: object) -> NoReturn:
        raise AssertionError("the checkpoint's tensors were read")

    return lambda: monkeypatch.setattr(Checkpoint, "load", read)


def start(folder: Path, cached: bool = True, **settings: Any) -> LoadedModel:
    settings = {"dtype": "bfloat16", "num_kv_blocks": 8, **settings}
    return load_model(EngineConfig(model=str(folder), weight_cache=cached, **settings))


def weights(loaded: LoadedModel) -> list[torch.Tensor]:
    """The memory of every weight of the program, as bytes."""
    found: list[torch.Tensor] = []
    for use in loaded.program.weights:
        value = loaded.program._constants[use.slot]
        parts = [value] if isinstance(value, torch.Tensor) else [getattr(value, n, None) for n in value.__slots__]
        found += [part.reshape(-1).view(torch.uint8) for part in parts if isinstance(part, torch.Tensor)]
    assert len(found) >= len(loaded.program.weights)
    return found


def same(a: LoadedModel, b: LoadedModel) -> bool:
    pairs = list(zip(weights(a), weights(b), strict=True))
    return all(torch.equal(x, y) for x, y in pairs)


def from_cache(loaded: LoadedModel) -> bool:
    return loaded.report["architecture"].endswith("MiB from the weight cache")


def written(loaded: LoadedModel) -> bool:
    return loaded.report["architecture"].endswith("MiB written to the weight cache")


def only_entry(entries: Path) -> Path:
    (entry,) = entries.glob("*.safetensors")
    assert not list(entries.glob("*.part"))
    return entry


def generate(folder: Path, **settings: Any) -> list[EngineOutput]:
    """Tokens and their logarithms of probability, which are equal only if the logits are."""
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True)
    results, _ = run_engine(folder, [Job("a", [5, 6, 7, 8, 9], params)], dtype="bfloat16", num_kv_blocks=8, **settings)
    outputs = results["a"].outputs
    assert len(results["a"].token_ids) == 12 and all(output.logprobs for output in outputs if output.token_ids)
    return outputs


# --- the same bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_same_weights(checkpoint: Path, scheme: str, refuse: Callable[[], None], entries: Path) -> None:
    plain = start(checkpoint, cached=False, quantization=scheme)
    assert not entries.exists() and not from_cache(plain) and not written(plain)
    first = start(checkpoint, quantization=scheme)
    assert written(first) and same(first, plain)
    refuse()
    second = start(checkpoint, quantization=scheme)
    assert from_cache(second) and same(second, plain)
    assert {weight.data_ptr() for weight in weights(second)}.isdisjoint(w.data_ptr() for w in weights(first))


@pytest.mark.parametrize("scheme", ["none", "int8", "int4"])
def test_same_weights_without_kernels(tiny_checkpoint: Path, scheme: str, refuse: Callable[[], None]) -> None:
    """torch's own layouts, and weights that lie as in the checkpoint."""
    with native.using("none"):
        plain = start(tiny_checkpoint, cached=False, quantization=scheme)
        assert written(start(tiny_checkpoint, quantization=scheme))
        refuse()
        second = start(tiny_checkpoint, quantization=scheme)
        assert from_cache(second) and same(second, plain)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_same_tokens(checkpoint: Path, scheme: str, refuse: Callable[[], None]) -> None:
    plain = generate(checkpoint, quantization=scheme)
    assert generate(checkpoint, quantization=scheme, weight_cache=True) == plain
    refuse()
    assert generate(checkpoint, quantization=scheme, weight_cache=True) == plain


def test_pieces_and_steps(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors larger than a piece, pieces larger than a step, and neither a multiple of the other."""
    monkeypatch.setattr(weight_cache, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(weight_cache, "STEP_BYTES", 768)
    plain = start(tiny_checkpoint, cached=False)
    start(tiny_checkpoint)
    second = start(tiny_checkpoint)
    assert from_cache(second) and same(second, plain)


# --- the file -----------------------------------------------------------------------------------------------------


def test_an_entry_is_a_safetensors_file(tiny_checkpoint: Path, entries: Path) -> None:
    loaded = start(tiny_checkpoint, quantization="int8")
    entry = only_entry(entries)
    assert entry.stat().st_mode & 0o777 == 0o600
    with safe_open(entry, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = json.loads(file.metadata()["skyline"])
    assert tensors.pop(weight_cache.CHECKSUMS).dtype == torch.int64
    mine = sorted(bytes(weight.numpy()) for weight in weights(loaded))
    assert sorted(bytes(tensor.reshape(-1).view(torch.uint8).numpy()) for tensor in tensors.values()) == mine
    assert described["quantization"] == "int8" and described["isa"] == native.available()
    assert described["files"][0][0] == str((tiny_checkpoint / "model.safetensors").resolve())
    if native.available() != "none":
        assert "lm_head.weight/int8/sums" in tensors or "model.embed_tokens.weight/int8/sums" in tensors


def _flip(entry: Path, at: int) -> None:
    data = bytearray(entry.read_bytes())
    data[at] ^= 0x10
    entry.write_bytes(data)


def _cut_a_hole(entry: Path) -> None:
    size = entry.stat().st_size
    os.truncate(entry, size // 2)
    os.truncate(entry, size)


def _replace(entry: Path, old: bytes, new: bytes) -> None:
    data = entry.read_bytes()
    assert old in data
    entry.write_bytes(data.replace(old, new, 1))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a bit of the first weight": lambda e: _flip(e, 8 + int.from_bytes(e.read_bytes()[:8], "little")),
    "a bit in the middle": lambda e: _flip(e, e.stat().st_size // 2),
    "a bit of the checksums": lambda e: _flip(e, e.stat().st_size - 8),
    "truncated": lambda e: os.truncate(e, e.stat().st_size - 100),
    "longer": lambda e: os.truncate(e, e.stat().st_size + 100),
    "a hole, as after a crash": lambda e: (size := e.stat().st_size, os.truncate(e, size // 2), os.truncate(e, size))[
        0
    ],
    "empty": lambda e: os.truncate(e, 0),
    "an absurd length of the header": lambda e: _flip(e, 7),
    "another description": lambda e: _replace(e, b"quantization", b"quantisation"),
    "another name": lambda e: _replace(e, b"model.norm.weight", b"model.nose.weight"),
    "another dtype": lambda e: _replace(e, b'"BF16"', b'"F16" '),
    "another shape": lambda e: _replace(e, b'"shape": [64]', b'"shape": [46]'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_written_anew(
    tiny_checkpoint: Path, damage: str, entries: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = start(tiny_checkpoint, quantization="int8")
    intact = only_entry(entries).read_bytes()
    DAMAGE[damage](only_entry(entries))
    assert only_entry(entries).read_bytes() != intact
    with caplog.at_level(logging.WARNING):
        again = start(tiny_checkpoint, quantization="int8")
        assert len(caplog.records) == 1 and "the checkpoint is read instead" in caplog.text
        assert written(again) and same(again, plain)
        assert only_entry(entries).read_bytes() == intact
        assert from_cache(start(tiny_checkpoint, quantization="int8"))
        assert len(caplog.records) == 1


def test_padding_is_zero_after_a_damaged_entry(tmp_path: Path, entries: Path) -> None:
    """Rows that no weight fills, which a damaged entry may have filled with anything."""
    folder = make_tiny_checkpoint(tmp_path / "odd", hidden_size=40, intermediate_size=72)
    plain = start(folder, quantization="int8")
    entry = only_entry(entries)
    data = bytearray(entry.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin:-8] = b"\xff" * (len(data) - 8 - begin)
    entry.write_bytes(data)
    assert same(start(folder, quantization="int8"), plain)


# --- the key ------------------------------------------------------------------------------------------------------


def test_whatever_changes_the_bytes_makes_another_entry(
    tiny_checkpoint: Path, tmp_path: Path, entries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    file = folder / "model.safetensors"

    def makes_new(**settings: Any) -> bool:
        before = set(entries.glob("*.safetensors"))
        loaded = start(folder, **settings)
        new = set(entries.glob("*.safetensors")) - before
        assert written(loaded) == bool(new) == (not from_cache(loaded))
        return bool(new)

    assert makes_new() and not makes_new()
    assert not makes_new(quantization="none") and not makes_new(max_num_seqs=8)
    assert makes_new(dtype="float32")
    assert makes_new(quantization="int8") and makes_new(quantization="int8-weight-only")
    assert not makes_new(quantization="int8", quantization_group=128)  # int8 has no groups
    assert makes_new(quantization="int4") and makes_new(quantization="int4", quantization_group=32)
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert makes_new()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not makes_new()
    _lengthen(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert makes_new()
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    assert makes_new()
    (folder / "extra").mkdir()
    file.rename(folder / "extra" / "model.safetensors")
    file.symlink_to(folder / "extra" / "model.safetensors")
    assert makes_new()
    with monkeypatch.context() as patch:
        patch.setattr(weight_cache, "_SOURCES", ("quantization",))  # other Python sources
        assert makes_new()
    assert not makes_new()
    if native.available() != "none":
        with native.using("none"):
            assert makes_new()
        monkeypatch.setattr(weight_cache, "library_path", lambda isa: Path("cpu-other-sources.so"))
        assert makes_new()


def _lengthen(file: Path) -> None:
    """Pad the header: another size, the same tensors."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    file.write_bytes((length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :])


def test_a_changed_checkpoint_is_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    before = start(folder)
    make_tiny_checkpoint(folder, seed=1)
    after = start(folder)
    assert written(after) and not same(after, before)
    assert same(after, start(folder, cached=False))


# --- trouble ------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_used(tiny_checkpoint: Path, entries: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries.write_text("in the way")  # permissions would not stop root
    with caplog.at_level(logging.WARNING):
        loaded = start(tiny_checkpoint)
    assert len(caplog.records) == 1 and "cannot be cached" in caplog.text
    assert same(loaded, start(tiny_checkpoint, cached=False))
    assert not written(loaded) and not from_cache(loaded)


def test_a_full_disk(
    tiny_checkpoint: Path, entries: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def pwrite(file: int, data: bytes, at: int) -> int:
        calls.append(at)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return len(data)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "pwrite", pwrite)
        loaded = start(tiny_checkpoint)
    assert len(calls) > 3
    assert len(caplog.records) == 1 and "No space left on device" in caplog.text
    assert not written(loaded)
    assert not list(entries.glob("*.safetensors")) and not list(entries.glob("*.part"))
    assert written(start(tiny_checkpoint))


def test_two_processes_at_once(tiny_checkpoint: Path, entries: Path) -> None:
    code = (
        "import sys; from skyline.engine.config import EngineConfig; from skyline.runner.loader import load_model\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "config = EngineConfig(model=sys.argv[1], dtype='bfloat16', quantization='int8', num_kv_blocks=8,\n"
        "                      weight_cache=True)\n"
        "loaded = load_model(config)\n"
        "print(loaded.report['architecture'], flush=True); loaded.runner.close()\n"
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, "-c", code, str(tiny_checkpoint)]
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert not any("cannot be" in errors for _, errors in outputs), outputs
    assert any("written to the weight cache" in out for out, _ in outputs)
    only_entry(entries)
    third = start(tiny_checkpoint, quantization="int8")
    assert from_cache(third) and same(third, start(tiny_checkpoint, cached=False, quantization="int8"))


def test_who_finds_another_process_writing_does_not(
    tiny_checkpoint: Path, entries: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    start(tiny_checkpoint)
    entry = only_entry(entries)
    entry.unlink()
    with entry.with_suffix(".lock").open("w") as lock, caplog.at_level(logging.WARNING):
        fcntl.flock(lock, fcntl.LOCK_EX)
        loaded = start(tiny_checkpoint)
    assert not entry.exists() and not written(loaded) and not caplog.records
    assert same(loaded, start(tiny_checkpoint, cached=False))


# --- the option ---------------------------------------------------------------------------------------------------


def test_settings_that_contradict_it(tiny_checkpoint: Path) -> None:
    assert not EngineConfig(model="m").weight_cache
    EngineConfig(model="m", weight_cache=True).validate()
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match="weight_cache is for the CPU's kernels"):
            EngineConfig(model="m", device=device, weight_cache=True).validate()
    with pytest.raises(ValueError, match="load_format dummy"):
        EngineConfig(model="m", load_format="dummy", weight_cache=True).validate()
    with pytest.raises(ValueError, match="weight_cache is for the CPU's kernels"):
        LLM(tiny_checkpoint, device="cuda", weight_cache=True)


@pytest.mark.parametrize("command", ["serve", "generate", "chat", "profile"])
def test_commands_pass_it_on(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def record(model: str | None, **fields: object) -> NoReturn:
        given.update(fields)
        raise typer.Exit(7)

    monkeypatch.setattr(console, "engine_config", record)
    assert CliRunner().invoke(app, [command, "m", "--weight-cache"]).exit_code == 7
    assert given.pop("weight_cache") is True
    assert CliRunner().invoke(app, [command, "m"]).exit_code == 7
    assert given["weight_cache"] is False


def test_llm_passes_it_on(tiny_checkpoint: Path, entries: Path) -> None:
    rows: list[str] = []
    for _ in range(2):
        with LLM(tiny_checkpoint, quantization="int8", max_model_len=64, threads=1, weight_cache=True) as llm:
            rows.append(llm._ready.report["architecture"])
        only_entry(entries)
    assert rows[0].endswith("MiB written to the weight cache") and rows[1].endswith("MiB from the weight cache")


@pytest.mark.skipif(native.available() != "avx512", reason="weights are compressed with AVX-512 alone")
def test_weights_that_cannot_be_compressed_are_read_again(
    tiny_checkpoint: Path, tmp_path: Path, entries: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are in another layout than the cache was told of."""
    folder = tmp_path / "irregular"
    shutil.copytree(tiny_checkpoint, folder)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    sizes = torch.randint(-60, 1, tensors[name].shape, generator=torch.Generator().manual_seed(3))
    tensors[name] *= 2.0**sizes
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    first, second = start(folder), start(folder)
    assert f"{name} cannot be compressed, so that the weights are not cached" in caplog.text
    assert not written(first) and not from_cache(second) and not list(entries.glob("*"))
    assert same(first, second)
    packed = [first.program.constant(use.slot) for use in first.program.weights if use.layout is not None]
    formats = [weight.layout.format for weight in packed]
    assert formats.count(Format.BFLOAT16) == 1 and formats.count(Format.COMPRESSED) == len(formats) - 1
    (plain,) = (weight for weight in packed if weight.layout.format is Format.BFLOAT16)
    assert torch.equal(plain.dense(torch.bfloat16), tensors[name].bfloat16())
