"""A tool call whose arguments alone are a JSON object: the name comes before it, or is known from elsewhere."""

from __future__ import annotations

from skyline.frontend.parsers.call_block import BlockState, CallBlock, Functions, NameReader
from skyline.frontend.parsers.events import Event
from skyline.frontend.parsers.formats import NamedCall
from skyline.frontend.parsers.json_scan import Mark, ObjectScanner
from skyline.frontend.parsers.markers import matches, skip_space


class ArgumentsBlock(CallBlock):
    """The arguments of a call whose name has been taken. It is announced when the object begins."""

    def __init__(self, functions: Functions, index: int, opening: str) -> None:
        super().__init__(functions, index, opening)
        self._step = self._arguments_start
        self._scanner = ObjectScanner()

    def _arguments_start(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        position = skip_space(text, position)
        if position == len(text):
            return BlockState.OPEN, position
        if text[position] != "{":
            return BlockState.INVALID, position
        self._announce(events)
        self._step = self._arguments
        return BlockState.OPEN, position

    def _arguments(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        mark, end = self._scanner.scan(text, position)
        while mark in (Mark.VALUE_START, Mark.VALUE_END):
            mark, end = self._scanner.scan(text, end)
        if end > position:
            self._emit(text[position:end], events)
        if mark is Mark.BROKEN:
            return BlockState.INVALID, end
        return BlockState.CALL if mark is Mark.DONE else BlockState.OPEN, end


class NamedBlock(ArgumentsBlock):
    def __init__(self, body: NamedCall, functions: Functions, index: int, opening: str) -> None:
        super().__init__(functions, index, opening)
        self._body = body
        self._step = self._name_start
        self._reader = NameReader()
        self._id = NameReader()

    def _name_start(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        position = skip_space(text, position)
        found = matches(text, position, self._body.name_start)
        if not found or position == len(text):
            return BlockState.OPEN if found is not False else BlockState.INVALID, position
        self._step = self._read_name
        return BlockState.OPEN, skip_space(text, position + len(self._body.name_start))

    def _read_name(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        if not self._reader.name:
            position = skip_space(text, position)
        complete, position = self._reader.read(text, position)
        if complete is None or (complete and not self.take_name(self._reader.name)):
            return BlockState.INVALID, position
        if complete:
            self._step = self._name_end
        return BlockState.OPEN, position

    def _name_end(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        position = skip_space(text, position)
        if position == len(text):
            return BlockState.OPEN, position
        if text[position] == "{":
            self._step = self._arguments_start
            return BlockState.OPEN, position
        ended = matches(text, position, self._body.name_end)
        if ended:
            self._step = self._arguments_start
            return BlockState.OPEN, position + len(self._body.name_end)
        has_id = bool(self._body.id_start) and matches(text, position, self._body.id_start)
        if has_id:
            self._step = self._read_id
            return BlockState.OPEN, position + len(self._body.id_start)
        return BlockState.INVALID if ended is False and has_id is False else BlockState.OPEN, position

    def _read_id(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        complete, position = self._id.read(text, position)
        if complete is None:
            return BlockState.INVALID, position
        if complete:
            self._step = self._name_end
        return BlockState.OPEN, position
