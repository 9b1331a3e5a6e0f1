"""One tool call that arrives in pieces: a JSON object with a name and arguments."""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import Enum, auto

from skyline.frontend.parsers.events import Event, ToolCallArguments, ToolCallStart
from skyline.frontend.parsers.formats import ToolFormat
from skyline.frontend.parsers.json_scan import Mark, ObjectScanner


class BlockState(Enum):
    OPEN = auto()
    CALL = auto()  # complete, and a valid call
    INVALID = auto()


class CallBlock:
    """Reads one object. `raw` is all of the block so far, for the case that it turns out not to be a call.

    The call is announced when its name is known and its arguments have begun, so that an object which merely has a
    name is not taken for a call. Arguments that come before the name wait for it.
    """

    def __init__(
        self,
        format: ToolFormat,
        allowed: Collection[str] | None,
        index: int,
        new_id: Callable[[], str],
        opening: str,
    ) -> None:
        self.announced = False
        self._raw = [opening]
        self._format = format
        self._allowed = allowed
        self._index = index
        self._new_id = new_id
        self._scanner = ObjectScanner()
        self._name: str | None = None
        self._has_arguments = False
        self._in_arguments = False
        self._waiting: list[str] = []  # arguments from before the name

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    def push(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        """Read `text` from `position` to the end of the object at most, adding what it tells to `events`."""
        begin = position
        state = BlockState.OPEN
        while state is BlockState.OPEN:
            start = position
            mark, position = self._scanner.scan(text, position)
            if self._in_arguments and position > start:
                self._emit(text[start:position], events)
            if mark is Mark.MORE:
                break
            state = self._react(mark, text, position, events)
        self._raw.append(text[begin:position])
        return state, position

    def _react(self, mark: Mark, text: str, position: int, events: list[Event]) -> BlockState:
        if mark is Mark.BROKEN:
            return BlockState.INVALID
        if mark is Mark.DONE:
            return self._complete(events)
        key = self._scanner.key
        if mark is Mark.VALUE_START:
            if key in self._format.arguments_keys and not self._has_arguments:
                if text[position] != "{":
                    return BlockState.INVALID
                self._has_arguments = self._in_arguments = True
                self._announce(events)
        elif self._in_arguments:
            self._in_arguments = False
        elif key == self._format.name_key and self._name is None:
            if not self._usable(self._scanner.string):
                return BlockState.INVALID
            self._name = self._scanner.string
            self._announce(events)
        return BlockState.OPEN

    def _usable(self, name: str | None) -> bool:
        if not name or (self._allowed is not None and name not in self._allowed):
            return False
        # JSON can spell half of a surrogate pair, which no response could carry.
        return not any("\ud800" <= char <= "\udfff" for char in name)

    def _announce(self, events: list[Event]) -> None:
        if self._name is None or not self._has_arguments:
            return
        self.announced = True
        events.append(ToolCallStart(self._index, self._new_id(), self._name))
        if self._waiting:
            events.append(ToolCallArguments(self._index, "".join(self._waiting)))
            self._waiting.clear()

    def _emit(self, text: str, events: list[Event]) -> None:
        if self.announced:
            events.append(ToolCallArguments(self._index, text))
        else:
            self._waiting.append(text)

    def _complete(self, events: list[Event]) -> BlockState:
        if self._name is None or not (self._has_arguments or self._format.arguments_optional):
            return BlockState.INVALID
        if not self._has_arguments:
            self._has_arguments = True
            self._waiting.append("{}")
            self._announce(events)
        return BlockState.CALL
