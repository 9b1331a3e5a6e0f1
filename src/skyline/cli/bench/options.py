"""Options that several commands share, and what they mean."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skyline.cli import console

if TYPE_CHECKING:
    from skyline.bench.store import Store
    from skyline.bench.suite import Suite

STORE_VARIABLE = "SKYLINE_BENCH_STORE"
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="File (SQLite) or URL (PostgreSQL) of the results.",
        envvar=STORE_VARIABLE,
        show_default="~/.local/share/skyline/bench.sqlite3",
    ),
]
FolderOption = Annotated[
    Path | None,
    typer.Option("--folder", help="Engines' environments and logs.", show_default="~/.cache/skyline/bench/engines"),
]
SuiteArgument = Annotated[str, typer.Argument(help="A suite that ships (quick, inferencemax) or a YAML file.")]


def bench_folder(folder: Path | None) -> Path:
    from skyline.bench.engines import DEFAULT_FOLDER

    return (DEFAULT_FOLDER if folder is None else folder).expanduser()


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """What a user can mend is one line; anything else is a bug and keeps its traceback."""
    from skyline.bench.dashboard.export import ExportError
    from skyline.bench.engines.base import EngineError
    from skyline.bench.hardware import PriceError
    from skyline.bench.importers import ResultFileError
    from skyline.bench.recommend import ObjectiveError
    from skyline.bench.stats.compare import CompareError
    from skyline.bench.store import StoreError
    from skyline.bench.suite import SuiteError

    mendable = (
        CompareError,
        EngineError,
        ExportError,
        ObjectiveError,
        PriceError,
        ResultFileError,
        StoreError,
        SuiteError,
    )
    try:
        yield
    except mendable as error:
        console.fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@contextlib.contextmanager
def opened(where: str | None) -> Iterator[Store]:
    from skyline.bench.store import open_store

    with clear_errors(), open_store(where) as store:
        yield store


def suite_of(name: str, engines: list[str] | None = None, models: list[str] | None = None) -> Suite:
    """The suite, with these of its engines and models only. Ends the command if it has none of that name."""
    from skyline.bench.suite import load_suite

    suite = load_suite(name)
    for what, chosen in (("engines", engines), ("models", models)):
        if not chosen:
            continue
        there = {entry.name: entry for entry in getattr(suite, what)}
        for entry in chosen:
            if entry not in there:
                console.fail(f"{name} has no {entry!r} among its {what}: {', '.join(there)}")
        suite = suite.model_copy(update={what: [there[entry] for entry in chosen]})
    return suite
