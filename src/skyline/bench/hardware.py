"""The machine that serves: what it is, and what an hour of it costs.

Everything is read from files of the kernel and from nvidia-smi; nothing is loaded or measured. Paths are parameters, so
that tests can show it other machines.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import math
import os
import platform
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

import psutil
import yaml

from skyline.bench.results import Hardware, Provenance

# The name of what serves an endpoint that was not started here and of which nothing is said. It has no price.
UNKNOWN_HARDWARE = "unknown"

PRICES = Path(__file__).parent / "prices.yaml"
USER_PRICES = Path("~/.config/skyline/prices.yaml")

# The best of these that a CPU has goes into its name: it decides how fast matrices are multiplied.
_FLAGS = {
    "amx_tile": "AMX",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx2": "AVX2",
    "sve2": "SVE2",
    "sve": "SVE",
    "i8mm": "I8MM",
    "asimddp": "DotProd",
    "asimd": "NEON",
}
# Beside them in the list of flags: what else changes results.
_OTHER_FLAGS = ("amx_bf16", "amx_int8", "avx512_fp16", "avx512bw", "fma", "f16c", "bf16", "hypervisor")
_NOISE = re.compile(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*|\b\d+-Core\b", re.IGNORECASE)


class PriceError(ValueError):
    """A file of prices cannot be used; the message says what is wrong in it."""


def detect(root: Path = Path("/"), nvidia_smi: str = "nvidia-smi") -> Hardware:
    """This machine, as far as this process may use it. The same on every call while nothing is changed."""
    flags = cpu_flags(root)
    model, cores = _cpu_model(root), usable_cores(root)
    accelerators, driver = _accelerators(nvidia_smi, os.environ)
    best = next((name for flag, name in _FLAGS.items() if flag in flags), "no vector units")
    by_kind = Counter(accelerator.partition(",")[0] for accelerator in accelerators)
    names = [f"{count}x {kind}" for kind, count in by_kind.items()] or [f"{cores}x {model} core ({best})"]
    return Hardware(
        name=" + ".join(names),
        cpu=model,
        cores=cores,
        memory_bytes=_memory(root),
        flags=[flag for flag in (*_FLAGS, *_OTHER_FLAGS) if flag in flags],
        accelerators=accelerators,
        driver=driver,
        system=_system(root),
    )


def provenance(
    command: str | None = None, suite_hash: str | None = None, hardware: Hardware | None = None
) -> Provenance:
    """Of a result that is measured here and now; the engine's part is added when it runs."""
    return Provenance(
        skyline_version=importlib.metadata.version("skyline-llm"),
        python_version=platform.python_version(),
        hardware=hardware or detect(),
        command=command,
        suite_hash=suite_hash,
    )


def cpu_flags(root: Path = Path("/")) -> frozenset[str]:
    """What /proc/cpuinfo calls flags (x86) or Features (Arm)."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo(root), re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may run on, and no more than its control group has time for."""
    topology = root / "sys/devices/system/cpu"
    cores = set()
    for cpu in os.sched_getaffinity(0):
        package, core = (_read(topology / f"cpu{cpu}/topology/{name}") for name in ("physical_package_id", "core_id"))
        cores.add((package, core) if core is not None else (None, str(cpu)))
    quota, _, period = (_read(root / "sys/fs/cgroup/cpu.max") or "max").partition(" ")
    if quota != "max" and period:
        return max(1, min(len(cores), math.ceil(int(quota) / int(period))))
    return len(cores)


def uses_cuda(variables: Mapping[str, str], nvidia_smi: str = "nvidia-smi") -> bool:
    """Whether a process with these variables beside ours sees an NVIDIA GPU."""
    return bool(_accelerators(nvidia_smi, {**os.environ, **variables})[0])


