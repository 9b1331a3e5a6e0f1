from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skyline.cli import console
from skyline.cli.bench.options import (
    STORE_VARIABLE,
    FolderOption,
    StoreOption,
    SuiteArgument,
    bench_folder,
    clear_errors,
    opened,
    suite_of,
)


def watch(
    suite: SuiteArgument,
    every: Annotated[str, typer.Option(help="Time between the beginnings of two runs, as in 90s, 30m, 6h, 1d.")],
    engine: Annotated[list[str] | None, typer.Option(help="Only these of its engines.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many runs.", show_default="never")] = None,
    print_cron: Annotated[
        bool, typer.Option("--print-cron", help="Print a line for crontab instead; cron has a small PATH.")
    ] = False,
    print_workflow: Annotated[
        bool, typer.Option("--print-workflow", help="Print a GitHub Actions workflow instead.")
    ] = False,
    store: StoreOption = None,
    folder: FolderOption = None,
) -> None:
    """Run a suite again and again, and say when something changed."""
    import contextlib
    import datetime
    import os
    import shlex
    import signal
    import threading
    from collections.abc import Iterator

    from skyline.bench import runner
    from skyline.bench.results import Run
    from skyline.bench.watch import WatchError, crontab_line, history, parse_interval, regressions, workflow_yaml
    from skyline.bench.watch import watch as repeat
    from skyline.bench.wording import number_of
    from skyline.cli.bench.progress import RichReporter

    printed = [name for name, on in (("--print-cron", print_cron), ("--print-workflow", print_workflow)) if on]
    if len(printed) > 1:
        console.fail(f"{' and '.join(printed)}: choose one")
    if printed and count is not None:
        console.fail(f"--count is for watching here; {printed[0]} prints what runs without end")
    here = {"--store": None if store == os.environ.get(STORE_VARIABLE) else store, "--folder": folder}
    if print_workflow and (given := [name for name, value in here.items() if value is not None]):
        console.fail(f"{' and '.join(given)} are of this machine; a workflow keeps its store and engines on its own")
    with clear_errors():
        spec = suite_of(suite, engine)
    try:
        interval = parse_interval(every)
        if print_cron:
            typer.echo(crontab_line(shlex.join(_run_command(suite, engine, store, folder)), interval))
            return
        if print_workflow:
            typer.echo(workflow_yaml(suite, interval, engine or []))
            return
    except WatchError as error:
        console.fail(str(error))

    def say(text: str) -> None:
        typer.echo(text, err=True)

    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)

    @contextlib.contextmanager
    def interruptible() -> Iterator[None]:
        """Between runs a signal ends the waiting; within one it ends the run, which the next watch resumes."""
        handlers = {number: signal.signal(number, signal.default_int_handler) for number in signals}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    for number in signals:
        signal.signal(number, lambda *_: stop.set())
    with opened(store) as results:

        def run_once() -> Run:
            run = runner.unfinished(spec, results) or runner.new_run(
                spec, results, None, f"skyline bench watch {suite}"
            )
            try:
                with interruptible(), RichReporter() as reporter:
                    run = runner.execute(run, results, reporter, bench_folder(folder))
            except KeyboardInterrupt:
                say("\nStopped. What was finished is stored; the next watch goes on from here.")
                raise
            points = results.points(run.id)
            if failed := sum(point.status == "failed" for point in points):
                say(f"{failed} of {number_of(len(points), 'point')} failed")
            mine = [point for r in results.runs() if r.suite_hash == spec.hash for point in results.points(r.id)]
            for entry in regressions(history(mine, results.accuracy())):
                say(f"worse since {entry.since:%Y-%m-%d}: {entry.label} ({entry.relative:+.1%})")
            return run

        def newest() -> datetime.datetime | None:
            return next((run.started for run in results.runs() if run.suite_hash == spec.hash), None)

        repeat(run_once, newest, interval, stop=stop, note=say, count=count)


def _run_command(suite: str, engines: list[str] | None, store: str | None, folder: Path | None) -> list[str]:
    """What cron runs, from its user's home."""
    command = ["skyline", "bench", "run", _from_anywhere(suite) if Path(suite).is_file() else suite]
    for engine in engines or []:
        command += ["--engine", engine]
    if store is not None:
        command += ["--store", store if "://" in store else _from_anywhere(store)]
    if folder is not None:
        command += ["--folder", _from_anywhere(str(folder))]
    return command


def _from_anywhere(path: str) -> str:
    return str(Path(path).expanduser().absolute())
