from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skyline.cli import console
from skyline.cli.bench.options import StoreOption, clear_errors, opened

if TYPE_CHECKING:
    from skyline.bench.store import Store

DEFAULT_PORT = 8090


def dashboard(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = DEFAULT_PORT,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    store: StoreOption = None,
) -> None:
    """Show results as a page that fills in while a benchmark runs."""
    with clear_errors():
        server = _Server(store, host, port)
    typer.echo(f"{server.url}  (end with Ctrl+C)")
    if open_:
        _browse(server.url)
    server.wait()


def export(
    folder: Annotated[Path, typer.Argument(help="Folder of the site; made if it is not there.")],
    run: Annotated[list[str] | None, typer.Option(help="Only these runs.", show_default="all")] = None,
    store: StoreOption = None,
) -> None:
    """Write the dashboard as files that need no server and no network."""
    from skyline.bench.dashboard.export import export_site

    with opened(store) as results:
        page = export_site(_data(results, run), folder)
    typer.echo(str(page))


def in_background(store: str | None) -> _Server:
    """A dashboard beside a run, opened in the browser."""
    server = _Server(store, "127.0.0.1", DEFAULT_PORT)
    typer.echo(f"Dashboard: {server.url}", err=True)
    _browse(server.url)
    return server


class _Server:
    """The dashboard in a thread of its own, with its own connection to the store."""

    def __init__(self, store: str | None, host: str, port: int) -> None:
        import uvicorn

        from skyline.bench.dashboard.app import LOOPBACK, create_app
        from skyline.bench.store import open_store

        results = open_store(store)
        hosts = LOOPBACK if host in LOOPBACK else ["*"]  # whoever opens it to a network does not know its names
        config = uvicorn.Config(create_app(_loader(results), results.stamp, hosts), log_level="warning")
        self._server = uvicorn.Server(config)
        listening = _listen(host, port)
        self.url = f"http://{host}:{listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        try:
            while self._thread.is_alive():
                self._thread.join(1.0)
        except KeyboardInterrupt:
            self._server.should_exit = True
            self._thread.join(5.0)


def _listen(host: str, port: int) -> Any:
    """The asked port; a free one where the default is taken."""
    import socket

    try:
        return socket.create_server((host, port))
    except OSError as error:
        if port != DEFAULT_PORT:
            console.fail(f"cannot listen on {host}:{port}: {error}")
        return socket.create_server((host, 0))


def _loader(results: Store) -> Callable[[], dict[str, Any]]:
    return lambda: _data(results, None)


def _data(results: Store, runs: list[str] | None) -> dict[str, Any]:
    from skyline.bench.dashboard.data import page_data
    from skyline.bench.hardware import prices

    chosen = results.runs() if runs is None else [results.run(name) for name in runs]
    points = [point for run in chosen for point in results.points(run.id)]
    accuracy = [result for run in chosen for result in results.accuracy(run.id)]
    return page_data(chosen, points, accuracy, prices())


def _browse(url: str) -> None:
    import webbrowser

    webbrowser.open(url)
