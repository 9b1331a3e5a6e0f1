from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skyline.cli import console
from skyline.cli.bench.options import StoreOption, opened

store = typer.Typer(help="Look at stored results, and carry them from one store to another.", no_args_is_help=True)

RunArgument = Annotated[str, typer.Argument(help="Id of a run, its beginning, or its label.")]


@store.command("list")
def list_(where: StoreOption = None) -> None:
    """The runs, newest first."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("run", "started", "suite", "label", "status", "points", "hardware"):
        table.add_column(column, justify="right" if column == "points" else "left")
    with opened(where) as results:
        for run in results.runs():
            points = results.points(run.id)
            done = sum(point.status != "failed" for point in points)
            table.add_row(
                run.id[:8],
                f"{run.started:%Y-%m-%d %H:%M}",
                run.suite.name,
                run.label or "",
                run.status,
                f"{done}/{len(points)}",
                run.provenance.hardware.name,
            )
    console.screen().print(table)


@store.command()
def show(run: RunArgument, where: StoreOption = None) -> None:
    """The points of a run, with the frontier."""
    from skyline.cli.bench.progress import line, summary

    with opened(where) as results:
        found = results.run(run)
        points = results.points(found.id)
        for point in points:
            typer.echo(line(point))
        summary(points, results.accuracy(found.id))


@store.command()
def delete(run: RunArgument, where: StoreOption = None) -> None:
    """Forget a run and its points."""
    with opened(where) as results:
        found = results.run(run)
        results.delete_run(found.id)
    typer.echo(f"deleted {found.id[:8]} ({found.suite.name})", err=True)


@store.command()
def export(
    file: Annotated[Path, typer.Argument(help="JSON file to write.")],
    run: Annotated[list[str] | None, typer.Option(help="Only these runs.", show_default="all")] = None,
    where: StoreOption = None,
) -> None:
    """Write results with all their requests as JSON."""
    with opened(where) as results:
        chosen = None if run is None else [results.run(name).id for name in run]
        text = results.export(chosen).model_dump_json(indent=1)
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        console.fail(f"cannot write {file}: {error}")


@store.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="Files that `skyline bench store export` wrote.")],
    where: StoreOption = None,
) -> None:
    """Take exported results in; what is there already stays as it is."""
    import pydantic

    from skyline.bench.results import Export
    from skyline.bench.wording import number_of

    with opened(where) as results:
        for file in files:
            try:
                read = Export.model_validate_json(file.read_text("utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                console.fail(f"cannot read {file}: {error}")
            except pydantic.ValidationError as error:
                first = error.errors()[0]
                where_wrong = ".".join(map(str, first["loc"]))
                console.fail(f"{file} is no export of a store: {where_wrong}: {first['msg']}")
            counts = results.import_(read)
            added = (counts.runs, "run"), (counts.points, "point"), (counts.accuracy, "accuracy result")
            typer.echo(f"{file}: {', '.join(number_of(*each) for each in added)} added", err=True)
