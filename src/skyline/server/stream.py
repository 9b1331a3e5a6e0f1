"""Updates of a request's choices, and the event stream that carries them to a client."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from skyline.frontend.async_llm import Generation, Update, merge
from skyline.frontend.errors import RequestFailedError
from skyline.ipc.client import EngineDeadError
from skyline.server.errors import ApiError, ClientGone, as_api_error
from skyline.server.responses import DONE
from skyline.server.service import Service

_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


async def updates(
    service: Service, generations: Sequence[Generation], n: int, arrived: float
) -> AsyncGenerator[Update, None]:
    """Updates of all choices, numbered prompt × n + choice, while they are timed. Ending it early frees the rest."""
    metrics = service.metrics
    last = [arrived] * (n * len(generations))
    seen = [False] * len(last)
    open_choices = set(range(len(last)))
    reason = "abort"  # of the choices that are still open when this ends
    try:
        if len(generations) == 1:
            source = aiter(generations[0])
        else:
            source = merge([_numbered(n * number, generation) for number, generation in enumerate(generations)])
        async for update in source:
            index = update.index
            tokens = len(update.token_ids)
            if tokens:
                now = time.perf_counter()
                if not seen[index]:
                    seen[index] = True
                    metrics.ttft.observe(now - arrived)
                    if tokens > 1:  # the rest of the first bundle came at the same time
                        metrics.itl.observe(0.0, tokens - 1)
                else:
                    metrics.itl.observe((now - last[index]) / tokens, tokens)
                last[index] = now
            if update.finish_reason is not None:
                open_choices.discard(index)
                metrics.finished.labels(update.finish_reason).inc()
            yield update
        metrics.e2e.observe(time.perf_counter() - arrived)
    except Exception as error:
        reason = "error"
        problem = service.problem()
        if isinstance(error, RequestFailedError) and problem is not None and problem[0] == "engine_dead":
            raise EngineDeadError(problem[1]) from None
        raise
    finally:
        for generation in generations:
            generation.cancel()
        if open_choices:
            metrics.finished.labels(reason).inc(len(open_choices))


async def _numbered(first: int, generation: Generation) -> AsyncGenerator[Update, None]:
    async for update in generation:
        update.index += first
        yield update


class EventStream(Response):
    """Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html.

    The status line goes out with the first event, so a request that fails before it still gets its proper status; a
    later error becomes an event. `send` waits while the client does not read.
    """

    media_type = "text/event-stream"

    def __init__(
        self, service: Service, events: AsyncGenerator[bytes, None], generations: Sequence[Generation]
    ) -> None:
        super().__init__()
        self._service = service
        self._events = events
        self._generations = generations
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._service.watched(receive, self._send_events(send))
        except ClientGone:
            pass
        except ApiError as error:
            if not self._started:
                raise
            await self._finish(send, error)
        finally:
            await self._events.aclose()
            for generation in self._generations:  # a generator that was never started does not clean up
                generation.cancel()

    async def _send_events(self, send: Send) -> None:
        try:
            async for event in self._events:
                if not self._started:
                    await self._start(send)
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            api_error = as_api_error(error)
            if not self._started:
                raise api_error from error
            await self._finish(send, api_error)
            return
        if not self._started:
            await self._start(send)
        await send({"type": "http.response.body", "body": DONE})

    async def _start(self, send: Send) -> None:
        self._started = True
        headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _finish(self, send: Send, error: ApiError) -> None:
        self._service.metrics.errors.labels(str(error.status)).inc()
        body = b"data: " + error.encode() + b"\n\n" + DONE
        await send({"type": "http.response.body", "body": body})
