"""Machines as files of the kernel and an nvidia-smi of the test show them."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from skyline import __version__
from skyline.bench.hardware import PriceError, cpu_flags, detect, price_of, prices, provenance, usable_cores, uses_cuda
from skyline.bench.results import Hardware

XEON = """processor : 0
model name\t: Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz
flags\t\t: fpu avx2 fma avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8
"""
EPYC = "model name\t: AMD EPYC 9654 96-Core Processor\nflags\t: avx2 avx512f\n"
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm sve bf16\nCPU implementer\t: 0x41\n"


def _machine(root: Path, cpuinfo: str, *, smt: bool = False, quota: str | None = None) -> Path:
    (root / "proc").mkdir(parents=True)
    (root / "proc/cpuinfo").write_text(cpuinfo)
    for index, cpu in enumerate(sorted(os.sched_getaffinity(0))):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text(f"{index // 2 if smt else index}\n")
    if quota is not None:
        (root / "sys/fs/cgroup").mkdir(parents=True)
        (root / "sys/fs/cgroup/cpu.max").write_text(quota)
        (root / "sys/fs/cgroup/memory.max").write_text("1073741824\n")
    return root


def _smi(folder: Path, gpus: list[str]) -> str:
    folder.mkdir(exist_ok=True)
    program = folder / "nvidia-smi"
    lines = [f"{index}, GPU-{index}aa, {gpu}, 81559 MiB, 570.1" for index, gpu in enumerate(gpus)]
    program.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    program.chmod(0o755)
    return str(program)


CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (XEON, "Intel Xeon Platinum 8480+ core (AMX)"),
        (EPYC, "AMD EPYC 9654 core (AVX-512)"),
        ("model name : Old\nflags : sse2\n", "Old core (no vector units)"),
    ],
)
def test_a_cpu_is_named_by_its_model_cores_and_best_unit(tmp_path: Path, cpuinfo: str, name: str) -> None:
    found = detect(_machine(tmp_path, cpuinfo), nvidia_smi="none")
    assert found.name == f"{CORES}x {name}"
    assert found.cores == CORES and found.accelerators == [] and found.driver is None


def test_an_arm_cpu(tmp_path: Path) -> None:
    found = detect(_machine(tmp_path, GRAVITON), nvidia_smi="none")
    assert found.name == f"{CORES}x {platform.machine()} core (SVE)"
    assert {"sve", "i8mm", "bf16"} <= set(found.flags)


def test_flags_that_matter_are_listed(tmp_path: Path) -> None:
    root = _machine(tmp_path, XEON)
    assert detect(root, nvidia_smi="none").flags == [
        "amx_tile",
        "avx512_bf16",
        "avx512_vnni",
        "avx512f",
        "avx2",
        "amx_bf16",
        "amx_int8",
        "fma",
    ]
    assert "fpu" in cpu_flags(root)


def test_two_threads_of_a_core_are_one(tmp_path: Path) -> None:
    assert usable_cores(_machine(tmp_path, XEON, smt=True)) == (CORES + 1) // 2


def test_a_control_group_limits_cores_and_memory(tmp_path: Path) -> None:
    root = _machine(tmp_path, XEON, quota="50000 100000")
    found = detect(root, nvidia_smi="none")
    assert found.cores == 1 and found.memory_bytes == 2**30
    assert usable_cores(_machine(tmp_path / "free", XEON, quota="max 100000")) == CORES


def test_gpus_name_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    root = _machine(tmp_path / "root", XEON)
    same = _smi(tmp_path / "same", ["NVIDIA H200"] * 8)
    found = detect(root, same)
    assert found.name == "8x NVIDIA H200" and found.driver == "570.1"
    assert found.accelerators == ["NVIDIA H200, 81559 MiB"] * 8
    mixed = _smi(tmp_path / "mixed", ["NVIDIA A100", "NVIDIA H100", "NVIDIA A100"])
    assert detect(root, mixed).name == "2x NVIDIA A100 + 1x NVIDIA H100"


@pytest.mark.parametrize(
    ("visible", "count"), [("0,2", 2), ("", 0), ("-1", 0), ("GPU-1aa", 1), ("1,9,0", 1), ("0, 1 ,2", 3)]
)
def test_only_visible_gpus_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    smi = _smi(tmp_path, ["NVIDIA H100"] * 3)
    assert len(detect(nvidia_smi=smi).accelerators) == count
    assert uses_cuda({}, smi) == (count > 0)
    assert uses_cuda({"CUDA_VISIBLE_DEVICES": "0"}, smi)
    assert not uses_cuda({"CUDA_VISIBLE_DEVICES": ""}, smi)


def test_an_nvidia_smi_that_fails_means_no_gpu(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    program.chmod(0o755)
    assert detect(nvidia_smi=str(program)).accelerators == []


def test_a_machine_without_any_of_these_files(tmp_path: Path) -> None:
    found = detect(tmp_path, nvidia_smi="none")
    assert found.cores == CORES and found.name.endswith("core (no vector units)")


def test_this_machine_is_the_same_each_time() -> None:
    assert detect() == detect()
    assert detect().cores >= 1 and detect().memory_bytes > 2**20 and "Linux" in detect().system


def test_provenance() -> None:
    found = provenance(command="skyline bench run quick", suite_hash="abc")
    assert found.skyline_version == __version__ and found.hardware == detect()
    assert found.command == "skyline bench run quick" and found.suite_hash == "abc" and found.engine_version is None
    hardware = Hardware(name="8x NVIDIA H200")
    assert provenance(hardware=hardware).hardware is hardware


def test_shipped_prices() -> None:
    table = prices(user=Path("/nowhere"))
    assert price_of("8x NVIDIA H100 80GB HBM3", table) == 1.30
    assert price_of("1x NVIDIA GB200", table) == 2.21
    assert price_of("8x AMD Instinct MI300X", table) == 1.12
    assert price_of("H200", table) == 1.41
    assert price_of("1x NVIDIA GH200 480GB", table) is None
    assert price_of("2x NVIDIA A100 + 1x NVIDIA H100", table) is None
    assert price_of("", table) is None


def test_a_cpu_machine_costs_as_much_as_its_cores() -> None:
    assert price_of(Hardware(name="16x AMD EPYC core (AVX2)"), {"AMD EPYC core*": 0.05}) == pytest.approx(0.8)
    assert price_of("16x AMD EPYC core (AVX2)", prices(user=Path("/nowhere"))) == pytest.approx(0.8)


def test_the_users_prices_go_first(tmp_path: Path) -> None:
    mine = tmp_path / "prices.yaml"
    mine.write_text('"nvidia h100*": 2\n"NVIDIA A100*": 0.9\n')
    table = prices(user=mine)
    assert price_of("8x NVIDIA H100 80GB HBM3", table) == 2.0
    assert price_of("1x NVIDIA A100", table) == 0.9
    assert price_of("1x NVIDIA H200", table) == 1.41
    mine.write_text("")
    with pytest.raises(PriceError, match="must be a mapping"):
        prices(user=mine)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("H100: cheap", "'H100': 'cheap' is not a price"),
        ("H100: -1", "a price cannot be -1"),
        ("H100: .nan", "a price cannot be nan"),
        ("H100: true", "is not a price"),
        ("- 1", "must be a mapping"),
        ("{", "cannot read the prices"),
    ],
)
def test_wrong_prices(tmp_path: Path, text: str, why: str) -> None:
    mine = tmp_path / "prices.yaml"
    mine.write_text(text)
    with pytest.raises(PriceError, match=why):
        prices(user=mine)
