"""What an operator can set on the HTTP server."""

from __future__ import annotations

import os
from dataclasses import dataclass, field


def _keys_from_environment() -> list[str]:
    key = os.environ.get("SKYLINE_API_KEY", "")
    return [key] if key else []


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Defaults serve one user on this machine. With an API key set, every route but /health asks for one."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None  # None: no admin routes at all
    api_keys: list[str] = field(default_factory=_keys_from_environment)
    allowed_origins: list[str] = field(default_factory=list)  # CORS; empty: off
    served_model_names: list[str] = field(default_factory=list)  # empty: the model's own name. The first is reported
    max_queued: int = 4096  # sequences under way at once
    max_request_tokens: int = 1_000_000  # prompt and output of all sequences of one request; see Service.charge
    max_body_bytes: int = 16 * 1024 * 1024
    body_timeout: float = 60.0  # seconds a client may take to send its body
    drain_timeout: float = 30.0  # seconds that requests under way may take after SIGTERM
    chat_template: str | None = None  # Jinja source to use instead of the checkpoint's
    reasoning_parser: str = "auto"  # "auto": from the chat template; "none"; or a name in REASONING_FORMATS
    tool_parser: str = "auto"  # likewise, TOOL_FORMATS
    access_log: bool = False

    def validate(self) -> None:
        """Raise ValueError, naming the option."""
        from skyline.frontend.parsers import REASONING_FORMATS, TOOL_FORMATS

        for name, port in (("port", self.port), ("admin_port", self.admin_port)):
            if port is not None and not 0 <= port <= 65535:
                raise ValueError(f"{name} must be from 0 to 65535, not {port}")
        for name in ("max_queued", "max_request_tokens", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name, known in (("reasoning_parser", REASONING_FORMATS), ("tool_parser", TOOL_FORMATS)):
            if getattr(self, name) not in ("auto", "none", *known):
                raise ValueError(f"{name} must be auto, none or one of {', '.join(known)}, not {getattr(self, name)!r}")
        if not all(self.api_keys):
            raise ValueError("api_keys must not hold an empty key")
