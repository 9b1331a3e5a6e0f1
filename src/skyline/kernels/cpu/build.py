"""Builds the C++ kernels with the system's compiler, once for each state of the sources, and loads the result.

The library lies in the cache folder under a name made of everything it depends on, with its own checksum beside it, so
that a stale or damaged file is never loaded. Any number of processes may ask at once: one builds, the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from skyline.checkpoint.cache import cache_folder
from skyline.kernels.cpu import isa as instruction_sets

SOURCES = Path(__file__).parent / "csrc"
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a multiply and an add are fused where the source says so, and nowhere else
    "-Wno-maybe-uninitialized",  # GCC's own intrinsics headers
    "-Wno-uninitialized",
)


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded here; the message says why, in one line."""


@functools.cache
def compiler() -> tuple[str, str]:
    """The C++ compiler's command and its version line. Raises BuildError if there is none."""
    command = os.environ.get("CXX") or next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
    if command is None:
        raise BuildError("no C++ compiler (g++ or clang++) is installed")
    try:
        result = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the C++ compiler {command!r} does not run: {error}") from error
    return command, result.stdout.partition("\n")[0]


def library_path(isa: str) -> Path:
    """Where the library for this instruction set is or will be. Needs no compiler, so that a built cache is enough."""
    import tvm_ffi

    digest = hashlib.sha256()
    for part in (isa, tvm_ffi.__version__, *_FLAGS, *instruction_sets.compiler_flags(isa), os.environ.get("CXX", "")):
        digest.update(part.encode() + b"\0")
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return cache_folder() / "kernels" / f"cpu-{isa}-{digest.hexdigest()[:16]}.so"


def build(isa: str) -> tuple[Path, float]:
    """The library for this instruction set, built if need be, and the seconds that took. Raises BuildError."""
    path = library_path(isa)
    if _intact(path):
        return path, 0.0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"the cache folder {path.parent} cannot be made: {error.strerror}") from error
    began = time.perf_counter()
    with _locked(path.with_suffix(".lock")):
        if not _intact(path):
            _compile(isa, path)
    return path, time.perf_counter() - began


def is_built(isa: str) -> bool:
    """Whether a current, undamaged library for this instruction set is in the cache."""
    return _intact(library_path(isa))


@functools.cache
def load(isa: str) -> Any:
    """The functions of the library, as attributes of a tvm_ffi module. Raises BuildError."""
    import tvm_ffi

    path, _ = build(isa)
    try:
        return tvm_ffi.load_module(str(path))
    except Exception as error:
        raise BuildError(f"{path} does not load: {error}") from error


def _checksum_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _intact(path: Path) -> bool:
    try:
        return _checksum_file(path).read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released with the file, also when this process dies
        yield


def _compile(isa: str, path: Path) -> None:
    from tvm_ffi import libinfo

    command = shlex.split(compiler()[0])
    includes = [f"-I{libinfo.find_include_path()}", f"-I{libinfo.find_dlpack_include_path()}"]
    library = Path(libinfo.find_libtvm_ffi())
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        sources = sorted(SOURCES.glob("*.cc"))
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]

        def compile_one(source: Path, target: Path) -> None:
            flags = [*_FLAGS, *instruction_sets.compiler_flags(isa), *includes]
            _run([*command, *flags, "-c", str(source), "-o", str(target)])

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(compile_one, sources, objects))
        built = Path(folder) / "library.so"
        # Python has loaded libtvm_ffi by then, which is where the symbols are found.
        link = ["-shared", *map(str, objects), f"-L{library.parent}", f"-l:{library.name}", "-lpthread"]
        _run([*command, *link, "-o", str(built)])
        _checksum_file(path).unlink(missing_ok=True)
        checksum = hashlib.sha256(built.read_bytes()).hexdigest()
        os.replace(built, path)
        _checksum_file(path).write_text(checksum)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr[-300:])
        raise BuildError(f"{command[0]} failed: {first.strip()}")
