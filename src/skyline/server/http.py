"""HTTP/1.1 connections: uvicorn's, with the bounds it leaves to a reverse proxy and errors in the OpenAI shape."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from skyline.server.errors import ApiError

# A head may take this much time (from the connection's start, or from its first byte), and these bytes beyond what came
# with its first packet.
HEAD_SECONDS = 20.0
MAX_HEAD_BYTES = 64 * 1024


class BoundedHttp(HttpToolsProtocol):
    """Ends connections that never finish the head of a request, or never end it."""

    _in_head = True  # also before the first byte
    _head_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        went_on = self._in_head and self._head_bytes > 0
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data) if went_on else 1
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(ApiError(431, f"the request's head is larger than {MAX_HEAD_BYTES} bytes; send less"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        if self._timer is None:
            self._start_timer()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, f"{msg[:1].lower()}{msg[1:].rstrip('.')}; send HTTP/1.1"))

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        if self._answering():  # an earlier request on this connection still gets its answer
            self._start_timer()
        elif self._head_bytes:
            self._refuse(ApiError(408, f"the request's head did not arrive within {HEAD_SECONDS:g} s"))
        else:
            self.transport.close()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: ApiError) -> None:
        if not self._answering():  # else it would land in the middle of that answer
            body = error.encode()
            headers = [*self.server_state.default_headers, *_headers(body)]
            lines = [STATUS_LINE[error.status], *(b"%b: %b\r\n" % header for header in headers), b"\r\n", body]
            self.transport.write(b"".join(lines))
        self.transport.close()


def _headers(body: bytes) -> list[tuple[bytes, bytes]]:
    length = str(len(body)).encode()
    return [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close")]
