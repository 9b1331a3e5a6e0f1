"""Which of the compiled instruction sets this CPU can run.

Each set is named after its most telling member; a CPU that runs one runs all that follow it.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

_AVX2 = ("avx2", "fma", "f16c", "bmi2")
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vnni", "avx512_bf16")
_AMX = ("amx_tile", "amx_bf16", "amx_int8")

# Set -> flags of /proc/cpuinfo it needs, best first. The compiler's flags follow from them.
REQUIRES: dict[str, tuple[str, ...]] = {
    "amx": _AVX2 + _AVX512 + _AMX,
    "avx512": _AVX2 + _AVX512,
    "avx2": _AVX2,
}

# SKYLINE_CPU_ISA=avx2 runs a lesser set than the CPU has, "none" only torch: for tests and comparisons.
OVERRIDE = "SKYLINE_CPU_ISA"


def compiler_flags(isa: str) -> list[str]:
    return [
        f"-m{flag.replace('_', '-', 1) if flag.startswith('amx') else flag.replace('_', '')}" for flag in REQUIRES[isa]
    ]


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The flags of this machine's CPU; empty where they cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def supported() -> list[str]:
    """The sets this CPU runs, best first."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    return [isa for isa, needed in REQUIRES.items() if cpu_flags().issuperset(needed)]


def detect() -> str:
    """The set to use: "amx", "avx512", "avx2" or "none". Raises ValueError if the override asks for another."""
    have = [*supported(), "none"]
    wanted = os.environ.get(OVERRIDE)
    if wanted is None:
        return have[0]
    if wanted not in have:
        raise ValueError(f"{OVERRIDE}={wanted}: this CPU supports {', '.join(have)}")
    return wanted


def cpu_model() -> str:
    """The processor's name as Linux tells it, or an empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
