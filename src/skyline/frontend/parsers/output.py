"""Splits the text that a model generates into reasoning, content and tool calls, while it is being generated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from enum import Enum, auto
from typing import Any

from skyline.frontend.parsers.call_block import BlockState, CallBlock, Functions, JsonBlock
from skyline.frontend.parsers.events import ContentDelta, Event, ReasoningDelta, ToolCallInvalid
from skyline.frontend.parsers.formats import JsonCall, NamedCall, ReasoningFormat, ToolFormat
from skyline.frontend.parsers.markers import WHITESPACE, Markers, matches, skip_space
from skyline.frontend.parsers.named_block import NamedBlock
from skyline.frontend.parsers.spaced_text import SpacedText
from skyline.frontend.parsers.tagged_block import TaggedBlock


class _State(Enum):
    BEFORE_REASONING = auto()  # `start` may come
    REASONING = auto()
    MESSAGE_START = auto()  # a bare call may come
    CONTENT = auto()
    CALL = auto()  # in a block
    AFTER_CALL = auto()  # `end`, or another object, may come


class OutputParser:
    """Reads the text in any pieces; all events' texts joined do not depend on how it was cut. Never raises.

    - Reasoning is recognised only at the beginning, unless its format says otherwise, and goes on to `end` or to the
      end of the text.
    - A tool call is reported when it is certain to be one of `allowed_tools` (None: any name); its arguments are passed
      on letter by letter. A block that is not valid becomes content, as it was written; if it had been announced,
      `ToolCallInvalid` says so first. Calls without that event have arguments that are one valid JSON object.
    - White space is dropped around the reasoning, between it and the answer, and next to tool calls, unless content
      stands on both sides of a call: then what stood before the call stays. Everything else is kept.

    `schemas` has the JSON schemas of the functions' parameters by name: formats that write arguments as plain text need
    them to tell strings from other values.

    Time is linear in the length of the text. What is held back is at most a marker's length, the white space before a
    possible edge, and a call until it is known to be one.
    """

    def __init__(
        self,
        reasoning: ReasoningFormat | None,
        tools: ToolFormat | None,
        allowed_tools: Collection[str] | None = None,
        *,
        new_call_id: Callable[[], str],
        schemas: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._reasoning_format = reasoning
        self._tools = tools
        allowed = None if allowed_tools is None else frozenset(allowed_tools)
        self._functions = Functions(allowed, schemas or {}, new_call_id)
        self._reasoning_end = Markers(*([] if reasoning is None else [reasoning.end]))
        starts = [] if tools is None or not tools.start else [tools.start]
        if reasoning is not None and reasoning.anywhere:
            starts.append(reasoning.start)
        self._starts = Markers(*starts)
        self._state = _State.BEFORE_REASONING if reasoning else _State.MESSAGE_START
        self._rest = ""  # text not decided yet
        self._opening: list[str] = []  # text before a marker or an object, which returns as content if there is none
        self._reasoning = SpacedText(skip_space=True)
        self._content = SpacedText(skip_space=False)
        self._block: CallBlock | None = None
        self._num_calls = 0
        self._events: list[Event] = []
        self._steps = {
            _State.BEFORE_REASONING: self._before_reasoning,
            _State.REASONING: self._in_reasoning,
            _State.MESSAGE_START: self._message_start,
            _State.CONTENT: self._in_content,
            _State.CALL: self._in_call,
            _State.AFTER_CALL: self._after_call,
        }

    def push(self, text: str) -> list[Event]:
        """Take in more text; return what is now certain."""
        text = self._rest + text
        position = 0
        while position < len(text):
            state = self._state
            begin, position = position, self._steps[state](text, position)
            if position == begin and self._state is state:
                break
        self._rest = text[position:]
        return self._take_events()

    def finish(self) -> list[Event]:
        """The text ends here; return what was held back."""
        text, self._rest = self._take_opening() + self._rest, ""
        if self._state is _State.REASONING or (self._state is _State.BEFORE_REASONING and self._starts_inside):
            self._add_reasoning(text)
        elif self._state is _State.CALL:
            self._fail_call(text)
        elif self._state is _State.AFTER_CALL:
            self._end_after_call(text)
        else:
            self._add_content(text)
        if not self._content.skip_space:
            self._append_content(self._content.take_waiting())
        self._state = _State.CONTENT
        return self._take_events()

    @property
    def _starts_inside(self) -> bool:
        return self._reasoning_format is not None and self._reasoning_format.starts_inside

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # --- one step of each state: use text from `position`, return the new position; no progress means: wait for more

    def _before_reasoning(self, text: str, position: int) -> int:
        assert self._reasoning_format is not None
        position = self._skip_space(text, position)
        if position == len(text):
            return position
        matched = matches(text, position, self._reasoning_format.start)
        if matched is None:
            return position
        if matched or self._starts_inside:
            self._opening.clear()
            self._state = _State.REASONING
        else:
            self._state = _State.MESSAGE_START
        return position + len(self._reasoning_format.start) if matched else position

    def _in_reasoning(self, text: str, position: int) -> int:
        assert self._reasoning_format is not None
        end, marker = self._reasoning_end.find(text, position)
        self._add_reasoning(text[position:end])
        if marker is None:
            return end
        self._content.skip_space = True
        self._state = _State.MESSAGE_START
        return end + len(marker)

    def _message_start(self, text: str, position: int) -> int:
        if self._tools is None or not self._tools.bare:
            self._state = _State.CONTENT
            return position
        position = self._skip_space(text, position)
        if position < len(text):
            if text[position] == "{":
                self._open_call("")
            else:
                self._state = _State.CONTENT
        return position

    def _in_content(self, text: str, position: int) -> int:
        self._return_opening()
        end, marker = self._starts.find(text, position)
        self._add_content(text[position:end])
        if marker is None:
            return end
        if self._tools is not None and marker == self._tools.start:
            self._open_call(marker)
        else:
            self._drop_leading_space()
            self._state = _State.REASONING
        return end + len(marker)

    def _in_call(self, text: str, position: int) -> int:
        assert self._block is not None
        state, position = self._block.push(text, position, self._events)
        if state is BlockState.INVALID:
            self._fail_call("")
            self._state = _State.CONTENT
        elif state is BlockState.CALL:
            self._num_calls += 1
            self._block = None
            self._drop_leading_space()
            self._content.skip_space = True
            self._state = _State.AFTER_CALL
        return position

    def _after_call(self, text: str, position: int) -> int:
        assert self._tools is not None
        tools = self._tools
        position = self._skip_space(text, position)
        if position == len(text):
            return position
        if text[position] == tools.separator and tools.separator not in self._opening:
            self._opening.append(tools.separator)
            return position + 1
        undecided = False
        for marker in (*tools.call_ends, tools.end, tools.again, tools.start):
            found = bool(marker) and matches(text, position, marker)
            undecided = undecided or found is None
            if not found:
                continue
            if marker == tools.again:
                self._open_call("")
                return position
            if marker == tools.start:
                self._open_call(marker)
            else:
                self._opening.clear()
                self._state = _State.CONTENT if marker == tools.end else _State.AFTER_CALL
            return position + len(marker)
        if not undecided:
            self._state = _State.CONTENT
        return position

    # --- parts of the steps

    def _skip_space(self, text: str, position: int) -> int:
        end = skip_space(text, position)
        if end > position:
            self._opening.append(text[position:end])
        return end

    def _take_opening(self) -> str:
        text = "".join(self._opening)
        self._opening.clear()
        return text

    def _return_opening(self) -> None:
        self._add_content(self._take_opening())

    def _drop_leading_space(self) -> None:
        if not self._content.begun:
            self._content.take_waiting()

    def _open_call(self, marker: str) -> None:
        assert self._tools is not None
        self._block = _new_block(self._tools, self._functions, self._num_calls, self._take_opening() + marker)
        self._state = _State.CALL

    def _fail_call(self, rest: str) -> None:
        if self._block is None:
            return
        if self._block.announced:
            self._events.append(ToolCallInvalid(self._num_calls))
            self._num_calls += 1  # its index is used up
        self._add_content(self._block.raw + rest)
        self._block = None

    def _end_after_call(self, text: str) -> None:
        """Half an end marker and a separator that nothing follows are punctuation, not content."""
        assert self._tools is not None
        left = text.strip(WHITESPACE + self._tools.separator)
        if not any(marker.startswith(left) for marker in (*self._tools.call_ends, self._tools.end, "")):
            self._add_content(text)

    def _add_reasoning(self, text: str) -> None:
        if text := self._reasoning.push(text):
            self._events.append(ReasoningDelta(text))

    def _add_content(self, text: str) -> None:
        self._append_content(self._content.push(text))

    def _append_content(self, text: str) -> None:
        if text:
            self._events.append(ContentDelta(text))


def _new_block(tools: ToolFormat, functions: Functions, index: int, opening: str) -> CallBlock:
    body = tools.body
    if isinstance(body, JsonCall):
        return JsonBlock(body, functions, index, opening)
    if isinstance(body, NamedCall):
        return NamedBlock(body, functions, index, opening)
    return TaggedBlock(body, functions, index, opening)
