"""The routes of the HTTP server."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from skyline import __version__
from skyline.frontend.async_llm import AsyncLLM
from skyline.server import openapi
from skyline.server.body import M, read_model
from skyline.server.chat import chat_completion
from skyline.server.completions import completion
from skyline.server.errors import ApiError, as_api_error, quote, unavailable
from skyline.server.middleware import Gate
from skyline.server.options import ServerOptions
from skyline.server.protocol import ChatRequest, CompletionRequest
from skyline.server.responses import (
    ChatCompletion,
    Completion,
    Detokenized,
    Health,
    ModelCard,
    ModelList,
    Tokenized,
    Version,
    encoder,
)
from skyline.server.service import Service
from skyline.server.tokens import DetokenizeRequest, TokenizeRequest, detokenize, tokenize

_BODY_ERRORS = (400, 401, 404, 408, 413, 415, 429, 500, 503)


def create_app(llm: AsyncLLM | None, options: ServerOptions) -> FastAPI:
    """The application. `llm` may still be loading, or be attached later: `app.state.service.attach(llm)`."""
    options.validate()
    service = Service(options)
    if llm is not None:
        service.attach(llm)
    app = _bare_app(service, "Skyline", with_key=bool(options.api_keys))
    _add_generation_routes(app, service)
    _add_token_routes(app, service)
    _add_model_routes(app, service)
    _add_state_routes(app, service)
    if options.allowed_origins:
        # Outside the gate: a browser's preflight request cannot carry the key.
        app.add_middleware(
            CORSMiddleware, allow_origins=options.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app


def create_admin_app(service: Service) -> FastAPI:
    """Routes for the operator only, for a listener of their own."""
    app = _bare_app(service, "Skyline administration", with_key=bool(service.options.api_keys))

    @app.post("/reset_prefix_cache", **openapi.describe(Health, (401, 503)))
    async def reset_prefix_cache() -> Response:
        """Drop every cached KV block that no request holds."""
        service.llm().engine.reset_prefix_cache()
        return _json(Health("ok"))

    return app


def _bare_app(service: Service, title: str, with_key: bool) -> FastAPI:
    # The documentation pages would load scripts from elsewhere; /openapi.json is enough.
    app = FastAPI(title=title, version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    bodies: list[type[BaseModel]] = [ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest]
    answers = [ChatCompletion, Completion, Tokenized, Detokenized, ModelCard, ModelList, Health, Version]
    openapi.install(app, bodies, answers, with_key=with_key)
    app.add_middleware(_gate, service=service)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _http_error)
    app.add_exception_handler(ApiError, _http_error)
    return app


def _gate(app: ASGIApp, service: Service) -> Gate:
    return Gate(app, service.options.api_keys, service.metrics)


async def _http_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        path = f"{request.method} {quote(request.url.path)}"
        message = {
            404: f"there is no route {path}; see /openapi.json for what there is",
            405: f"{path} is not allowed; see the header Allow for the methods of this route",
        }.get(error.status_code, str(error.detail))
        error = ApiError(error.status_code, message, code="not_found", headers=error.headers)
    elif isinstance(error, RequestValidationError):
        error = ApiError(400, "a parameter of this request is not valid")
    return as_api_error(error).response()


def _json(value: Any) -> Response:
    return Response(encoder.encode(value), media_type="application/json")


async def _body(service: Service, request: Request, model: type[M]) -> M:
    service.llm()  # refuse before reading, while nothing can be served
    return await read_model(request, model, service.options.max_body_bytes, service.options.body_timeout)


def _add_generation_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", **openapi.describe(ChatCompletion, _BODY_ERRORS, body=ChatRequest, events=True))
    async def chat_completions(request: Request) -> Response:
        return await chat_completion(service, request, await _body(service, request, ChatRequest))

    @app.post("/v1/completions", **openapi.describe(Completion, _BODY_ERRORS, body=CompletionRequest, events=True))
    async def completions(request: Request) -> Response:
        return await completion(service, request, await _body(service, request, CompletionRequest))


def _add_token_routes(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", **openapi.describe(Tokenized, _BODY_ERRORS, body=TokenizeRequest))
    async def tokenize_route(request: Request) -> Response:
        return await tokenize(service, await _body(service, request, TokenizeRequest))

    @app.post("/detokenize", **openapi.describe(Detokenized, _BODY_ERRORS, body=DetokenizeRequest))
    async def detokenize_route(request: Request) -> Response:
        return await detokenize(service, await _body(service, request, DetokenizeRequest))


def _add_model_routes(app: FastAPI, service: Service) -> None:
    def card(name: str) -> ModelCard:
        return ModelCard(name, service.created, service.llm().model_name, service.llm().max_model_len)

    @app.get("/v1/models", **openapi.describe(ModelList, (401, 503)))
    async def models() -> Response:
        service.llm()
        return _json(ModelList([card(name) for name in service.model_names()]))

    # Names of models hold slashes.
    @app.get("/v1/models/{model_id:path}", **openapi.describe(ModelCard, (400, 401, 404, 503)))
    async def model(model_id: str) -> Response:
        service.llm()
        return _json(card(service.check_model(model_id)))


def _add_state_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health", **openapi.describe(Health, (503,)))
    async def health() -> Response:
        problem = service.problem()
        if problem is not None:
            raise unavailable(problem[1], problem[0])
        return _json(Health("ok"))

    @app.get("/metrics", **openapi.describe(None, (401,), media_type="text/plain"))
    async def metrics() -> Response:
        return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/version", **openapi.describe(Version, (401,)))
    async def version() -> Response:
        return _json(Version(__version__))
