from __future__ import annotations

import typer

import skyline


def version() -> None:
    """Print the versions of Skyline, Python and torch."""
    import platform
    from importlib import metadata

    typer.echo(f"skyline {skyline.__version__}")
    typer.echo(f"python {platform.python_version()}")
    try:
        # From the package's metadata: importing torch would take seconds.
        typer.echo(f"torch {metadata.version('torch')}")
    except metadata.PackageNotFoundError:
        typer.echo("torch is not installed")
