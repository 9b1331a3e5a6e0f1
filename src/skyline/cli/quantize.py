from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from skyline.cli import console

Format = Literal["fp8", "nvfp4", "mxfp4", "int8", "int4"]


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or hub id of a checkpoint.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.", show_default=False)],
    format: Annotated[Format, typer.Option("--format", help="What the weights of linear layers become.")] = "int8",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a quantized copy of a checkpoint, which vLLM and transformers read too (compressed-tensors)."""
    from rich.progress import Progress

    from skyline.checkpoint import resolve

    # By name, so that the import checker sees that nothing else of the CLI can reach torch.
    exporter = importlib.import_module("skyline.runner.export")
    with console.clear_errors():
        folder = resolve(source, revision)
        try:
            with Progress(transient=True, disable=as_json) as progress:
                task = progress.add_task("tensors", total=None)

                def show(done: int, total: int) -> None:
                    progress.update(task, completed=done, total=total)

                found = exporter.export(folder, target, format, show)
        except (ValueError, OSError) as error:
            console.fail(str(error))
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "target": str(target),
                    "quantized": found.quantized,
                    "kept": found.kept,
                    "bytes_before": found.bytes_before,
                    "bytes_after": found.bytes_after,
                }
            )
        )
        return
    typer.echo(
        f"{target}: {found.quantized} weights in {format}, {found.kept} linears kept, "
        f"{found.bytes_before / 2**20:,.0f} -> {found.bytes_after / 2**20:,.0f} MiB"
    )
