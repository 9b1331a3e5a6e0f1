"""Virtual environments for engines: made once by pip, by one process at a time, and never changed afterwards.

What pip says goes to <folder>/logs. pip runs as it is configured on this machine (its index, its cache, PIP_*
variables). An environment whose making was cut short has no stamp and is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from skyline.bench.engines.base import EngineError
from skyline.bench.engines.process import ServerProcess
from skyline.bench.suite import EngineSpec

# One torch for all peers that leave the choice. On machines without a GPU, pip should find its CPU build.
TORCH = "torch==2.13.0"

_STAMP = "installed.json"
_NEWEST_AGE_S = 24 * 3600
# Speed depends on these; the many others of an environment are left out of results.
_REPORTED = re.compile(
    r"torch|triton|numpy|transformers|tokenizers|accelerate|vllm(-cpu)?|sglang.*|sgl-.*|tensorrt.*|flashinfer.*|"
    r"flash-attn.*|xformers|intel-openmp|mkl|compressed-tensors|llguidance|xgrammar|uvicorn|uvloop|fastapi|skyline-llm|"
    r"llama-cpp-.*|kernels|nvidia-(cublas|cudnn|nccl|cuda-runtime).*"
)


@dataclass(frozen=True)
class Recipe:
    """What pip installs: `first` by itself, then `package`.

    `without` names requirements of the package that are left out, as vision libraries are that were built against
    another torch. `variables` are set while a package is built from source. `module`, imported at the end, shows that
    it works."""

    package: str
    version: str
    first: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    module: str | None = None

    @property
    def requirement(self) -> str:
        name, bracket, extras = self.package.partition("[")
        return f"{name}{bracket}{extras}=={self.version}"

    @property
    def digest(self) -> str:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        return hashlib.sha256(f"{python} {self!r}".encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Environment:
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Its site-packages."""
        return next(self.folder.glob("lib/python3*/site-packages"), self.folder)

    def versions(self) -> dict[str, str]:
        """Versions of the packages that speed depends on."""
        return reported([str(self.packages)])


