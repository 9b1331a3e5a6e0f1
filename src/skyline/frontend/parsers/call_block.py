"""One tool call that arrives in pieces: what all kinds of calls share, and calls that are a JSON object."""

from __future__ import annotations

import re
from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from skyline.frontend.parsers.events import Event, ToolCallArguments, ToolCallStart
from skyline.frontend.parsers.formats import JsonCall
from skyline.frontend.parsers.json_scan import Mark, ObjectScanner
from skyline.frontend.parsers.markers import matches, skip_space

MAX_NAME_CHARS = 512

_NAME_RUN = re.compile(r'[^\s<>"`\[\]{}]*')  # no function's name has more, and every marker begins with one of those


class BlockState(Enum):
    OPEN = auto()
    CALL = auto()  # complete, and a valid call
    INVALID = auto()


@dataclass(frozen=True)
class Functions:
    """What the calls of a message may be. `allowed` None: any name; `schemas` has the functions' JSON schemas."""

    allowed: frozenset[str] | None
    schemas: Mapping[str, Mapping[str, Any]]
    new_id: Callable[[], str]


Step = Callable[[str, int, list[Event]], tuple[BlockState, int]]


class CallBlock(ABC):
    """Reads one call. `raw` is all of it so far, for the case that it turns out not to be a call.

    `_step` uses text from a position and returns the new one; without progress, or another step, more text is needed:
    what was not used, which is less than a marker, is handed in again.
    """

    _step: Step

    def __init__(self, functions: Functions, index: int, opening: str) -> None:
        self.announced = False
        self._raw = [opening]
        self._functions = functions
        self._index = index
        self._name: str | None = None

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    def push(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        """Read `text` from `position` to the end of the call at most, adding what it tells to `events`."""
        begin = position
        state = BlockState.OPEN
        while state is BlockState.OPEN:
            step, start = self._step, position
            state, position = step(text, position, events)
            if position == start and self._step == step:
                break
        self._raw.append(text[begin:position])
        return state, position

    def take_name(self, name: str) -> bool:
        """Whether a call may have this name."""
        allowed = self._functions.allowed
        if not name or (allowed is not None and name not in allowed):
            return False
        # JSON can spell half of a surrogate pair, which no response could carry.
        if any("\ud800" <= char <= "\udfff" for char in name):
            return False
        self._name = name
        return True

    def _announce(self, events: list[Event]) -> None:
        assert self._name is not None
        self.announced = True
        events.append(ToolCallStart(self._index, self._functions.new_id(), self._name))

    def _emit(self, text: str, events: list[Event]) -> None:
        events.append(ToolCallArguments(self._index, text))


class JsonBlock(CallBlock):
    """The call is announced when its name is known and its arguments have begun, so that an object which merely has a
    name is not taken for a call. Arguments that come before the name wait for it.
    """

    def __init__(self, body: JsonCall, functions: Functions, index: int, opening: str) -> None:
        super().__init__(functions, index, opening)
        self._body = body
        self._step = self._list_start
        self._scanner = ObjectScanner()
        self._has_arguments = False
        self._in_arguments = False
        self._waiting: list[str] = []  # arguments from before the name

    def _list_start(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        position = skip_space(text, position)
        found = matches(text, position, self._body.list_start)
        if found is None:
            return BlockState.OPEN, position
        self._step = self._object
        return BlockState.OPEN, position + len(self._body.list_start) if found else position

    def _object(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        state = BlockState.OPEN
        while state is BlockState.OPEN:
            start = position
            mark, position = self._scanner.scan(text, position)
            if self._in_arguments and position > start:
                self._pass_on(text[start:position], events)
            if mark is Mark.MORE:
                break
            state = self._react(mark, text, position, events)
        return state, position

    def _react(self, mark: Mark, text: str, position: int, events: list[Event]) -> BlockState:
        if mark is Mark.BROKEN:
            return BlockState.INVALID
        if mark is Mark.DONE:
            return self._complete(events)
        key = self._scanner.key
        if mark is Mark.VALUE_START:
            if key in self._body.arguments_keys and not self._has_arguments:
                if text[position] != "{":
                    return BlockState.INVALID
                self._has_arguments = self._in_arguments = True
                self._announce_if_known(events)
        elif self._in_arguments:
            self._in_arguments = False
        elif key == self._body.name_key and self._name is None:
            if not self.take_name(self._scanner.string or ""):
                return BlockState.INVALID
            self._announce_if_known(events)
        return BlockState.OPEN

    def _announce_if_known(self, events: list[Event]) -> None:
        if self._name is None or not self._has_arguments:
            return
        self._announce(events)
        if self._waiting:
            self._emit("".join(self._waiting), events)
            self._waiting.clear()

    def _pass_on(self, text: str, events: list[Event]) -> None:
        if self.announced:
            self._emit(text, events)
        else:
            self._waiting.append(text)

    def _complete(self, events: list[Event]) -> BlockState:
        if self._name is None or not (self._has_arguments or self._body.arguments_optional):
            return BlockState.INVALID
        if not self._has_arguments:
            self._has_arguments = True
            self._waiting.append("{}")
            self._announce_if_known(events)
        return BlockState.CALL


class NameReader:
    """A function's name that arrives in pieces."""

    def __init__(self) -> None:
        self.name = ""

    def read(self, text: str, position: int) -> tuple[bool | None, int]:
        """(whether the name is complete, None if it is too long; the position after what belongs to it)."""
        match = _NAME_RUN.match(text, position)
        assert match is not None  # the run may be empty
        self.name += match[0]
        if len(self.name) > MAX_NAME_CHARS:
            return None, match.end()
        return match.end() < len(text), match.end()
