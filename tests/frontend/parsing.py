from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from skyline.frontend.parsers import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    ContentDelta,
    Event,
    OutputParser,
    ParsedMessage,
    ReasoningDelta,
    ToolCall,
    ToolCallArguments,
    parse_whole,
)

QWEN, R1 = REASONING_FORMATS["qwen3"], REASONING_FORMATS["deepseek_r1"]
HERMES, LLAMA = TOOL_FORMATS["hermes"], TOOL_FORMATS["llama3_json"]
FORMATS = list(itertools.product([None, QWEN, R1], [None, HERMES, LLAMA]))


def numbered_ids():
    return map("call_{}".format, itertools.count()).__next__


def run(parts: Iterable[str], *formats, allowed=None) -> list[Event]:
    """All events, with neighbours of the same kind joined."""
    parser = OutputParser(*formats, allowed_tools=allowed, new_call_id=numbered_ids())
    joined: list[Event] = []
    for event in [event for part in parts for event in parser.push(part)] + parser.finish():
        last = joined[-1] if joined else None
        if isinstance(event, ContentDelta | ReasoningDelta) and type(last) is type(event):
            joined[-1] = type(event)(last.text + event.text)
        elif isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments):
            assert last.index == event.index
            joined[-1] = ToolCallArguments(event.index, last.text + event.text)
        else:
            joined.append(event)
    assert parser.finish() == []
    return joined


def whole(text: str, *formats, allowed=None) -> ParsedMessage:
    return parse_whole(text, *formats, allowed_tools=allowed, new_call_id=numbered_ids())


def cut(text: str, places: Sequence[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


def call(name: str, arguments: str, number: int = 0) -> ToolCall:
    return ToolCall(f"call_{number}", name, arguments)