def make(engine: str, recipe: Recipe, folder: Path) -> Environment:
    """The environment of a recipe, made if it is not there. Another process that makes it is waited for.

    Raises EngineError with the end of pip's log."""
    name = f"{engine}-{recipe.version}-{recipe.digest}"
    environment = Environment(folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock"):
            if not (environment.folder / _STAMP).is_file():
                shutil.rmtree(environment.folder, ignore_errors=True)
                _fill(environment, recipe, folder / "logs", f"install-{name}")
    except OSError as error:
        raise EngineError(f"the environment of {engine} cannot be made in {folder}: {error}") from None
    return environment


def newest(package: str, folder: Path) -> str:
    """The newest version of a package that pip finds for this Python; asked once a day, and what was found last where
    it cannot be asked. Raises EngineError."""
    memory = folder / f"{package.partition('[')[0]}.newest"
    known = memory.read_text().strip() if memory.is_file() else None
    if known and time.time() - memory.stat().st_mtime < _NEWEST_AGE_S:
        return known
    asked = [*_pip(folder), "index", "versions", package.partition("[")[0]]
    done = subprocess.run(asked, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = re.match(r"\S+ \(([^)\s]+)\)", done.stdout)
    if found is None:
        if known:
            return known
        said = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise EngineError(
            f"pip cannot say which version of {package} is the newest ({said}); give the engine a version"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        memory.write_text(found.group(1))
    except OSError as error:
        raise EngineError(f"environments of engines cannot be kept in {folder}: {error}") from None
    return found.group(1)


def on_path(program: str) -> tuple[Path, dict[str, str]] | None:
    """A program on PATH, and the reported packages of the environment that it belongs to, if it belongs to one."""
    found = shutil.which(program)
    if found is None:
        return None
    path = Path(found).resolve()
    site = [str(folder) for folder in path.parent.parent.glob("lib/python3*/site-packages")]
    return Path(found), reported(site) if (path.parent.parent / "pyvenv.cfg").is_file() else {}


def reported(path: Sequence[str] | None = None) -> dict[str, str]:
    """Versions of the packages that speed depends on, in these folders (in this process's environment by default)."""
    found = (
        importlib.metadata.distributions(path=list(path)) if path is not None else importlib.metadata.distributions()
    )
    versions = {}
    for distribution in found:
        name = canonicalize_name(distribution.metadata["Name"] or "")
        if _REPORTED.fullmatch(name):
            versions[name] = distribution.version
    return dict(sorted(versions.items()))


def _fill(environment: Environment, recipe: Recipe, logs: Path, name: str) -> None:
    log = logs / f"{name}.log"
    pip = [*_pip(logs.parent), "--python", str(environment.python), "--disable-pip-version-check", "--no-input"]
    # A wheel that was built with other variables may lie in pip's cache, and would be taken.
    fresh = ["--no-cache-dir"] if recipe.variables else []
    log.unlink(missing_ok=True)
    try:
        _call([sys.executable, "-m", "venv", "--without-pip", str(environment.folder)], log)
        if recipe.first:
            _call([*pip, "install", *recipe.first], log)
        wanted = [recipe.requirement]
        if recipe.without:
            _call([*pip, "install", *fresh, "--no-deps", recipe.requirement], log, recipe.variables)
            wanted = _requirements(environment, recipe)
        _call([*pip, "install", *fresh, *recipe.first, *wanted], log, recipe.variables)
        if recipe.module:
            _call([str(environment.python), "-c", f"import {recipe.module}"], log)
        (environment.folder / _STAMP).write_text(json.dumps({"recipe": repr(recipe), "made": time.time()}))
    finally:
        # Half an environment may hold gigabytes, and the disk may be full because of it.
        if not (environment.folder / _STAMP).is_file():
            shutil.rmtree(environment.folder, ignore_errors=True)


def _requirements(environment: Environment, recipe: Recipe) -> list[str]:
    """The package's own, without some, and without local versions (torch==2.13.0+cpu), which an index may not have."""
    found = importlib.metadata.Distribution.discover(name=recipe.package, path=[str(environment.packages)])
    wanted = []
    for line in next(iter(found)).requires or []:
        need = Requirement(line)
        applies = need.marker is None or need.marker.evaluate({"extra": ""})
        if applies and canonicalize_name(need.name) not in recipe.without:
            need.marker = None
            wanted.append(re.sub(r"\+[a-z0-9.]+", "", str(need)))
    return wanted


def _call(command: list[str], log: Path, variables: dict[str, str] | None = None) -> None:
    """Under a supervisor, so that an interrupted installation does not go on by itself."""
    environment = {**os.environ, **(variables or {})}
    environment.pop("PYTHONPATH", None)
    with ServerProcess(command, environment, log, grace_s=5, append=True) as process:
        code = process.wait()
        if code != 0:
            raise EngineError(f"installing failed (status {code}): {' '.join(command[1:])}{process.last_words()}")


def _pip(folder: Path) -> list[str]:
    """A pip that knows --python: this environment's if it has one (uv's have none), else one in a folder of its own."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if Version(importlib.metadata.version("pip")) >= Version("22.3"):
            return [sys.executable, "-m", "pip"]
    tools = Environment(folder / "pip")
    with _locked(folder / "pip.lock"):
        if not (tools.folder / _STAMP).is_file():
            _call([sys.executable, "-m", "venv", "--clear", str(tools.folder)], folder / "logs" / "pip.log")
            (tools.folder / _STAMP).write_text("{}")
    return [str(tools.python), "-m", "pip"]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The kernel lets go of the lock when its holder ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def program_of(spec: EngineSpec, program: str, module: str) -> tuple[str, dict[str, str]]:
    """For `version: installed`: the Python of the environment that a program on PATH belongs to, else this one where it
    has the module; and its reported packages. Raises EngineError if there is neither."""
    found = on_path(program)
    if found is not None:
        path, packages = found
        python = path.resolve().with_name("python")
        if python.exists():
            return str(python), packages or reported()
    if importlib.util.find_spec(module):
        return sys.executable, reported()
    raise EngineError(
        f"{spec.name}: version is installed, but there is no {program} on PATH and no module {module} in this "
        "environment; install it, or give a version (or none, for the newest) to have it installed"
    )
