"""A tool call whose arguments are values between tags. They are passed on as the JSON text of one object."""

from __future__ import annotations

import json

from skyline.frontend.parsers.call_block import BlockState, CallBlock, Functions, NameReader
from skyline.frontend.parsers.events import Event
from skyline.frontend.parsers.formats import TaggedCall
from skyline.frontend.parsers.markers import WHITESPACE, Markers, matches, skip_space
from skyline.frontend.parsers.typed_value import ONLY_STRING, as_json, parameter_types


class TaggedBlock(CallBlock):
    """The call is announced with its first parameter, or with its end. Strings are passed on letter by letter; of what
    else a value may be, its whole text must be known.
    """

    def __init__(self, body: TaggedCall, functions: Functions, index: int, opening: str) -> None:
        super().__init__(functions, index, opening)
        self._body = body
        self._step = self._name_start
        self._reader = NameReader()
        self._key_end = Markers(body.key_end)
        self._value_end = Markers(body.value_end)
        self._parts: list[str] = []  # of a key, a flag, or a value that is not known to be a string
        self._types: frozenset[str] | None = None  # of the value; None: any
        self._begun = False  # some of the value has come
        self._newline = ""  # may be the one before the value's end marker

    def _name_start(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        position = skip_space(text, position)
        found = matches(text, position, self._body.name_start)
        if not found or position == len(text):
            return BlockState.OPEN if found is not False else BlockState.INVALID, position
        self._step = self._read_name
        return BlockState.OPEN, position + len(self._body.name_start)

    def _read_name(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        complete, position = self._reader.read(text, position)
        if complete is None or (complete and not self.take_name(self._reader.name)):
            return BlockState.INVALID, position
        if complete:
            self._step = self._name_end
        return BlockState.OPEN, position

    def _name_end(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        found = matches(text, position, self._body.name_end)
        if not found:
            return BlockState.OPEN if found is None else BlockState.INVALID, position
        self._step = self._next_parameter
        return BlockState.OPEN, position + len(self._body.name_end)

    def _next_parameter(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        position = skip_space(text, position)
        if position == len(text):
            return BlockState.OPEN, position
        ended = matches(text, position, self._body.end)
        if ended:
            if not self.announced:
                self._announce(events)
                self._emit("{", events)
            self._emit("}", events)
            return BlockState.CALL, position + len(self._body.end)
        more = matches(text, position, self._body.key_start)
        if more:
            self._step = self._read_key
            return BlockState.OPEN, position + len(self._body.key_start)
        return BlockState.INVALID if ended is False and more is False else BlockState.OPEN, position

    def _read_key(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        end, found = self._key_end.find(text, position)
        self._parts.append(text[position:end])
        if found is None:
            return BlockState.OPEN, end
        key = self._take_parts().strip(WHITESPACE)
        if not key:
            return BlockState.INVALID, end
        separator = ", " if self.announced else "{"
        if not self.announced:
            self._announce(events)
        self._emit(f"{separator}{_quoted(key)}: ", events)
        self._types = parameter_types(self._functions.schemas.get(self._name or ""), key)
        self._begun = False
        self._step = self._read_flag if self._body.string_flag else self._value_start
        return BlockState.OPEN, end + len(found)

    def _read_flag(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        for flag, types in (("true", ONLY_STRING), ("false", None)):
            found = matches(text, position, flag)
            if found is None:
                return BlockState.OPEN, position
            if found:
                self._types = types
                self._step = self._value_start
                return BlockState.OPEN, position + len(flag)
        return BlockState.INVALID, position

    def _value_start(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        position = skip_space(text, position) if self._body.value_start else position
        found = matches(text, position, self._body.value_start)
        if not found:
            return BlockState.OPEN if found is None else BlockState.INVALID, position
        if self._types == ONLY_STRING:
            self._emit('"', events)
        self._step = self._read_value
        return BlockState.OPEN, position + len(self._body.value_start)

    def _read_value(self, text: str, position: int, events: list[Event]) -> tuple[BlockState, int]:
        end, found = self._value_end.find(text, position)
        value = self._trimmed(text[position:end]) if self._body.trim_newline else text[position:end]
        if self._types != ONLY_STRING:
            self._parts.append(value)
        elif value:
            self._emit(_quoted(value)[1:-1], events)
        if found is None:
            return BlockState.OPEN, end
        self._newline = ""
        self._emit('"' if self._types == ONLY_STRING else as_json(self._take_parts(), self._types), events)
        self._step = self._next_parameter
        return BlockState.OPEN, end + len(found)

    def _trimmed(self, piece: str) -> str:
        """The piece of a value, without the newline that begins the value and one that may turn out to end it."""
        if not piece:
            return ""
        if not self._begun:
            self._begun = True
            piece = piece.removeprefix("\n")
        piece = self._newline + piece
        self._newline = "\n" if piece.endswith("\n") else ""
        return piece.removesuffix("\n")

    def _take_parts(self) -> str:
        text = "".join(self._parts)
        self._parts.clear()
        return text


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
