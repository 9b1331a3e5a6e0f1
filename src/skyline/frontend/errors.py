"""What can go wrong with one request. Each message says what to do."""

from __future__ import annotations


class InvalidRequestError(ValueError):
    """The client's mistake; nothing was started. `param` names the field, if one is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class OverloadedError(RuntimeError):
    """Too much is under way; try again later."""


class RequestFailedError(RuntimeError):
    """The engine gave up on this request; others are not affected."""
