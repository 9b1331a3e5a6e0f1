"""Serves the page and its data on this machine.

The page asks for the data again and again with the ETag that it has, so an unchanged store costs one stamp. Nothing of
the store is ever sent as HTML: it travels as JSON, and the page's policy runs no script but its own.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from skyline.bench.dashboard import bundle

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")

_HEADERS = {
    "Content-Security-Policy": bundle.POLICY.format(connect="'self'") + "; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class _Snapshot:
    """The last loaded data as JSON. Many pages that ask at once make one load."""

    def __init__(self, load: Callable[[], dict[str, Any]], stamp: Callable[[], str]) -> None:
        self._load, self._stamp = load, stamp
        self._lock = threading.Lock()
        self._tag = ""
        self._body = b""

    def tag(self) -> str:
        return f'"{hashlib.sha256(self._stamp().encode()).hexdigest()[:20]}"'

    def get(self) -> tuple[str, bytes]:
        with self._lock:
            # Taken before the load: what is written in between is seen at the next request, not missed.
            tag = self.tag()
            if tag != self._tag:
                self._body = msgspec.json.encode(self._load())
                self._tag = tag
            return self._tag, self._body


def create_app(
    load: Callable[[], dict[str, Any]], stamp: Callable[[], str], hosts: Sequence[str] = LOOPBACK
) -> FastAPI:
    """The application. `load` returns `page_data(...)`; `stamp` returns any text that differs when `load` would.

    Both are called in threads, `load` never twice at once. Requests whose Host header is not one of `hosts` are turned
    down, so that a foreign page cannot read the results by pointing a name of its own at this machine.
    """
    app = FastAPI(title="Skyline dashboard", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    snapshot = _Snapshot(load, stamp)

    @app.get("/api/data")
    def data(request: Request) -> Response:
        try:
            tag = snapshot.tag()
            if request.headers.get("if-none-match") == tag:
                return Response(status_code=304, headers={**_HEADERS, "ETag": tag})
            tag, body = snapshot.get()
        # Whatever is wrong with the store, the page says it and goes on showing what it has.
        except Exception as error:
            body = msgspec.json.encode({"error": str(error) or type(error).__name__})
            return Response(body, 500, {**_HEADERS, "Cache-Control": "no-store"}, "application/json")
        return Response(body, 200, {**_HEADERS, "ETag": tag, "Cache-Control": "no-cache"}, "application/json")

    def fixed(path: str, body: bytes, media_type: str) -> None:
        tag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
        headers = {**_HEADERS, "ETag": tag, "Cache-Control": "no-cache"}

        def send(request: Request) -> Response:
            if request.headers.get("if-none-match") == tag:
                return Response(status_code=304, headers=headers)
            return Response(body, 200, headers, media_type)

        app.get(path, include_in_schema=False)(send)

    fixed("/", bundle.page().encode(), "text/html")
    fixed("/app.js", bundle.script().encode(), "text/javascript")
    fixed("/style.css", bundle.style().encode(), "text/css")
    fixed("/icon.svg", (bundle.ASSETS / "icon.svg").read_bytes(), "image/svg+xml")
    fixed("/plotly.min.js", bundle.plotly_path().read_bytes(), "text/javascript")
    return app
