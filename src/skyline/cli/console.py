"""How commands speak: answers on standard output, everything else on standard error, errors in one red line."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from skyline.engine.config import EngineConfig

if TYPE_CHECKING:
    from rich.console import Console


def fail(message: str) -> NoReturn:
    """Print the message in red and end with exit code 1."""
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(1)


def note(message: str) -> None:
    """A remark for people, not for pipes."""
    if sys.stderr.isatty():
        typer.secho(message, dim=True, err=True)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """What a user can cause and mend is one line; anything else is a bug and keeps its traceback."""
    from skyline.checkpoint import CheckpointError
    from skyline.frontend.errors import InvalidRequestError, RequestFailedError
    from skyline.ipc.client import EngineDeadError

    log_engine_errors(False)
    try:
        yield
    except (CheckpointError, EngineDeadError, InvalidRequestError, RequestFailedError) as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES):
            raise
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def log_engine_errors(enabled: bool) -> None:
    """Off while a failure of the engine ends the command with that very message."""
    import logging

    logging.getLogger("skyline.client").setLevel(logging.NOTSET if enabled else logging.CRITICAL)


def model_or_demo(model: str | None) -> str:
    """The embedded model's folder where none was named."""
    if model is not None:
        return model
    from skyline.demo import DEMO_PATH

    if not (DEMO_PATH / "config.json").is_file():
        fail("this installation holds no demonstration model; name a model, for example Qwen/Qwen3-0.6B")
    note("Demonstration model: it solves short arithmetic word problems, and nothing else.")
    return str(DEMO_PATH)


def engine_config(model: str | None, *, starts: bool = True, **fields: Any) -> EngineConfig:
    """The settings, checked; ends the command if one is out of range.

    With `starts`, the engine's process is already starting when this returns.
    """
    from skyline.ipc.spawn import start_early

    config = EngineConfig(model=model_or_demo(model), **fields)
    try:
        config.validate()
    except ValueError as error:
        fail(str(error))
    if starts:
        start_early()
    return config


def screen() -> Console:
    """Standard output for tables and pictures: as wide as the terminal, and wide enough for whole lines in a file."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)
