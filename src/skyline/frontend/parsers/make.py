"""The parser for a checkpoint's formats."""

from __future__ import annotations

import functools
import secrets
import string
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from skyline.frontend.parsers.events import Event
from skyline.frontend.parsers.formats import ReasoningFormat, ToolFormat
from skyline.frontend.parsers.harmony import HarmonyParser
from skyline.frontend.parsers.output import OutputParser

_SHORT_ID_CHARS = string.ascii_letters + string.digits


class Parser(Protocol):
    """Splits a message's text into events."""

    def push(self, text: str) -> list[Event]:
        """Take in more text; return what is now certain."""

    def finish(self) -> list[Event]:
        """The text ends here; return what was held back."""


def random_call_id(tools: ToolFormat | None = None) -> str:
    """An id in the style of the OpenAI API, unless the format's templates would refuse it."""
    if tools is not None and tools.short_ids:
        return "".join(secrets.choice(_SHORT_ID_CHARS) for _ in range(9))
    return "call_" + secrets.token_hex(12)


def make_parser(
    reasoning: ReasoningFormat | None,
    tools: ToolFormat | None,
    allowed_tools: Collection[str] | None = None,
    *,
    schemas: Mapping[str, Mapping[str, Any]] | None = None,
    prompt: str = "",
    new_call_id: Callable[[], str] | None = None,
) -> Parser:
    """See OutputParser and HarmonyParser for the arguments. If one of the formats is harmony, both are."""
    new_id = new_call_id or functools.partial(random_call_id, tools)
    if (reasoning is not None and reasoning.harmony) or (tools is not None and tools.harmony):
        return HarmonyParser(reasoning is not None, tools is not None, allowed_tools, new_call_id=new_id, prompt=prompt)
    return OutputParser(reasoning, tools, allowed_tools, new_call_id=new_id, schemas=schemas)
