"""Parsing of a message that is complete."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec

from skyline.frontend.parsers.events import (
    ContentDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallInvalid,
    ToolCallStart,
)
from skyline.frontend.parsers.formats import ReasoningFormat, ToolFormat
from skyline.frontend.parsers.make import make_parser


class ToolCall(msgspec.Struct, frozen=True):
    """`arguments` is the JSON text of one object."""

    id: str
    name: str
    arguments: str


class ParsedMessage(msgspec.Struct, frozen=True):
    """None where there is no such part."""

    content: str | None
    reasoning: str | None
    tool_calls: list[ToolCall]


def parse_whole(
    text: str,
    reasoning: ReasoningFormat | None,
    tools: ToolFormat | None,
    allowed_tools: Collection[str] | None = None,
    *,
    schemas: Mapping[str, Mapping[str, Any]] | None = None,
    new_call_id: Callable[[], str] | None = None,
) -> ParsedMessage:
    """What the formats' parser makes of the text. Calls that turn out invalid are content only."""
    parser = make_parser(reasoning, tools, allowed_tools, schemas=schemas, new_call_id=new_call_id)
    content: list[str] = []
    thoughts: list[str] = []
    calls: dict[int, tuple[ToolCallStart, list[str]]] = {}
    for event in parser.push(text) + parser.finish():
        match event:
            case ContentDelta(part):
                content.append(part)
            case ReasoningDelta(part):
                thoughts.append(part)
            case ToolCallStart(index):
                calls[index] = event, []
            case ToolCallArguments(index, part):
                calls[index][1].append(part)
            case ToolCallInvalid(index):
                del calls[index]
    return ParsedMessage(
        content="".join(content) or None,
        reasoning="".join(thoughts) or None,
        tool_calls=[ToolCall(start.id, start.name, "".join(parts)) for start, parts in calls.values()],
    )
