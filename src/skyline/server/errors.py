"""Errors as clients see them, with messages that say what to do.

The shape: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from skyline.checkpoint.chat_template import ChatTemplateError
from skyline.frontend.errors import InvalidRequestError, OverloadedError, RequestFailedError
from skyline.ipc.client import EngineDeadError

logger = logging.getLogger("skyline.server")


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


class ApiError(Exception):
    """Ends a request with this status and an error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def encode(self) -> bytes:
        """The body, as JSON."""
        if self.status == 429:
            kind = "rate_limit_error"
        else:
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return msgspec.json.encode(ErrorBody(ErrorDetail(clean(str(self)), kind, self.param, self.code)))

    def response(self) -> Response:
        return Response(self.encode(), self.status, self.headers, "application/json")


class ClientGone(Exception):
    """Nobody is left to answer."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str, retry_after: int = 5) -> ApiError:
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after)})


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about any exception. The unexpected is logged under an id and otherwise kept inside."""
    match error:
        case ApiError():
            return error
        case InvalidRequestError():
            return invalid(str(error), error.param)
        case ChatTemplateError():
            return invalid(f"the chat template refuses these messages: {error}", "messages")
        case OverloadedError():
            return ApiError(429, str(error), code="overloaded", headers={"Retry-After": "1"})
        case EngineDeadError():
            return unavailable(f"the engine is not running: {error}", "engine_dead")
        case RequestFailedError():
            return ApiError(500, str(error), code="request_failed")
    error_id = uuid.uuid4().hex[:16]
    logger.error("error %s", error_id, exc_info=error)
    return ApiError(500, f"internal error {error_id}; the server's log has the details under this id", code="internal")


def clean(text: str) -> str:
    """Text that can be encoded, whatever a client sent."""
    return text.encode("utf-8", "replace").decode()


def quote(value: object, limit: int = 80) -> str:
    """A client's value in an error message."""
    text = repr(value[: limit + 1] if isinstance(value, (str, list)) else value)
    return text if len(text) <= limit else text[:limit] + "…"
