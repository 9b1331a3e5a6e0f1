from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skyline.cli import console
from skyline.cli.bench.options import FolderOption, StoreOption, SuiteArgument, bench_folder, opened, suite_of

if TYPE_CHECKING:
    from skyline.bench.results import Run
    from skyline.bench.store import Store
    from skyline.bench.suite import Suite

# As `compare`'s undecided: there is a result, and not all of it.
SOME_FAILED = 3


def run(
    suite: SuiteArgument,
    engine: Annotated[list[str] | None, typer.Option(help="Only these of its engines.")] = None,
    url: Annotated[str | None, typer.Option(help="Measure this endpoint instead of the suite's engines.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Measure this model (folder or name on the hub) instead of the suite's.")
    ] = None,
    served_model: Annotated[
        str | None, typer.Option(help="The model's name at the endpoint.", show_default="the first it lists")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or name of the tokenizer prompts are made with.", show_default="the model's"),
    ] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Variable that holds the endpoint's key.")] = None,
    hardware: Annotated[
        str | None, typer.Option(help='What serves at the endpoint, as "8x NVIDIA H100".', show_default="unknown")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Tells this run apart, as a branch or a commit.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the suite's last run that was cut short.")
    ] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open the dashboard, live, and keep it afterwards.")] = False,
    store: StoreOption = None,
    folder: FolderOption = None,
) -> None:
    """Measure a suite: installs and starts its engines, and stores every point as it is finished. Exit code 0: no
    point failed; 1: all did; 3: some did."""
    with opened(store) as results:
        spec = suite_of(suite, engine)
        if url is None and not (served_model is None and api_key_env is None and hardware is None):
            console.fail("--served-model, --api-key-env and --hardware are about the endpoint of --url; name it too")
        if url is not None or model is not None or tokenizer is not None:
            spec = _instead(spec, url, model, served_model, tokenizer, api_key_env, hardware)
        _measure(begun(spec, results, label, resume), results, folder, store, open_)


def rerun(
    point: Annotated[str, typer.Argument(help="Id of a stored point, or its beginning.")],
    label: Annotated[str | None, typer.Option(help="Tells this run apart.")] = None,
    store: StoreOption = None,
    folder: FolderOption = None,
) -> None:
    """Measure one stored point again, exactly as it was, with its suite's accuracy gate. Exit code 1 if it failed."""
    from skyline.bench import runner
    from skyline.bench.suite import single

    with opened(store) as results:
        found = results.point(point)
        if found.provenance.imported_from is not None:
            console.fail(f"{point} was imported from {found.provenance.imported_from}; it cannot be repeated from here")
        gate = results.run(found.run).suite.accuracy
        chosen = runner.new_run(single(found.spec, gate), results, label, f"skyline bench rerun {point}")
        _measure(chosen, results, folder, store, open_=False)


def begun(suite: Suite, results: Store, label: str | None, resume: bool) -> Run:
    """The suite's run that was cut short, if that is what was asked for, or a new one."""
    from skyline.bench import runner
    from skyline.bench.wording import number_of

    cut_short = runner.unfinished(suite, results)
    if not resume:
        if cut_short is not None:
            console.note(f"An earlier run was cut short; --resume goes on with it ({cut_short.id[:8]}).")
        return runner.new_run(suite, results, label, "skyline " + shlex.join(sys.argv[1:]))
    if label is not None:
        console.fail("--resume goes on with a run that has its label; leave out --label")
    if cut_short is None:
        console.fail(f"no run of {suite.name} was cut short; leave out --resume")
    stored, planned = len(results.finished_keys(cut_short.id)), len(list(cut_short.suite.points()))
    console.note(f"Going on with {cut_short.id[:8]}, which holds {stored} of {number_of(planned, 'point')}.")
    return cut_short


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Says what Ctrl+C leaves."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\nStopped. What was finished is stored; --resume goes on from here.", err=True)
        raise typer.Exit(130) from None


def _instead(
    suite: Suite,
    url: str | None,
    model: str | None,
    served_model: str | None,
    tokenizer: str | None,
    api_key_env: str | None,
    hardware: str | None,
) -> Suite:
    """The suite's scenarios at another endpoint, or with another model."""
    from skyline.bench.suite import EngineSpec, ModelSpec, Suite

    data = suite.model_dump()
    if url is not None:
        fields = {"engine": "url", "url": url, "served_model": served_model, "api_key_env": api_key_env}
        fields["hardware"] = hardware
        data["engines"] = [EngineSpec.model_validate({**fields, "name": "endpoint"}).model_dump()]
        data["exclude"] = []
    models = suite.models
    if model is not None:
        models = [ModelSpec(name=Path(model).name or model, source=model)]
        data["accuracy"], data["exclude"] = None, []
    data["models"] = [
        entry.model_copy(update={"tokenizer": tokenizer or entry.tokenizer}).model_dump() for entry in models
    ]
    return Suite.model_validate(data)


def _measure(run: Run, results: Store, folder: Path | None, where: str | None, open_: bool) -> None:
    from skyline.bench import runner
    from skyline.cli.bench.progress import RichReporter, summary

    server = None
    if open_:
        from skyline.cli.bench.dashboard import in_background

        server = in_background(where)
    with stoppable(), RichReporter() as reporter:
        run = runner.execute(run, results, reporter, bench_folder(folder))
    points = results.points(run.id)
    summary(points, results.accuracy(run.id))
    if server is not None:
        typer.echo(f"The dashboard stays at {server.url}; end it with Ctrl+C.", err=True)
        server.wait()
    failed = [point.status == "failed" for point in points]
    if any(failed):
        raise typer.Exit(1 if all(failed) else SOME_FAILED)
