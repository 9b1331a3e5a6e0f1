from __future__ import annotations

from typing import Annotated

import typer

from skyline.cli import console


def kernels(
    build: Annotated[bool, typer.Option("--build", help="Build them now, as the first start would.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the CPU kernels: what this CPU supports, and whether they are built."""
    import json

    from skyline.checkpoint.cache import cache_folder
    from skyline.kernels.cpu import build as builder
    from skyline.kernels.cpu import isa

    supported = isa.supported()
    failure = None
    if build and supported:
        try:
            path, seconds = builder.build(isa.detect())
            if seconds and not as_json:
                console.note(f"built in {seconds:.1f} s: {path}")
        except (builder.BuildError, ValueError) as error:
            failure = str(error)
    sets = [{"isa": name, "supported": name in supported, "built": builder.is_built(name)} for name in isa.REQUIRES]
    try:
        compiler = builder.compiler()[1]
    except builder.BuildError as error:
        compiler = str(error)
    if as_json:
        typer.echo(json.dumps({"compiler": compiler, "cache": str(cache_folder()), "sets": sets}))
    else:
        typer.echo(f"compiler  {compiler}")
        typer.echo(f"cache     {cache_folder()}")
        for row in sets:
            state = "built" if row["built"] else "not built" if row["supported"] else "not supported by this CPU"
            typer.echo(f"{row['isa']:<9} {state}")
    if failure is not None:
        # Not an error: without them torch computes. An installer that calls this must not fail for want of a compiler.
        typer.secho(f"the CPU kernels cannot be built, torch will compute instead: {failure}", fg="yellow", err=True)
