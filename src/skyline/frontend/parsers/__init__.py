"""Reasoning and tool calls in a model's output, streamed."""

from skyline.frontend.parsers.events import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallInvalid,
    ToolCallStart,
)
from skyline.frontend.parsers.formats import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    ReasoningFormat,
    ToolFormat,
    detect_formats,
)
from skyline.frontend.parsers.output import OutputParser
from skyline.frontend.parsers.whole import ParsedMessage, ToolCall, parse_whole

__all__ = [
    "REASONING_FORMATS",
    "TOOL_FORMATS",
    "ContentDelta",
    "Event",
    "OutputParser",
    "ParsedMessage",
    "ReasoningDelta",
    "ReasoningFormat",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallInvalid",
    "ToolCallStart",
    "ToolFormat",
    "detect_formats",
    "parse_whole",
]
