"""Any OpenAI-compatible endpoint that already runs: nothing is installed, started or stopped."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from skyline.bench.engines import http
from skyline.bench.engines.base import Endpoint, Engine, EngineError, Installation, Job, Launch
from skyline.bench.engines.readiness import Refused, first_token, model_name
from skyline.bench.suite import EngineSpec

_LIST_TIMEOUT_S = 30.0
_RETRY_S = 0.5


class Url(Engine):
    name: ClassVar[str] = "url"

    def check(self, spec: EngineSpec) -> None:
        """Parallelism and speculation are labels here. The server itself is not asked."""
        _root(spec)
        _authorization(spec)

    def install(self, spec: EngineSpec, folder: Path) -> Installation:
        return Installation((), None)

    def launch(self, job: Job) -> Launch:
        raise EngineError(f"{job.spec.name}: an endpoint that already runs is not launched; give its url")


def attach(
    spec: EngineSpec,
    read_counters: Callable[[str], tuple[int, int] | None],
    ignoring_eos: Sequence[dict[str, Any]],
) -> Endpoint:
    """The endpoint, once it has generated a token. It is waited for only while it says that it is loading (HTTP 503).

    `ignoring_eos`: fields that make servers of several kinds generate as many tokens as asked for. The first that this
    one does not refuse are used; most servers ignore what they do not know.

    Raises EngineError where it cannot be reached, refuses the key, or has no model of the name that was asked for."""
    root = _root(spec)
    headers = _authorization(spec)
    try:
        model = _wait(spec, root, lambda left: model_name(spec, root, headers, min(left, _LIST_TIMEOUT_S)))
        extra = _fields(spec, root, headers, model, ignoring_eos)
    except http.Unreachable as error:
        raise EngineError(f"{spec.name}: {root} cannot be reached: {error}") from None
    return Endpoint(
        url=root,
        model=model,
        version=_version(root, headers),
        headers=headers,
        metrics_url=f"{root}/metrics",
        ignore_eos=extra,
        read_counters=read_counters,
    )


def _fields(
    spec: EngineSpec, root: str, headers: dict[str, str], model: str, candidates: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    for extra in candidates:
        try:
            _wait(spec, root, partial(first_token, spec, root, headers, model, extra))
        except Refused as error:
            if error.status not in (400, 422):
                raise
        else:
            return extra
    _wait(spec, root, partial(first_token, spec, root, headers, model, {}))
    return {}


def _wait(spec: EngineSpec, root: str, ask: Callable[[float], Any]) -> Any:
    until = time.monotonic() + spec.start_timeout_s
    while (left := until - time.monotonic()) > 0:
        found = ask(left)
        if found is not None:
            return found
        time.sleep(min(_RETRY_S, left))
    raise EngineError(f"{spec.name}: {root} still says after {spec.start_timeout_s:g} s that it is loading")


def _root(spec: EngineSpec) -> str:
    """The endpoint's address without /v1."""
    url = spec.url or ""
    root = url.rstrip("/").removesuffix("/v1").rstrip("/")
    if not root.startswith(("http://", "https://")):
        raise EngineError(f"{spec.name}: {url!r} is not the address of an endpoint, such as http://127.0.0.1:8000")
    return root


def _authorization(spec: EngineSpec) -> dict[str, str]:
    if spec.api_key_env is None:
        return {}
    key = os.environ.get(spec.api_key_env, "").strip()
    if not key:
        raise EngineError(f"{spec.name}: the variable {spec.api_key_env} is to hold the endpoint's key, and is not set")
    return {"Authorization": f"Bearer {key}"}


def _version(root: str, headers: dict[str, str]) -> str | None:
    """As vLLM, Skyline and TensorRT-LLM (/version), or llama.cpp (/props) say it."""
    for path, field in (("/version", "version"), ("/props", "build_info")):
        with contextlib.suppress(http.Unreachable):
            answer = http.request(root + path, headers=headers, timeout_s=5.0)
            data = answer.json() if answer.ok else None
            if isinstance(data, dict) and isinstance(data.get(field), str):
                return str(data[field])
    return None
