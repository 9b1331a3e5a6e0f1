"""The OpenAPI document. Bodies are read and written without FastAPI's help, so their schemas are put in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from skyline.server.errors import ErrorBody

_REFERENCE = "#/components/schemas/{model}"
_ERRORS = {
    400: "The request is malformed, unknown to this server or beyond a limit; the message says what to change",
    401: "The API key is missing or wrong",
    404: "The model is not served here",
    408: "The body arrived too slowly",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    429: "Too much is under way; try again after the time in Retry-After",
    500: "The server failed",
    503: "The model is loading, or the engine is not running",
}


def describe(
    answer: type | None,
    errors: tuple[int, ...],
    *,
    body: type[BaseModel] | None = None,
    media_type: str = "application/json",
    events: bool = False,
) -> dict[str, Any]:
    """Arguments of a FastAPI route: what it takes and what it answers."""
    schema = {"type": "string"} if answer is None else {"$ref": _REFERENCE.format(model=answer.__name__)}
    content: dict[str, Any] = {media_type: {"schema": schema}}
    if events:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    responses: dict[int, dict[str, Any]] = {200: {"description": "OK", "content": content}}
    for status in errors:
        error = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="ErrorBody")}}}
        responses[status] = {"description": _ERRORS[status], "content": error}
    extra: dict[str, Any] = {"responses": {str(status): response for status, response in responses.items()}}
    if body is not None:
        reference = {"$ref": _REFERENCE.format(model=body.__name__)}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    return {"openapi_extra": extra}


def install(app: FastAPI, bodies: list[type[BaseModel]], answers: Sequence[type], *, with_key: bool) -> None:
    """Make `app.openapi` return the whole document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # FastAPI's own; errors of validation are 400 here
            components = document.setdefault("components", {})
            components["schemas"] = _schemas(bodies, [*answers, ErrorBody])
            if with_key:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"key": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _schemas(bodies: list[type[BaseModel]], answers: Sequence[type]) -> Mapping[str, Any]:
    _, requests = models_json_schema([(body, "validation") for body in bodies], ref_template=_REFERENCE)
    _, responses = msgspec.json.schema_components(answers, ref_template=_REFERENCE.replace("{model}", "{name}"))
    return {**requests.get("$defs", {}), **responses}
