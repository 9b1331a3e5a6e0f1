"""Tactics give the same bits whichever is chosen, and the measured one runs. Which is faster is not tested."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skyline.engine.config import EngineConfig
from skyline.kernels import candidates, tuning
from skyline.kernels.cpu import native
from skyline.kernels.cpu.linear import DEFAULT, Tactic
from skyline.kernels.cpu.packed import Format, PackedWeight, pack, packed_layout
from skyline.kernels.tuning import Tunings, bucket, fastest, kept, place, save
from skyline.ops import Fp8Weight
from skyline.ops.formats import IntegerFormat, set_integers
from skyline.ops.fp8 import FP8
from skyline.ops.quantized import ByteRows
from skyline.runner.loader import load_model
from skyline.runner.tune import tune
from tests.cli.test_commands import one_red_line, skyline

pytestmark = pytest.mark.skipif(native.available() == "none", reason="no compiled kernels here")

FORMATS = {
    "bfloat16": ("linear", Format.BFLOAT16, 0),
    "bfloat16 in 12 bits": ("linear", Format.COMPRESSED, 0),
    "int8": ("linear_int8", Format.INT8, 0),
    "int8 weight only": ("linear_int8_weight_only", Format.INT8_WEIGHT_ONLY, 0),
    "int4 by 32": ("linear_int4", Format.INT4, 32),
    "int4 by 128": ("linear_int4", Format.INT4, 128),
    "mxfp4": ("linear_fp4", Format.FP4, 32),
    "fp8": ("linear_fp8", Format.FP8, 0),
    "fp8 in blocks": ("linear_fp8", Format.FP8, 128),
    "bytes by 32": ("linear", Format.BYTES, 32),
}


def weight_of(format: Format, group: int, weight: torch.Tensor, gated: bool = False) -> PackedWeight:
    """Packed; blocks of FP8, and bytes, are not made of rows."""
    layout = packed_layout(format, gated=gated, group=group)
    if format is Format.COMPRESSED and native.available() == "avx2":
        pytest.skip("not for AVX2")
    if format is Format.BYTES:
        factors = torch.linspace(0.5, 2.0, weight.shape[0] * -(-weight.shape[1] // group)) / 1000
        levels = (weight * 1000).round().clamp(-128, 127).to(torch.int8)
        return pack(ByteRows(levels, factors.half().view(weight.shape[0], -1)), layout)
    if format is not Format.FP8 or not group:
        return pack(weight, layout)
    scales = torch.linspace(0.5, 2.0, -(-weight.shape[0] // group) * -(-weight.shape[1] // group)) / 16
    return pack(Fp8Weight((weight * 16).to(FP8), scales.view(-(-weight.shape[0] // group), -1)), layout)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuning, "cache_folder", lambda: tmp_path)
    return tmp_path


def kernel_of(op: str, format: Format, group: int) -> Any:
    weight = torch.randn(8, 128).bfloat16()
    if group:
        set_integers(weight, IntegerFormat(8 if format is Format.BYTES else 4, group, widened=format is Format.BYTES))
    for kernel in candidates(op):
        if kernel.provider == native.PROVIDER:
            layout: Any = kernel.layouts[1]
            if layout((None, weight)) is packed_layout(format, group=group):
                return kernel
    raise AssertionError(f"no kernel of {op} for {format!r}")


@pytest.mark.parametrize("name", FORMATS)
def test_every_tactic_gives_the_same_bits(name: str, instruction_set: str) -> None:
    op, format, group = FORMATS[name]
    kernel = kernel_of(op, format, group)
    weight = weight_of(format, group, torch.randn(72, 1100).bfloat16() / 32)
    for rows in (1, 2, 7, 16, 65, 300, 600):
        x = torch.randn(rows, 1100).bfloat16()
        expected, got = torch.empty(rows, 72).bfloat16(), torch.empty(rows, 72).bfloat16()
        kernel.into(expected, x, weight)
        first, *others = kernel.tactics(rows)
        assert first == DEFAULT and len({first, *others}) == 1 + len(others)
        for tactic in others:
            kernel.into(got.fill_(7), x, weight, tactic=tactic)
            assert torch.equal(got, expected), (rows, tactic)


def test_there_is_something_to_choose_from() -> None:
    assert len(kernel_of("linear", Format.BFLOAT16, 0).tactics(256)) > 1
    few = kernel_of("linear_int4", Format.INT4, 64).tactics(8)
    assert (len(few) > 1) == (native.available() == "amx")


def test_a_tactic_that_does_not_exist_is_refused() -> None:
    weight = pack(torch.randn(8, 64).bfloat16(), packed_layout(Format.BFLOAT16))
    x, out = torch.randn(2, 64).bfloat16(), torch.empty(2, 8).bfloat16()
    for tactic in (Tactic(rows=1024), Tactic(piece=100), Tactic(level_rows=-1)):
        with pytest.raises(ValueError, match="no tactic"):
            kernel_of("linear", Format.BFLOAT16, 0).into(out, x, weight, tactic=tactic)


def test_the_fastest_is_the_default_unless_another_is_clearly_better() -> None:
    assert fastest({"a": [3.0, 1.0, 2.0], "b": [1.99, 1.99, 1.99]}, ["a", "b"]) == "a"
    assert fastest({"a": [3.0, 1.0, 2.0], "b": [1.9, 9.0, 1.0], "c": [1.5, 1.5, 1.5]}, ["a", "b", "c"]) == "c"


def test_rows_fall_into_buckets() -> None:
    assert [bucket(rows) for rows in (1, 2, 3, 5, 100, 2048, 9999)] == [1, 2, 4, 8, 128, 2048, 2048]


def test_measure_keep_and_use(tiny_checkpoint: Path, folder: Path) -> None:
    config = EngineConfig(model=str(tiny_checkpoint), threads=1, quantization="int4", dtype="bfloat16")
    facts = tune(config, budget=60, most_rows=1024)
    file, found = kept(1)
    assert file.parent == folder and facts["file"] == str(file) and facts["left"] == 0
    assert {row["place"] for row in facts["places"]} == set(found.tactics) and len(found.tactics) >= 4
    assert all(row["seconds"] > 0 and row["default_s"] > 0 for row in facts["places"])
    many = [where for where in found.tactics if "1024 rows" in where]
    assert len(many) == 4 and not any(" 512x" in where for where in many)  # the head never sees so many
    assert any(" 512x" in where and "512 rows" in where for where in found.tactics)
    for row in facts["places"]:
        assert Tactic(**row["tactic"]) == Tactic(*found.tactics[row["place"]])

    # What is kept is what runs: choose something else than the default everywhere.
    found.tactics = dict.fromkeys(found.tactics, tuple(Tactic(rows=128)))
    save(file, found)
    loaded = load_model(config)
    try:
        assert "measured by `skyline tune`" in loaded.report["tuning"]
        steps = loaded.program._bind(100, 1).steps
        chosen = [step.run.keywords["tactic"] for step in steps if isinstance(step.run, functools.partial)]
        # Four products of the first layer and one of the second: behind its attention there is one row.
        assert chosen == [Tactic(rows=128)] * 5
        loaded.program.tune(Tunings(""))
        assert not any(isinstance(step.run, functools.partial) for step in loaded.program._bind(100, 1).steps)
    finally:
        loaded.runner.close()


def test_what_is_stale_or_damaged_is_not_used(folder: Path) -> None:
    file, nothing = kept(1)
    assert nothing.tactics == {}
    save(file, Tunings(nothing.measured_on, {"a": (1, 2, 3)}))
    assert kept(1)[1].tactics == {"a": (1, 2, 3)} and kept(2)[1].tactics == {}
    save(file, Tunings("another CPU", {"a": (1, 2, 3)}))
    assert kept(1)[1].tactics == {}
    for damaged in (b"", b"{", json.dumps({"measured_on": nothing.measured_on, "tactics": {"a": ["x"]}}).encode()):
        file.write_bytes(damaged)
        assert kept(1)[1] == nothing
    assert list(folder.iterdir()) == [file]


def test_an_unknown_tactic_is_the_default() -> None:
    kernel = kernel_of("linear", Format.BFLOAT16, 0)
    weight = pack(torch.randn(8, 64).bfloat16(), packed_layout(Format.BFLOAT16))
    where = place(kernel, 256, weight)
    assert Tunings("", {where: (9, 9, 9)}).into(kernel, 256, weight) is None
    assert Tunings("", {where: tuple(DEFAULT)}).into(kernel, 256, weight) is None
    assert Tunings("", {where: tuple(Tactic(rows=128))}).into(kernel, 16, weight) is None
    chosen = Tunings("", {where: tuple(Tactic(rows=128))}).into(kernel, 200, weight)
    assert isinstance(chosen, functools.partial) and chosen.keywords == {"tactic": Tactic(rows=128)}


def test_no_time_leaves_defaults(tiny_checkpoint: Path, folder: Path) -> None:
    facts = tune(EngineConfig(model=str(tiny_checkpoint), threads=1, dtype="bfloat16"), budget=0, most_rows=256)
    assert facts["places"] == [] and facts["left"] > 0


def test_the_command(tiny_checkpoint: Path) -> None:
    done = skyline("tune", str(tiny_checkpoint), "--dtype", "bfloat16", "--budget", "0", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["places"] == []
    assert "0 measured" in skyline("tune", str(tiny_checkpoint), "--budget", "0", "--threads", "1").stdout
    assert "no-such" in one_red_line(skyline("tune", "./no-such-model"))


def test_without_kernels_there_is_nothing_to_tune(tiny_checkpoint: Path) -> None:
    with native.using("none"), pytest.raises(ValueError, match="no such kernels"):
        tune(EngineConfig(model=str(tiny_checkpoint)), budget=1, most_rows=1)
