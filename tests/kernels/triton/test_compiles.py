"""Every kernel goes through NVIDIA's assembler for GPUs that are not there, and fits their memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def compile_all(capability: int, most: int) -> str:
    command = [sys.executable, "-m", "tests.kernels.triton.offline", str(capability), "--most", str(most)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}  # what is interpreted cannot be compiled
    run = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def test_on_hopper() -> None:
    lines = compile_all(90, 1).splitlines()
    assert len({line.split()[0] for line in lines}) >= 30, "fewer ops than there are kernels for"
    for line in lines:
        words = line.split()
        stack = int(words[words.index("stack") - 1])
        assert stack <= 64, f"registers are spilled: {line}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_on_every_generation(capability: int) -> None:
    assert compile_all(capability, 12)
