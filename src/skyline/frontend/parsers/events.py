"""What the output parser reports, in the order of the text."""

from __future__ import annotations

import msgspec


class ContentDelta(msgspec.Struct, frozen=True):
    """More of the answer itself."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True):
    """More of the model's reasoning."""

    text: str


class ToolCallStart(msgspec.Struct, frozen=True):
    """A call of the function `name` begins. `index` counts the calls of this message from 0."""

    index: int
    id: str
    name: str


class ToolCallArguments(msgspec.Struct, frozen=True):
    """More of the JSON text of call `index`'s arguments, as the model wrote it if it wrote JSON."""

    index: int
    text: str


class ToolCallInvalid(msgspec.Struct, frozen=True):
    """Call `index`, which has been announced, turned out broken or unfinished; its raw text follows as content."""

    index: int


Event = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallArguments | ToolCallInvalid
