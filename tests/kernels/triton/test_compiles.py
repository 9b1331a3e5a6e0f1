"""Every kernel goes through NVIDIA's assembler for GPUs that are not there, and fits their memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def compile_all(capability: int, most: int) -> str:
    return _compile("offline", str(capability), "--most", str(most))


def _compile(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"tests.kernels.triton.{module}", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}  # what is interpreted cannot be compiled
    run = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def test_on_hopper() -> None:
    lines = compile_all(90, 1).splitlines()
    assert len({line.split()[0] for line in lines}) >= 30, "fewer ops than there are kernels for"
    _spill_nothing(lines)


@pytest.mark.parametrize("capability", [90, 100])
def test_large_products_of_blocks_spill_no_registers(capability: int) -> None:
    """They scale each block's products in registers: a tile of 64 x 128 was 440 bytes a thread too large for four
    warps, and on Blackwells of data centers one of 128 x 128 for eight."""
    lines = _compile("real_sizes", str(capability)).splitlines()
    assert {line.split()[0] for line in lines} >= {"_grouped_kernel", "tiles_kernel", "bands_kernel"}
    # Those of 64 rows, gated, lack 136 bytes on a Blackwell.
    _spill_nothing([line for line in lines if capability == 90 or not line.startswith("bands_kernel")])


def _spill_nothing(lines: list[str]) -> None:
    for line in lines:
        words = line.split()
        stack = int(words[words.index("stack") - 1])
        assert stack <= 64, f"registers are spilled: {line}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_on_every_generation(capability: int) -> None:
    assert compile_all(capability, 12)
