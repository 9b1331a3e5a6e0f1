from __future__ import annotations

from typing import Annotated

import typer

from skyline.cli import console
from skyline.cli.bench.options import FolderOption, StoreOption, SuiteArgument, bench_folder, opened, suite_of


def watch(
    suite: SuiteArgument,
    every: Annotated[str, typer.Option(help="Time between the beginnings of two runs, as in 90s, 30m, 6h, 1d.")],
    engine: Annotated[list[str] | None, typer.Option(help="Only these of its engines.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many runs.", show_default="never")] = None,
    print_cron: Annotated[bool, typer.Option("--print-cron", help="Print a line for crontab instead.")] = False,
    print_workflow: Annotated[
        bool, typer.Option("--print-workflow", help="Print a GitHub Actions workflow instead.")
    ] = False,
    store: StoreOption = None,
    folder: FolderOption = None,
) -> None:
    """Run a suite again and again, and say when something changed."""
    import signal
    import threading

    from skyline.bench import runner
    from skyline.bench.results import Run
    from skyline.bench.watch import crontab_line, history, parse_interval, regressions, workflow_yaml
    from skyline.bench.watch import watch as repeat
    from skyline.cli.bench.progress import RichReporter

    try:
        interval = parse_interval(every)
        if print_cron:
            typer.echo(crontab_line(f"skyline bench run {suite}", interval))
            return
        if print_workflow:
            typer.echo(workflow_yaml(suite, interval))
            return
    except ValueError as error:
        console.fail(str(error))

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with opened(store) as results:
        spec = suite_of(suite, engine)

        def run_once() -> Run:
            run = runner.unfinished(spec, results) or runner.new_run(
                spec, results, None, f"skyline bench watch {suite}"
            )
            with RichReporter() as reporter:
                run = runner.execute(run, results, reporter, bench_folder(folder))
            for entry in regressions(history(results.points())):
                typer.echo(f"worse: {entry.label}", err=True)
            return run

        def newest() -> object:
            return next((run.started for run in results.runs() if run.suite_hash == spec.hash), None)

        repeat(run_once, newest, interval, stop=stop, note=lambda text: typer.echo(text, err=True), count=count)  # type: ignore[arg-type]
