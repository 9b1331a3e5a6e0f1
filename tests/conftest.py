"""Fixtures that every folder of tests may use."""

from __future__ import annotations

import os

# Tests run side by side, also those that start an engine process: more threads than cores would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads it when kernels are defined: without a GPU they run in its interpreter.
if not os.path.exists("/proc/driver/nvidia"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest

from skyline.demo import DEMO_PATH
from skyline.kernels.cpu import isa, native
from tests.tiny import make_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A servable random Qwen3 checkpoint (2 layers, 512 tokens, context 256). See tests/tiny.py."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-qwen3")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The embedded model's folder."""
    return DEMO_PATH


@pytest.fixture(params=[*isa.REQUIRES])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set that the CPU kernels are compiled for; they run in it until the test ends."""
    chosen: str = request.param
    if chosen not in isa.supported():
        pytest.skip(f"this CPU has no {chosen}")
    with native.using(chosen):
        yield chosen