def prices(*, shipped: Path = PRICES, user: Path = USER_PRICES) -> dict[str, float]:
    """$ per device-hour by pattern of the hardware's name, the user's own first. Raises PriceError."""
    found: dict[str, float] = {}
    for path in (user.expanduser(), shipped):
        if path.is_file():
            for pattern, price in _price_file(path).items():
                found.setdefault(pattern, price)
    return found


def price_of(hardware: Hardware | str, table: Mapping[str, float] | None = None) -> float | None:
    """$ per device-hour, None if no pattern fits. A CPU machine is one device: its price is that of all its cores.

    Patterns are of one device ("NVIDIA H100*", "AMD EPYC core*"), `*` stands for anything, and the first that fits
    counts. Mixed accelerators have no price.
    """
    name = hardware if isinstance(hardware, str) else hardware.name
    found = re.fullmatch(r"(?:(\d+)x )?([^+]*)", name)
    if found is None:
        return None
    count, device = int(found.group(1) or 1), found.group(2)
    for pattern, price in (prices() if table is None else table).items():
        if fnmatchcase(device.lower(), pattern.lower()):
            return price * count if re.search(r" core( \(.*\))?$", device) else price
    return None


def _price_file(path: Path) -> dict[str, float]:
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PriceError(f"cannot read the prices in {path}: {error}") from None
    if not isinstance(data, dict):
        raise PriceError(f"{path} must be a mapping from hardware to $ per device-hour, as {{NVIDIA H100*: 2.5}}")
    for pattern, price in data.items():
        if not isinstance(pattern, str) or isinstance(price, bool) or not isinstance(price, int | float):
            raise PriceError(f"{path}: {pattern!r}: {price!r} is not a price in $ per device-hour")
        if not 0 <= price < math.inf:
            raise PriceError(f"{path}: {pattern}: a price cannot be {price}")
    return {pattern: float(price) for pattern, price in data.items()}


def _accelerators(nvidia_smi: str, variables: Mapping[str, str]) -> tuple[list[str], str | None]:
    """("NAME, N MiB" of each visible GPU, driver)."""
    rows = [row for row in _query(nvidia_smi) if len(row) == 5]
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # By index or by the beginning of the UUID; as CUDA does, what comes after an invalid entry is not seen.
        wanted = [entry.strip() for entry in visible.split(",")]
        chosen = []
        for entry in wanted:
            row = next((row for row in rows if row[0] == entry or (entry and row[1].startswith(entry))), None)
            if row is None:
                break
            chosen.append(row)
        rows = chosen
    return [f"{name}, {memory}" for _, _, name, memory, _ in rows], rows[0][4] if rows else None


@lru_cache
def _query(nvidia_smi: str) -> tuple[tuple[str, ...], ...]:
    program = shutil.which(nvidia_smi)
    if program is None:
        return ()
    asked = [program, "--query-gpu=index,uuid,name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    # It also says "No devices were found" on stdout, and then ends with another status.
    if done.returncode != 0:
        return ()
    return tuple(tuple(cell.strip() for cell in row) for row in csv.reader(done.stdout.splitlines()))


def _cpu_model(root: Path) -> str:
    found = re.search(r"^(?:model name|cpu model|Hardware)\s*:(.*)$", _cpuinfo(root), re.MULTILINE)
    # Arm's kernels give no name.
    name = found.group(1) if found else ""
    return " ".join(_NOISE.sub(" ", name).split()) or platform.machine()


def _memory(root: Path) -> int:
    """Bytes: the machine's, or the control group's limit where that is less."""
    total = psutil.virtual_memory().total
    with contextlib.suppress(TypeError, ValueError):
        total = min(total, int(_read(root / "sys/fs/cgroup/memory.max") or "max"))
    return total


def _system(root: Path) -> str:
    release = _read(root / "etc/os-release") or ""
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', release, re.MULTILINE)
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    return f"{kernel}, {found.group(1)}" if found else kernel


def _cpuinfo(root: Path) -> str:
    return _read(root / "proc/cpuinfo") or ""


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError:
        return None
