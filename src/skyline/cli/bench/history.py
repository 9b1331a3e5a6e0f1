from __future__ import annotations

from typing import Annotated

import typer

from skyline.cli import console
from skyline.cli.bench.options import StoreOption, opened


def history(
    metric: Annotated[str, typer.Option(help="Metric to follow.")] = "output_per_device",
    fail_on_regression: Annotated[
        bool, typer.Option("--fail-on-regression", help="Exit with code 1 if something got worse and stayed so.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Follow each configuration over its runs, and mark when it changed."""
    from rich.table import Table

    from skyline.bench.metrics import metric_of
    from skyline.bench.standing import eligible
    from skyline.bench.watch import history as follow
    from skyline.bench.watch import regressions
    from skyline.bench.wording import number_of

    try:
        metric_of(metric)
    except KeyError as error:
        console.fail(str(error.args[0]))
    with opened(store) as results:
        points, accuracy = results.points(), results.accuracy()
    series = follow(points, accuracy, metric)
    left_out = [(point, why) for point in points if (why := eligible(point, accuracy)) is not None]
    if left_out:
        point, why = left_out[-1]
        verb = "does" if len(left_out) == 1 else "do"
        count = f"{len(left_out)} of {number_of(len(points), 'point')} {verb}"
        typer.echo(f"{count} not count, the last {point.spec.label}: {why}", err=True)
    if not series:
        console.fail(f"the store holds no result with {metric}; measure with `skyline bench run quick`")
    screen = console.screen()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("configuration", "runs", "last", "changes"):
        table.add_column(column, justify="right" if column in ("runs", "last") else "left")
    for entry in series:
        last = entry.estimates[-1].value
        changes = [
            f"{entry.dates[change.index]:%Y-%m-%d} {change.relative:+.1%}{' (worse)' if change.regression else ''}"
            for change in entry.changes
        ]
        table.add_row(
            entry.label, str(len(entry.dates)), "–" if last is None else f"{last:,.4g}", ", ".join(changes) or "none"
        )
    screen.print(table)
    worse = regressions(series)
    if worse and fail_on_regression:
        console.fail(
            f"{len(worse)} of {number_of(len(series), 'configuration')} got worse: "
            + "; ".join(entry.label for entry in worse)
        )
