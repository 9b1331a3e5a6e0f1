"""The gate in front of every route: authentication, and an answer for every exception."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skyline.server.errors import ApiError, ClientGone, as_api_error
from skyline.server.metrics import Metrics

OPEN_PATHS = frozenset(["/health"])  # all others ask for the key if there is one
TENANT = "skyline.tenant"  # in the scope: who asks, for the salt of the prefix cache


class Gate:
    """ASGI middleware. Deny by default: with API keys set, what is not in OPEN_PATHS needs one, existing or not."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], metrics: Metrics) -> None:
        self._app = app
        # Digests are all of one length, so that comparing tells nothing about a key's.
        self._keys = [hashlib.sha256(key.encode()).digest() for key in api_keys]
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if message["status"] >= 400:
                    self._metrics.errors.labels(str(message["status"])).inc()
            await send(message)

        try:
            self._authenticate(scope)
            await self._app(scope, receive, watched_send)
        except ClientGone:
            if not started:
                await Response(status_code=499)(scope, receive, send)
        except Exception as error:
            api_error = as_api_error(error)
            if started:
                raise
            await api_error.response()(scope, receive, watched_send)

    def _authenticate(self, scope: Scope) -> None:
        scope[TENANT] = ""
        if not self._keys or scope["path"] in OPEN_PATHS:
            return
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = header.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401,
                "give a valid API key in the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if len(self._keys) > 1:
            scope[TENANT] = digest.hex()[:32]
