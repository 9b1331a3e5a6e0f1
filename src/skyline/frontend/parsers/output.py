"""Splits the text that a model generates into reasoning, content and tool calls, while it is being generated."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection
from enum import Enum, auto

from skyline.frontend.parsers.call_block import BlockState, CallBlock
from skyline.frontend.parsers.events import ContentDelta, Event, ReasoningDelta, ToolCallInvalid
from skyline.frontend.parsers.formats import ReasoningFormat, ToolFormat
from skyline.frontend.parsers.json_scan import WHITESPACE
from skyline.frontend.parsers.spaced_text import SpacedText


def random_call_id() -> str:
    """An id in the style of the OpenAI API."""
    return "call_" + secrets.token_hex(12)


class _State(Enum):
    BEFORE_REASONING = auto()  # `start` may come
    REASONING = auto()
    MESSAGE_START = auto()  # a bare call may come
    CONTENT = auto()
    CALL = auto()  # in a block
    AFTER_CALL = auto()  # `end`, or another object, may come


class OutputParser:
    """Reads the text in any pieces; all events' texts joined do not depend on how it was cut. Never raises.

    - Reasoning is recognised only at the beginning, and goes on to `end` or to the end of the text.
    - A tool call is reported when it is certain to be one of `allowed_tools` (None: any name); its arguments are passed
      on letter by letter. A block that is not valid becomes content, as it was written; if it had been announced,
      `ToolCallInvalid` says so first. Calls without that event have arguments that are one valid JSON object.
    - White space is dropped around the reasoning, between it and the answer, and next to tool calls, unless content
      stands on both sides of a call: then what stood before the call stays. Everything else is kept.

    Time is linear in the length of the text. What is held back is at most a marker's length, the white space before a
    possible edge, and an object until it is known to be a call.
    """

    def __init__(
        self,
        reasoning: ReasoningFormat | None,
        tools: ToolFormat | None,
        allowed_tools: Collection[str] | None = None,
        *,
        new_call_id: Callable[[], str] = random_call_id,
    ) -> None:
        self._reasoning_format = reasoning
        self._tools = tools
        self._allowed = None if allowed_tools is None else frozenset(allowed_tools)
        self._new_call_id = new_call_id
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
            self._fail_call()
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
        matched = _matches(text, position, self._reasoning_format.start)
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
        marker = self._reasoning_format.end
        end, found = _find(text, position, marker)
        self._add_reasoning(text[position:end])
        if not found:
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
        if self._tools is None or not self._tools.start:
            self._add_content(text[position:])
            return len(text)
        end, found = _find(text, position, self._tools.start)
        self._add_content(text[position:end])
        if not found:
            return end
        self._open_call(self._tools.start)
        return end + len(self._tools.start)

    def _in_call(self, text: str, position: int) -> int:
        assert self._block is not None
        state, position = self._block.push(text, position, self._events)
        if state is BlockState.INVALID:
            self._fail_call()
            self._state = _State.CONTENT
        elif state is BlockState.CALL:
            self._num_calls += 1
            self._block = None
            if not self._content.begun:
                self._content.take_waiting()
            self._content.skip_space = True
            self._state = _State.AFTER_CALL
        return position

    def _after_call(self, text: str, position: int) -> int:
        assert self._tools is not None
        position = self._skip_space(text, position)
        if position == len(text):
            return position
        if self._tools.end:
            return self._after_object(text, position, self._tools)
        return self._between_objects(text, position, self._tools)

    def _after_object(self, text: str, position: int, tools: ToolFormat) -> int:
        ended = _matches(text, position, tools.end)
        if ended is None:
            return position
        self._opening.clear()
        self._state = _State.CONTENT
        return position + len(tools.end) if ended else position

    def _between_objects(self, text: str, position: int, tools: ToolFormat) -> int:
        if text[position] == tools.separator and tools.separator not in self._opening:
            self._opening.append(tools.separator)
            return position + 1
        started = bool(tools.start) and _matches(text, position, tools.start)
        if started:
            self._open_call(tools.start)
            return position + len(tools.start)
        if text[position] == "{":
            self._open_call("")
        elif started is False:
            self._state = _State.CONTENT
        return position

    # --- parts of the steps

    def _skip_space(self, text: str, position: int) -> int:
        begin = position
        while position < len(text) and text[position] in WHITESPACE:
            position += 1
        if position > begin:
            self._opening.append(text[begin:position])
        return position

    def _take_opening(self) -> str:
        text = "".join(self._opening)
        self._opening.clear()
        return text

    def _return_opening(self) -> None:
        self._add_content(self._take_opening())

    def _open_call(self, marker: str) -> None:
        assert self._tools is not None
        opening = self._take_opening() + marker
        self._block = CallBlock(self._tools, self._allowed, self._num_calls, self._new_call_id, opening)
        self._state = _State.CALL

    def _fail_call(self) -> None:
        if self._block is None:
            return
        if self._block.announced:
            self._events.append(ToolCallInvalid(self._num_calls))
            self._num_calls += 1  # its index is used up
        self._add_content(self._block.raw)
        self._block = None

    def _end_after_call(self, text: str) -> None:
        """Half an end marker and a separator that nothing follows are punctuation, not content."""
        assert self._tools is not None
        if not self._tools.end and text.strip(WHITESPACE + self._tools.separator):
            self._add_content(text)

    def _add_reasoning(self, text: str) -> None:
        if text := self._reasoning.push(text):
            self._events.append(ReasoningDelta(text))

    def _add_content(self, text: str) -> None:
        self._append_content(self._content.push(text))

    def _append_content(self, text: str) -> None:
        if text:
            self._events.append(ContentDelta(text))


def _find(text: str, position: int, marker: str) -> tuple[int, bool]:
    """(where the marker begins, True), or (up to where there is certainly none, False)."""
    found = text.find(marker, position)
    if found >= 0:
        return found, True
    begin = max(position, len(text) - len(marker) + 1)
    while (begin := text.find(marker[0], begin)) >= 0:
        if marker.startswith(text[begin:]):
            return begin, False
        begin += 1
    return len(text), False


def _matches(text: str, position: int, marker: str) -> bool | None:
    """Whether the marker stands at `position`; None if the text ends before that is certain."""
    if text.startswith(marker, position):
        return True
    return None if marker.startswith(text[position : position + len(marker)]) else False
