"""Reasoning and tool calls in a model's output, streamed."""

from skyline.frontend.parsers.detect import detect_formats
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
    JsonCall,
    NamedCall,
    ReasoningFormat,
    TaggedCall,
    ToolFormat,
)
from skyline.frontend.parsers.harmony import forced_header
from skyline.frontend.parsers.make import Parser, make_parser, random_call_id
from skyline.frontend.parsers.whole import ParsedMessage, ToolCall, parse_whole

__all__ = [
    "REASONING_FORMATS",
    "TOOL_FORMATS",
    "ContentDelta",
    "Event",
    "JsonCall",
    "NamedCall",
    "ParsedMessage",
    "Parser",
    "ReasoningDelta",
    "ReasoningFormat",
    "TaggedCall",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallInvalid",
    "ToolCallStart",
    "ToolFormat",
    "detect_formats",
    "forced_header",
    "make_parser",
    "parse_whole",
    "random_call_id",
]
