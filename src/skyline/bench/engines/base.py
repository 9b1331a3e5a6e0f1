"""What an engine is to the benchmark: how it is installed and launched, and the endpoint that it becomes."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from skyline.bench.engines import http
from skyline.bench.engines.process import ServerProcess
from skyline.bench.results import ServerFacts
from skyline.bench.suite import EngineSpec, ModelSpec


class EngineError(RuntimeError):
    """An engine cannot be installed, started or reached; the message says why, with the end of its log."""


@dataclass(frozen=True)
class Installation:
    """An engine that can be launched: the beginning of its command line, and what its speed depends on."""

    program: tuple[str, ...]
    version: str | None
    packages: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One launch. `source` is the model as this engine reads it; `folder` keeps converted models. `threads` are compute
    threads on a CPU; `cuda` says whether the engine is to use NVIDIA GPUs."""

    spec: EngineSpec
    model: ModelSpec
    source: str
    installation: Installation
    port: int
    threads: int
    cuda: bool
    folder: Path
    log: Path


@dataclass(frozen=True)
class Launch:
    """A command line, and the variables that are set for it beside those that the benchmark itself has."""

    command: list[str]
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """For a shell."""
        return " ".join([f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
                        + [shlex.join(self.command)])  # fmt: skip


class Engine(ABC):
    """An adapter. Subclasses know one engine; starting, waiting and stopping are the same for all of them."""

    name: ClassVar[str]
    # Where the server says that it is ready (status 200).
    health: ClassVar[str] = "/health"
    # Where counters are in the format of Prometheus.
    metrics: ClassVar[str | None] = "/metrics"
    # Fields of a request that make it generate exactly as many tokens as asked for.
    ignore_eos: ClassVar[dict[str, Any]] = {"ignore_eos": True}
    # The most of each kind of parallelism; of those that are not named, any number.
    parallelism: ClassVar[dict[str, int]] = {}

    def check(self, spec: EngineSpec) -> None:
        """Raises EngineError for what can be said before anything is installed: an option that the engine does not
        have, or something that this machine lacks for it."""
        for name, most in self.parallelism.items():
            if getattr(spec, name) > most:
                raise EngineError(f"{spec.name}: {spec.engine} has no {name} here; leave it out or set it to {most}")
        _check_speculation(spec)

    @abstractmethod
    def install(self, spec: EngineSpec, folder: Path) -> Installation:
        """Finds or makes the installation that `spec.version` asks for, below `folder`. Raises EngineError."""

    @abstractmethod
    def launch(self, job: Job) -> Launch:
        """Raises EngineError if the engine cannot do what the job asks for."""

    def source(self, model: ModelSpec) -> str:
        """The model's folder, file or hub name. The embedded model is a folder of this package."""
        from skyline.demo import DEMO_PATH

        found = model.source_for(self.name)
        return str(DEMO_PATH) if found == "demo" else found

    @staticmethod
    def cache_counters(metrics: str) -> tuple[int, int] | None:
        """(prompt tokens looked up, those of them that the prefix cache held) since the start, from the metrics' text;
        None if they are not there."""
        return None


@dataclass
class Endpoint:
    """A server that answers. `url` is without /v1; `model` is the name to send; `headers` carry the authorization.

    `version`, `command` and `startup_s` (seconds from process start to the first answered request) are None where the
    server was not started here.
    """

    url: str
    model: str
    version: str | None = None
    command: str | None = None
    packages: dict[str, str] = field(default_factory=dict)
    startup_s: float | None = None
    headers: dict[str, str] = field(default_factory=dict)
    metrics_url: str | None = None
    ignore_eos: dict[str, Any] = field(default_factory=dict)
    process: ServerProcess | None = None
    read_counters: Callable[[str], tuple[int, int] | None] = Engine.cache_counters

    def alive(self) -> str | None:
        """None while the process runs, else why it ended, with the end of its log. A server that was not started here
        is always taken for alive: its requests say when it is not."""
        return self.process.ended() if self.process else None

    def facts(self) -> ServerFacts | None:
        """Start-up time, and the most memory that its processes have held so far. None for a server elsewhere."""
        if self.process is None:
            return None
        memory = self.process.memory
        return ServerFacts(startup_s=self.startup_s, peak_memory_bytes=memory.peak, memory_method=memory.method)

    def cache_counters(self) -> tuple[int, int] | None:
        """(prompt tokens looked up in the prefix cache, tokens served from it) since the server started, up to a second
        old; None where it does not say."""
        if self.metrics_url is None:
            return None
        try:
            answer = http.request(self.metrics_url, headers=self.headers)
        except http.Unreachable:
            return None
        return self.read_counters(answer.body.decode("utf-8", errors="replace")) if answer.ok else None


def counters_by_name(metrics: str, looked_up: str, hit: str) -> tuple[int, int] | None:
    """Two counters of the metrics' text, summed over their labels."""
    total, found = http.counter(metrics, looked_up), http.counter(metrics, hit)
    return None if total is None else (int(total), int(found or 0))


def precision_flags(job: Job, flags: Mapping[str, list[str]]) -> list[str]:
    """The flags that make the engine compute in the spec's precision.

    A precision that is not among `flags` is a property of the checkpoint (as fp4 is of one that was quantized so). A
    local one that is not quantized is refused then, because its results would carry a wrong label.
    """
    precision = job.spec.precision
    if precision in flags:
        return flags[precision]
    config = Path(job.source, "config.json")
    if config.is_file() and '"quantization_config"' not in config.read_text("utf-8", errors="replace"):
        raise EngineError(
            f"{job.spec.name}: {job.spec.engine} cannot make {job.source} {precision} while loading, and the "
            f"checkpoint is not quantized; precision may be {', '.join(flags)}, or give a quantized checkpoint"
        )
    return []


def _check_speculation(spec: EngineSpec) -> None:
    """`speculation` labels results; how to speculate is said in `args` or `env`. Raises EngineError if it is not."""
    said = " ".join([*spec.args, *spec.env, *spec.env.values()]).lower()
    if spec.speculation != "none" and not any(word in said for word in ("spec", "draft", "config")):
        raise EngineError(
            f"{spec.name}: speculation {spec.speculation!r} is only a label; add the engine's own flags to args, "
            "or leave it out"
        )
