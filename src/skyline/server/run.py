"""Starts the HTTP server and the engine together, and ends both in good order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import time
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from skyline.engine.config import EngineConfig
from skyline.engine.messages import EngineReady
from skyline.frontend.async_llm import AsyncLLM
from skyline.server.app import create_admin_app, create_app
from skyline.server.http import BoundedHttp
from skyline.server.options import ServerOptions
from skyline.server.service import Service

OnReady = Callable[[EngineReady, float], None]
OnListening = Callable[[str, int], None]

_BACKLOG = 2048
_LAST_WORDS_S = 5.0  # for sending errors to those whose requests were ended by the drain timeout


class ServerStartError(RuntimeError):
    """The server cannot listen; the message says what to change."""


class _HttpServer(uvicorn.Server):
    """Leaves signals to `serve`, which has an engine to end as well."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_server(
    config: EngineConfig,
    options: ServerOptions,
    *,
    model_name: str | None = None,
    revision: str | None = None,
    on_ready: OnReady | None = None,
    on_listening: OnListening | None = None,
) -> None:
    """`serve` in an event loop of its own (uvloop). Returns after SIGTERM or SIGINT."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(
            serve(
                config,
                options,
                model_name=model_name,
                revision=revision,
                on_ready=on_ready,
                on_listening=on_listening,
            )
        )


async def serve(
    config: EngineConfig,
    options: ServerOptions,
    *,
    model_name: str | None = None,
    revision: str | None = None,
    on_ready: OnReady | None = None,
    on_listening: OnListening | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends what still runs.

    The server listens, and /health says "loading", while the model is fetched and loaded. `on_listening(host, port)` is
    called first, `on_ready(ready, seconds since the call)` when requests are taken. Raises ServerStartError if a port
    cannot be used, and what AsyncLLM.start and wait_ready raise.
    """
    began = time.perf_counter()
    app = create_app(None, options)
    service: Service = app.state.service
    sockets = [_listen(options.host, options.port)]
    servers = [_http_server(app, options)]
    if options.admin_port is not None:
        try:
            sockets.append(_listen(options.admin_host, options.admin_port))
        except ServerStartError:
            sockets[0].close()
            raise
        servers.append(_http_server(create_admin_app(service), options))
    listening = [
        asyncio.create_task(server.serve([listener])) for server, listener in zip(servers, sockets, strict=True)
    ]
    if on_listening is not None:
        on_listening(options.host, sockets[0].getsockname()[1])
    stop = asyncio.Event()
    stopped = asyncio.create_task(stop.wait())
    llm: AsyncLLM | None = None
    try:
        with _signals(service, stop):
            starting = asyncio.create_task(_start(config, options, service, model_name, revision))
            await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                llm, ready = await starting
                if on_ready is not None:
                    on_ready(ready, time.perf_counter() - began)
            else:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
            await stopped
            service.draining = True
            drain = asyncio.get_running_loop().call_later(options.drain_timeout, service.stop)
            await _end(servers, listening)
            drain.cancel()
    finally:
        stopped.cancel()
        await _end(servers, listening)
        if llm is not None:
            await llm.close()


async def _start(
    config: EngineConfig, options: ServerOptions, service: Service, model_name: str | None, revision: str | None
) -> tuple[AsyncLLM, EngineReady]:
    llm = await AsyncLLM.start(
        config,
        revision=revision,
        model_name=model_name,
        max_queued=options.max_queued,
        chat_template=options.chat_template,
    )
    try:
        service.attach(llm)
        return llm, await llm.wait_ready()
    except BaseException:
        service.draining = True
        await llm.close()
        raise


async def _end(servers: list[_HttpServer], listening: list[asyncio.Task[None]]) -> None:
    for server in servers:
        server.should_exit = True
    await asyncio.gather(*listening)


@contextlib.contextmanager
def _signals(service: Service, stop: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            service.stop()
        stop.set()

    signals = (signal.SIGTERM, signal.SIGINT)
    installed = []
    for number in signals:
        with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread: somebody else handles signals
            loop.add_signal_handler(number, on_signal)
            installed.append(number)
    try:
        yield
    finally:
        for number in installed:
            loop.remove_signal_handler(number)


def _http_server(app: FastAPI, options: ServerOptions) -> _HttpServer:
    config = uvicorn.Config(
        app,
        http=BoundedHttp,
        ws="none",
        lifespan="off",
        log_level="info" if options.access_log else "warning",
        access_log=options.access_log,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=int(options.drain_timeout + _LAST_WORDS_S),
    )
    return _HttpServer(config)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServerStartError(f"cannot listen on {host}: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} on {host} is in use; stop what uses it, or choose another with --port"
        elif error.errno == errno.EACCES:
            message = f"no permission to listen on port {port}; choose one above 1023 with --port"
        else:
            message = f"cannot listen on {host} port {port}: {error.strerror or error}"
        raise ServerStartError(message) from None
    listener.setblocking(False)
    return listener
