"""Keeps keys out of what is published: the page shows commands and flags exactly, except what opens doors."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"

# Names whose values are secret by their last word: HF_TOKEN, --api-key, but not --max-tokens or --key-cache.
_SECRET = re.compile(
    r"(?:^|[_\-.])(?:token|key|apikey|secret|password|passwd|credentials?|access_key_id)$", re.IGNORECASE
)
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|\S)+|\s+""")
_USER_OF_URL = re.compile(r"(\w+://)[^\s/@]+@")
_BEARER = re.compile(r"(Bearer\s+)[^\s'\"]+", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a variable or flag of this name holds a key, token or password."""
    return _SECRET.search(name.lstrip("-")) is not None


def text(value: str) -> str:
    """Without the user and password of addresses and without bearer tokens."""
    return _BEARER.sub(rf"\1{HIDDEN}", _USER_OF_URL.sub(rf"\1{HIDDEN}@", value))


def arguments(args: list[str]) -> list[str]:
    """Arguments without the values of secret flags and variables: `--name value`, `--name=value`, `NAME=value`."""
    found: list[str] = []
    hide_next = False
    for argument in args:
        name, equals, _ = argument.partition("=")
        if hide_next:
            found.append(HIDDEN)
        elif equals and is_secret(name):
            found.append(f"{name}={HIDDEN}")
        else:
            found.append(text(argument))
        hide_next = not hide_next and not equals and argument.startswith("-") and is_secret(name)
    return found


def command(line: str) -> str:
    """The same for a command line; its spaces and quotes stay as they are."""
    parts = _WORD.findall(line)
    words = iter(arguments([part for part in parts if not part.isspace()]))
    return "".join(part if part.isspace() else next(words) for part in parts)


def engine(spec: dict[str, Any]) -> dict[str, Any]:
    """The same for an engine's part of a point's specification (`EngineSpec` as JSON)."""
    clean = dict(spec)
    if "args" in clean:
        clean["args"] = arguments(clean["args"])
    if "env" in clean:
        clean["env"] = {name: HIDDEN if is_secret(name) else text(value) for name, value in clean["env"].items()}
    if clean.get("url"):
        clean["url"] = text(clean["url"])
    return clean
