"""From an engine's entry in a suite to an endpoint that answers, and back to nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from skyline.bench.engines.base import Endpoint, Engine, EngineError, Installation, Job, Launch
from skyline.bench.engines.process import GRACE_S, ServerProcess
from skyline.bench.engines.readiness import PortTaken, Readiness
from skyline.bench.engines.registry import any_counters, get, ways_to_ignore_eos
from skyline.bench.engines.url import Url, attach
from skyline.bench.hardware import usable_cores, uses_cuda
from skyline.bench.suite import EngineSpec, ModelSpec

DEFAULT_FOLDER = Path("~/.cache/skyline/bench/engines")

_PORT_ATTEMPTS = 3
# Keys for other servers: the ones that are started here, which only this machine can reach, would ask us for them.
_SECRETS = ("SKYLINE_API_KEY", "VLLM_API_KEY", "LLAMA_API_KEY")


def check(spec: EngineSpec) -> None:
    """Raises EngineError for what stands against this engine, as far as it can be seen before anything is installed,
    started or asked for."""
    engine = get(spec.engine)
    if spec.url is not None:
        engine = Url()
    engine.check(spec)
    if spec.version == "installed":
        engine.install(spec, DEFAULT_FOLDER)  # finds it, and puts nothing there


def install(spec: EngineSpec, folder: Path = DEFAULT_FOLDER) -> Installation:
    """Finds the engine, or installs it into an environment below `folder`; at once if that was done before.

    Raises EngineError with the end of the installer's log."""
    engine = get(spec.engine)
    engine.check(spec)
    return engine.install(spec, folder.expanduser())


@contextlib.contextmanager
def serve(
    spec: EngineSpec,
    model: ModelSpec,
    *,
    folder: Path = DEFAULT_FOLDER,
    log: Path,
    threads: int | None = None,
    port: int | None = None,
    grace_s: float = GRACE_S,
) -> Iterator[Endpoint]:
    """The engine with this model, ready: it has generated a token. Stopped, with all that it started, when the block is
    left, and when this process ends in whatever way.

    `threads`: compute threads on a CPU, by default as many as there are usable cores. `port`: any free one by default.
    `grace_s`: seconds that it gets after SIGTERM. Raises EngineError where it cannot be installed, ends early, is not
    ready within the spec's start_timeout_s, or serves no model of the name that was asked for. In the block nothing is
    raised, whatever happens to the server: `Endpoint.alive` says.
    """
    engine = get(spec.engine)
    if spec.url is not None:
        yield attach(spec, any_counters, ways_to_ignore_eos())
        return
    folder = folder.expanduser().absolute()
    installation = install(spec, folder)
    threads = usable_cores() if threads is None else threads
    for attempt in range(_PORT_ATTEMPTS):
        chosen = _free_port() if port is None else port
        job = Job(spec, model, engine.source(model), installation, chosen, threads, uses_cuda(spec.env), folder, log)
        launch = engine.launch(job)
        # What the suite says goes before what the adapter sets.
        launch = Launch(launch.command, {**launch.variables, **spec.env})
        with _start(launch, job, grace_s) as process:
            try:
                endpoint = _ready(engine, job, launch, process)
            except PortTaken:
                # Between our looking for a free port and its listening there, someone else took it; there are others.
                if port is not None or attempt == _PORT_ATTEMPTS - 1:
                    raise EngineError(f"{spec.name}: port {chosen} is in use{process.last_words()}") from None
                continue
            yield endpoint
            return


def _start(launch: Launch, job: Job, grace_s: float) -> ServerProcess:
    environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    program = Path(launch.command[0])
    if str(program) != sys.executable:
        # Our packages are not its packages.
        environment.pop("PYTHONPATH", None)
    if program.is_absolute():
        # Compilers and build tools that its environment brings are looked for on PATH.
        environment["PATH"] = f"{program.parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    environment |= {"PYTHONUNBUFFERED": "1", **launch.variables}
    try:
        return ServerProcess(launch.command, environment, job.log, grace_s)
    except (OSError, ValueError) as error:
        raise EngineError(f"{job.spec.name}: cannot be started ({error}): {launch.text}") from None


def _ready(engine: Engine, job: Job, launch: Launch, process: ServerProcess) -> Endpoint:
    root = f"http://127.0.0.1:{job.port}"
    readiness = Readiness(job.spec, root, process)
    readiness.healthy(engine.health)
    _check_owner(process, job)
    model = readiness.model()
    startup_s = readiness.first_token(model)
    return Endpoint(
        url=root,
        model=model,
        version=job.installation.version,
        command=launch.text,
        packages=job.installation.packages,
        startup_s=startup_s,
        metrics_url=root + engine.metrics if engine.metrics else None,
        ignore_eos=dict(engine.ignore_eos),
        process=process,
        read_counters=engine.cache_counters,
    )


def _check_owner(process: ServerProcess, job: Job) -> None:
    """Raises PortTaken if it is not the engine that answers at its port."""
    for pid in process.processes():
        try:
            sockets = psutil.Process(pid).net_connections("tcp")
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:
            return
        if any(found.status == psutil.CONN_LISTEN and found.laddr[1] == job.port for found in sockets):
            return
    raise PortTaken


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
