"""When a server is ready: it is healthy, lists the model, and has generated one token."""

from __future__ import annotations

import difflib
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from skyline.bench.engines import http
from skyline.bench.engines.base import EngineError
from skyline.bench.engines.process import ServerProcess
from skyline.bench.suite import EngineSpec

T = TypeVar("T")

_POLL_S = 0.05
# Health checks and lists are asked for again after that long; a token may take until the time is over.
_SHORT_S = 10.0
_PORT_TAKEN = ("address already in use", "address in use", "couldn't bind", "errno 98")


class PortTaken(Exception):
    """Somebody else listens at the port."""


class Refused(EngineError):
    """The server answered with an error that will not go away."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Readiness:
    """Questions to a server that is starting. Each waits for the answer, and raises EngineError as soon as the process
    has ended or the time is over, PortTaken if it ended because of its port."""

    def __init__(self, spec: EngineSpec, root: str, process: ServerProcess) -> None:
        self._spec, self._root, self._process = spec, root, process
        self._until = process.started + spec.start_timeout_s

    def healthy(self, path: str) -> None:
        self._wait("waiting for its health check", lambda left: _healthy(self._root, path, min(left, _SHORT_S)))

    def model(self) -> str:
        """The name to send."""
        return self._wait(
            "asking for its models", lambda left: model_name(self._spec, self._root, {}, min(left, _SHORT_S))
        )

    def first_token(self, model: str) -> float:
        """Seconds from the process's start to the answer."""
        self._wait("waiting for the first token", lambda left: first_token(self._spec, self._root, {}, model, {}, left))
        return time.monotonic() - self._process.started

    def _wait(self, what: str, ask: Callable[[float], T | None]) -> T:
        problem = "no answer yet"
        while True:
            asked = _Asked(ask, max(0.1, self._until - time.monotonic()))
            while asked.running:
                self._check()
                if time.monotonic() > self._until:
                    raise EngineError(
                        f"{self._spec.name}: not ready within {self._spec.start_timeout_s:g} s, {what} ({problem})"
                        f"{self._process.last_words()}"
                    )
                asked.join(_POLL_S)
            if asked.error is not None:
                raise asked.error
            if asked.found is not None:
                return asked.found
            problem = asked.problem or problem
            self._check()
            time.sleep(_POLL_S)

    def _check(self) -> None:
        ended = self._process.ended()
        if ended is None:
            return
        if any(sign in ended.lower() for sign in _PORT_TAKEN):
            raise PortTaken
        raise EngineError(f"{self._spec.name}: it did not start: {ended}")


class _Asked(Generic[T]):
    """A question in a thread, because it may hang while the process dies. `found` is the answer, `problem` why there
    is none yet, `error` why there will be none."""

    def __init__(self, ask: Callable[[float], T | None], seconds: float) -> None:
        self.found: T | None = None
        self.problem: str | None = None
        self.error: EngineError | None = None
        self._ask, self._seconds = ask, seconds
        self._thread = threading.Thread(target=self._run, name="readiness", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self.found = self._ask(self._seconds)
        except http.Unreachable as error:
            self.problem = str(error)
        except EngineError as error:
            self.error = error


def model_name(spec: EngineSpec, root: str, headers: dict[str, str], timeout_s: float) -> str | None:
    """The name to send: what the spec says if the endpoint lists it, else the first that it lists. None while the
    endpoint is loading. Raises EngineError, and http.Unreachable."""
    answer = http.request(f"{root}/v1/models", headers=headers, timeout_s=timeout_s)
    if answer.status == 503:
        return None
    if answer.status in (401, 403):
        key = f"the key in {spec.api_key_env}" if spec.api_key_env else "a request without a key (give api_key_env)"
        raise EngineError(f"{spec.name}: {root} refuses {key}: {answer.said}")
    data = answer.json()
    entries = data.get("data") if isinstance(data, dict) else None
    entries = entries if isinstance(entries, list) else []
    listed = [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    if not listed:
        if spec.served_model is not None:
            return spec.served_model
        raise EngineError(f"{spec.name}: {root}/v1/models lists no model ({answer.said}); give served_model")
    if spec.served_model is None or spec.served_model in listed:
        return spec.served_model or listed[0]
    near = difflib.get_close_matches(spec.served_model, listed, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    shown = ", ".join(listed[:20]) + (f" and {len(listed) - 20} more" if len(listed) > 20 else "")
    raise EngineError(f"{spec.name}: {root} serves no model {spec.served_model!r}, it lists {shown}{hint}")


def first_token(
    spec: EngineSpec, root: str, headers: dict[str, str], model: str, extra: dict[str, Any], timeout_s: float
) -> bool | None:
    """True once one token was generated, None while the server is loading. Raises Refused, and http.Unreachable."""
    body = {"model": model, "max_tokens": 1, "temperature": 0, **extra}
    answer = http.request(f"{root}/v1/completions", {**body, "prompt": "1"}, headers, timeout_s)
    if answer.status in (404, 405, 501):
        chat = {**body, "messages": [{"role": "user", "content": "1"}]}
        answer = http.request(f"{root}/v1/chat/completions", chat, headers, timeout_s)
    if answer.status == 503:
        return None
    data = answer.json()
    if answer.ok and isinstance(data, dict) and data.get("choices"):
        return True
    raise Refused(f"{spec.name}: {root} does not generate a token: {answer.said}", answer.status)


def _healthy(root: str, path: str, timeout_s: float) -> bool:
    """Servers without a health check are healthy when they list their models."""
    answer = http.request(root + path, timeout_s=timeout_s)
    if answer.status == 404:
        answer = http.request(f"{root}/v1/models", timeout_s=timeout_s)
    if answer.ok:
        return True
    raise http.Unreachable(answer.said)
