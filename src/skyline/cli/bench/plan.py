from __future__ import annotations

from typing import Annotated

import typer

from skyline.cli import console
from skyline.cli.bench.options import SuiteArgument, clear_errors, suite_of


def plan(
    suite: SuiteArgument,
    engine: Annotated[list[str] | None, typer.Option(help="Only these of its engines.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print what a suite would measure, and how long that takes, before anything runs."""
    import json

    from rich.markup import escape
    from rich.table import Table

    from skyline.bench.plan import estimate, obstacles
    from skyline.bench.wording import number_of

    with clear_errors():
        spec = suite_of(suite, engine)
        found = estimate(spec)
        against = obstacles(spec)
    if as_json:
        typer.echo(json.dumps({**found.as_dict(), "obstacles": against}))
        return
    screen = console.screen()
    screen.print(f"[bold]{spec.name}[/bold]  {spec.description}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("engine", "model", "scenario", "lengths", "levels", "points", "time"):
        table.add_column(column, justify="right" if column in ("points", "time") else "left")
    for row in found.rows:
        table.add_row(
            row.engine,
            row.model,
            row.scenario,
            row.lengths,
            row.levels,
            str(row.points),
            f"{duration(row.least_s)} to {duration(row.most_s)}",
        )
    screen.print(table)
    screen.print(
        f"{number_of(found.points, 'point')}; {number_of(found.starts, 'engine start')}; {duration(found.least_s)} to "
        f"{duration(found.most_s)} of measuring, and the engines' installation and start besides",
        highlight=False,
    )
    for gate in found.gates:
        screen.print(gate)
    for line in against:
        screen.print(f"[red]cannot be measured here[/red]  {escape(line)}", highlight=False)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
