"""From bytes to a validated request: the one place where a client's input is judged for its form."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from skyline.server.errors import ApiError, ClientGone, invalid, quote
from skyline.server.fields import ALL_FIELD_NAMES, NOT_SUPPORTED, Body

M = TypeVar("M", bound=Body)

# Objects and lists in a body. Judging 16 MB of them would take seconds in which no other request moves on.
MAX_CONTAINERS = 50_000
_CONTAINER = re.compile(rb'(?:"(?:[^"\\]++|\\.)*+"?[^"\[{]*+)++|([\[{])', re.DOTALL)

# Errors of our own say more than pydantic's about the other members of a union.
_OWN_ERRORS = ("unknown_field", "text_only", "value_error")


async def read_model(request: Request, model: type[M], max_bytes: int, seconds: float) -> M:
    """The body of `request`. Raises ApiError (400, 408, 413, 415) or ClientGone."""
    _check_headers(request)
    try:
        async with asyncio.timeout(seconds):
            return parse(model, await _read(request, max_bytes))
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} s", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGone from None


def parse(model: type[M], raw: bytes) -> M:
    """Raises ApiError 400 for whatever is not a valid request of this kind."""
    if not raw:
        raise invalid("the body is empty; send a JSON object", code="invalid_json")
    _check_containers(raw)
    try:
        value = msgspec.json.decode(raw)
    except RecursionError:
        raise invalid("the JSON body is nested too deeply", code="invalid_json") from None
    except UnicodeDecodeError:
        raise invalid("the body is not valid UTF-8", code="invalid_json") from None
    except msgspec.MsgspecError as error:
        raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object", code="invalid_json")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _explain(model, error, value) from None
    except (RecursionError, OverflowError):
        raise invalid("the body holds a number that is too large or a value that is nested too deeply") from None


def _check_containers(raw: bytes) -> None:
    """Before anything is decoded. Brackets inside strings do not count."""
    if raw.count(b"{") + raw.count(b"[") <= MAX_CONTAINERS:
        return
    count = 0
    for match in _CONTAINER.finditer(raw):
        count += match.lastindex is not None
        if count > MAX_CONTAINERS:
            raise invalid(f"the body holds more than {MAX_CONTAINERS} objects and lists, nested or not; send less")


def _check_headers(request: Request) -> None:
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, "send the body as JSON, with the header Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed bodies are not supported; leave out Content-Encoding")


async def _read(request: Request, max_bytes: int) -> bytes:
    # The rest of a body that is refused is not read, so the connection cannot be used again.
    too_large = ApiError(
        413, f"the body is larger than {max_bytes} bytes; send less", code="too_large", headers={"Connection": "close"}
    )
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:20]) > max_bytes:
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def _explain(model: type[Body], error: ValidationError, value: Mapping[str, Any]) -> ApiError:
    details = error.errors(include_url=False, include_context=False)
    chosen = max(details, key=lambda detail: (detail["type"] in _OWN_ERRORS, len(detail["loc"])))
    path = _path(chosen["loc"])
    name = path.split(".")[0].split("[")[0]
    field = model.model_fields.get(name)
    if field is not None and (field.description or "").startswith(NOT_SUPPORTED) and value.get(name) is not None:
        why = (field.description or "").removeprefix(NOT_SUPPORTED)
        return invalid(f"{name} {quote(value[name])} is not supported:{why}; leave it out", name, "unsupported_field")
    message = chosen["msg"].removeprefix("Value error, ")
    if chosen["type"] == "missing":
        return invalid(f"{path} is missing", path, "missing_field")
    if chosen["type"] in _OWN_ERRORS:
        return invalid(f"{path}: {message}" if path else message, path or None, chosen["type"])
    return invalid(f"{path}: {message[:1].lower()}{message[1:]}, not {quote(chosen['input'])}", path)


def _path(location: Sequence[int | str]) -> str:
    """`messages[0].content`: pydantic's location without the names of union members."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in ALL_FIELD_NAMES or not path:
            path += f".{part}" if path else part
    return path
