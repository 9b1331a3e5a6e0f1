from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skyline.cli.bench.options import StoreOption, opened


def import_(
    files: Annotated[list[Path], typer.Argument(help="Result files of other tools.")],
    tool: Annotated[
        str | None, typer.Option(help="vllm, guidellm, aiperf or inferencex.", show_default="recognized by its content")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Devices that served.", show_default="as the file says, else 1")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Name of the engine, where the file does not say.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Name of the hardware, where the file does not say.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model, instead of the file's.")] = None,
    label: Annotated[str | None, typer.Option(help="Tells the imported run apart.")] = None,
    store: StoreOption = None,
) -> None:
    """Take results of vLLM's bench, guidellm, aiperf or InferenceX into the store, on the same frontier."""
    from skyline.bench.importers import import_file
    from skyline.bench.wording import number_of

    given = {"devices": devices, "engine": engine, "hardware": hardware, "model": model, "label": label}
    overrides = {name: value for name, value in given.items() if value is not None}
    with opened(store) as results:
        for file in files:
            read = import_file(file, tool, **overrides)
            added = results.import_(read).points
            # What a file gave before is replaced, perhaps by better facts.
            again = "" if added else ", in place of what it gave before"
            typer.echo(f"{file}: {number_of(len(read.points), 'point')}{again}")
