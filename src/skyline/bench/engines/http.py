"""The few requests that starting and checking a server takes. Blocking; the load generator has a client of its own."""

from __future__ import annotations

import http.client
import ipaddress
import json
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_MAX_BODY = 4 * 2**20
# A sample of the text exposition format of Prometheus: name, labels, value.
_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{.*\})?\s+(\S+)", re.MULTILINE)


class Unreachable(OSError):
    """No HTTP answer; the message says why."""


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes

    @property
    def ok(self) -> bool:
        return self.status == 200

    def json(self) -> Any:
        """None if the body is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def said(self) -> str:
        """The answer for a message: what an error's body says, else the start of the body."""
        data = self.json()
        if isinstance(data, dict):
            error = data.get("error", data.get("detail", data.get("message")))
            error = error.get("message") if isinstance(error, dict) else error
            if isinstance(error, str):
                return f"HTTP {self.status}: {error[:500]}"
        text = " ".join(self.body.decode("utf-8", errors="replace").split())
        return f"HTTP {self.status}: {text[:500]}" if text else f"HTTP {self.status} without a body"


def request(
    url: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None, timeout_s: float = 10.0
) -> Answer:
    """GET, or POST where there is a body. An HTTP error is an answer; raises Unreachable where none came."""
    data = None if body is None else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} if data is not None else {}
    asked = urllib.request.Request(url, data, {**sent, **(headers or {})})
    # What runs on this machine is asked directly, whatever proxy is set for the world.
    handlers = [urllib.request.ProxyHandler({})] if _is_local(url) else []
    try:
        with urllib.request.build_opener(*handlers).open(asked, timeout=timeout_s) as response:
            return Answer(response.status, response.read(_MAX_BODY))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.read(_MAX_BODY))
    except urllib.error.URLError as error:
        raise Unreachable(_reason(error.reason, timeout_s)) from None
    except OSError as error:
        raise Unreachable(_reason(error, timeout_s)) from None
    except (http.client.HTTPException, ValueError) as error:
        raise Unreachable(f"what answered does not speak HTTP ({type(error).__name__}: {error})") from None


def counter(text: str, name: str) -> float | None:
    """Sum of a Prometheus counter over its labels, with or without the suffix _total; None if it is not there."""
    wanted = {name, f"{name}_total"}
    values = [value for found, value in _SAMPLE.findall(text) if found in wanted]
    try:
        return sum(map(float, values)) if values else None
    except ValueError:
        return None


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reason(error: object, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_s:.3g} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
