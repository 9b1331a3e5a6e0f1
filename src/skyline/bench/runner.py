"""A suite from start to end: installs engines, starts each once for all its points, measures, gates, and stores as it
goes.

What is stored stays: a run that was killed is resumed at its first unfinished point, and an engine that fails costs its
own points only.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from skyline.bench.accuracy import gate
from skyline.bench.engines import install, serve
from skyline.bench.engines.base import Endpoint, EngineError
from skyline.bench.hardware import UNKNOWN_HARDWARE, price_of, prices, provenance
from skyline.bench.load.generator import Live
from skyline.bench.measure import Bench, answers, failed_point, log_path, measure_point
from skyline.bench.results import Hardware, PointResult, Provenance, Run
from skyline.bench.store import Store
from skyline.bench.suite import EngineSpec, ModelSpec, PointSpec, Suite


class Reporter(Protocol):
    """Hears what goes on; the command line draws it."""

    def note(self, text: str) -> None: ...
    def begin(self, spec: PointSpec, number: int, total: int) -> None: ...
    def live(self, live: Live) -> None: ...
    def end(self, point: PointResult) -> None: ...


def new_run(suite: Suite, store: Store, label: str | None = None, command: str | None = None) -> Run:
    """A run of the suite, stored, with nothing measured yet. Raises PriceError, so that none is begun that `execute`
    would not go on with, and StoreError."""
    prices()
    origin = provenance(command=command, suite_hash=suite.hash)
    run = Run(suite=suite, suite_hash=suite.hash, label=label, provenance=origin)
    store.save_run(run)
    return run


def unfinished(suite: Suite, store: Store) -> Run | None:
    """The newest run of the very same suite that has not ended."""
    return next((r for r in store.runs() if r.status == "running" and r.suite_hash == suite.hash), None)


def execute(
    run: Run,
    store: Store,
    reporter: Reporter,
    folder: Path,
    order: Callable[[Iterable[PointSpec]], list[PointSpec]] = list,
) -> Run:
    """Measures all points of the run that the store does not hold yet. `folder`: engines' environments and logs.

    Raises PriceError before anything starts, and StoreError if results cannot be kept; nothing that was stored before
    is lost then.
    """
    table = prices()
    finished = store.finished_keys(run.id)
    specs = [spec for spec in order(run.suite.points()) if spec.key not in finished]
    total = len(specs)
    numbers = itertools.count(1)
    bench = Bench()

    def served(spec: PointSpec) -> tuple[str, str]:
        return spec.engine.name, spec.model.name

    refused = _install(run, specs, reporter, folder)
    for _, group in itertools.groupby(specs, key=served):
        pending = deque(group)
        engine = pending[0].engine
        if engine.name in refused:
            for spec in pending:
                next(numbers)
                _keep(failed_point(spec, run.id, run.provenance, refused[engine.name]), store, reporter)
            continue
        _measure_group(run, pending, store, reporter, folder, bench, table, lambda: (next(numbers), total))
    store.finish_run(run.id, "finished")
    return store.run(run.id)


def _install(run: Run, specs: Iterable[PointSpec], reporter: Reporter, folder: Path) -> dict[str, str]:
    """Why an engine cannot be used, by its name."""
    refused = {}
    for engine in {spec.engine.name: spec.engine for spec in specs}.values():
        if engine.url is not None:
            continue
        reporter.note(f"installing {engine.name}")
        try:
            install(engine, folder)
        except EngineError as error:
            refused[engine.name] = str(error)
    return refused


def _measure_group(
    run: Run,
    pending: deque[PointSpec],
    store: Store,
    reporter: Reporter,
    folder: Path,
    bench: Bench,
    table: Mapping[str, float],
    number: Callable[[], tuple[int, int]],
) -> None:
    """All points of one engine and model. Each round starts the engine and takes at least one point away."""
    engine, model = pending[0].engine, pending[0].model
    logs = folder / "logs" / run.id
    for attempt in itertools.count(1):
        if not pending:
            return
        log = log_path(logs, f"{engine.name}-{model.name}-{attempt}")
        reporter.note(f"starting {engine.name} with {model.name}")
        try:
            with serve(engine, model, folder=folder, log=log) as endpoint:
                origin = _origin(run, engine, endpoint)
                price = price_of(origin.hardware, table)
                _gate(run, engine, model, endpoint, store, reporter, folder)
                while pending and endpoint.alive() is None:
                    spec = pending.popleft()
                    reporter.begin(spec, *number())
                    point = measure_point(
                        bench, spec, endpoint, run=run.id, provenance=origin, price=price, watch=reporter.live
                    )
                    _keep(point, store, reporter)
                    if point.status != "ok" and not answers(endpoint, spec):
                        break  # the server may stand while what is behind it has died
        except EngineError as error:
            # It did not start, or died before a point was taken: it would again.
            while pending:
                number()
                _keep(failed_point(pending.popleft(), run.id, run.provenance, str(error)), store, reporter)


def _origin(run: Run, engine: EngineSpec, endpoint: Endpoint) -> Provenance:
    """An endpoint that was not started here runs on what the suite says, if it does."""
    here = run.provenance.hardware
    return run.provenance.model_copy(
        update={
            "hardware": here if engine.url is None else Hardware(name=engine.hardware or UNKNOWN_HARDWARE),
            "engine_version": endpoint.version,
            "engine_command": endpoint.command,
            "engine_packages": endpoint.packages,
        }
    )


def _gate(
    run: Run,
    engine: EngineSpec,
    model: ModelSpec,
    endpoint: Endpoint,
    store: Store,
    reporter: Reporter,
    folder: Path,
) -> None:
    accuracy = run.suite.accuracy
    if accuracy is None or model.name not in (accuracy.models or [model.name]):
        return
    if any((r.engine, r.model) == (engine.name, model.name) for r in store.accuracy(run.id)):
        return
    reporter.note(f"asking {engine.name} the questions of {accuracy.task}")
    result = gate(accuracy, endpoint, run=run.id, engine=engine.name, model=model, folder=folder)
    store.save_accuracy(result)
    said = result.reason or f"exact match {result.exact_match:.1%} of {result.total}"
    reporter.note(f"{engine.name}: {said}{'' if result.passed else ', off the frontier'}")


def _keep(point: PointResult, store: Store, reporter: Reporter) -> None:
    again = point.provenance.model_copy(update={"command": f"skyline bench rerun {point.id[:12]}"})
    point = point.model_copy(update={"provenance": again})
    store.save_point(point)
    reporter.end(point)
