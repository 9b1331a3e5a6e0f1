"""A strict JSON scanner (RFC 8259) for one object that arrives in pieces. It copies nothing but top-level strings."""

from __future__ import annotations

import json
import re
from enum import Enum, auto

from skyline.frontend.parsers.markers import skip_space

MAX_DEPTH = 256  # deeper nesting counts as broken: readers of the result recurse

_STRING_RUN = re.compile(r'[^"\\\x00-\x1f]*')
_SCALAR_RUN = re.compile(r"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_HEX = frozenset("0123456789abcdefABCDEF")


class Mark(Enum):
    """Why `ObjectScanner.scan` returned."""

    MORE = auto()  # the text is used up
    VALUE_START = auto()  # at the first character of a top-level member's value; `key` says which member
    VALUE_END = auto()  # just after that value; `string` holds it if it is a string
    DONE = auto()  # just after the object
    BROKEN = auto()  # at the character that cannot stand there


class _Expect(Enum):
    OBJECT = auto()
    FIRST_KEY = auto()  # or "}"
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    FIRST_VALUE = auto()  # or "]"
    NEXT = auto()  # "," or the closing bracket
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    SCALAR = auto()
    END = auto()


class ObjectScanner:
    """Scans one JSON object, white space before it included. Time is linear in the text, however it is cut."""

    def __init__(self) -> None:
        self.key = ""  # of the latest top-level member
        self.string: str | None = None  # the latest top-level value, if it was a string
        self._expect = _Expect.OBJECT
        self._open: list[str] = []  # the closing brackets that are due
        self._announced = False  # VALUE_START was returned for the value that comes
        self._string_is_key = False
        self._hex_left = 0
        self._parts: list[str] = []  # of a top-level string, or of a scalar

    def scan(self, text: str, position: int) -> tuple[Mark, int]:
        """Read `text` from `position`. Returns what was met and where; call again from there to go on."""
        while position < len(text):
            expect = self._expect
            if expect is _Expect.STRING:
                position, mark = self._in_string(text, position)
            elif expect is _Expect.SCALAR:
                position, mark = self._in_scalar(text, position)
            elif expect is _Expect.ESCAPE or expect is _Expect.HEX:
                mark = self._in_escape(text[position])
                position += mark is not Mark.BROKEN
            else:
                position = skip_space(text, position)
                if position == len(text):
                    break
                consumed, mark = self._structure(text[position])
                position += consumed
            if mark is not None:
                return mark, position
        return Mark.MORE, position

    def _structure(self, char: str) -> tuple[int, Mark | None]:
        """A character between strings and scalars: (characters consumed, mark)."""
        expect = self._expect
        if expect is _Expect.NEXT:
            if char == ",":
                self._expect = _Expect.KEY if self._open[-1] == "}" else _Expect.VALUE
                return 1, None
            return self._close(char)
        if expect is _Expect.COLON and char == ":":
            self._expect = _Expect.VALUE
            return 1, None
        if expect is _Expect.OBJECT and char == "{":
            self._open.append("}")
            self._expect = _Expect.FIRST_KEY
            return 1, None
        if expect is _Expect.FIRST_KEY or expect is _Expect.KEY:
            if char == '"':
                self._begin_string(is_key=True)
                return 1, None
            return self._close(char) if expect is _Expect.FIRST_KEY else (0, Mark.BROKEN)
        if expect is _Expect.FIRST_VALUE and char == "]":
            return self._close(char)
        if expect is _Expect.VALUE or expect is _Expect.FIRST_VALUE:
            return self._begin_value(char)
        return 0, Mark.BROKEN

    def _begin_value(self, char: str) -> tuple[int, Mark | None]:
        if char not in '"{[-0123456789tfn' or (char in "{[" and len(self._open) >= MAX_DEPTH):
            return 0, Mark.BROKEN
        if len(self._open) == 1 and not self._announced:
            self._announced, self.string = True, None
            return 0, Mark.VALUE_START
        if char == '"':
            self._begin_string(is_key=False)
            return 1, None
        if char in "{[":
            self._open.append("}" if char == "{" else "]")
            self._expect = _Expect.FIRST_KEY if char == "{" else _Expect.FIRST_VALUE
            return 1, None
        self._expect = _Expect.SCALAR
        self._parts.clear()
        return 0, None

    def _close(self, char: str) -> tuple[int, Mark | None]:
        if char != self._open[-1]:
            return 0, Mark.BROKEN
        self._open.pop()
        if not self._open:
            self._expect = _Expect.END
            return 1, Mark.DONE
        return 1, self._value_ended()

    def _value_ended(self) -> Mark | None:
        self._expect = _Expect.NEXT
        if len(self._open) > 1:
            return None
        self._announced = False
        return Mark.VALUE_END

    def _begin_string(self, is_key: bool) -> None:
        self._string_is_key = is_key
        self._expect = _Expect.STRING
        self._parts.clear()

    def _in_string(self, text: str, position: int) -> tuple[int, Mark | None]:
        end = _run_end(_STRING_RUN, text, position)
        if len(self._open) == 1 and end > position:
            self._parts.append(text[position:end])
        if end == len(text):
            return end, None
        if text[end] == '"':
            return end + 1, self._end_string()
        if text[end] != "\\":
            return end, Mark.BROKEN
        self._keep("\\")
        self._expect = _Expect.ESCAPE
        return end + 1, None

    def _in_escape(self, char: str) -> Mark | None:
        if self._expect is _Expect.ESCAPE:
            if char not in '"\\/bfnrtu':
                return Mark.BROKEN
            self._hex_left = 4 if char == "u" else 0
        elif char in _HEX:
            self._hex_left -= 1
        else:
            return Mark.BROKEN
        self._keep(char)
        self._expect = _Expect.HEX if self._hex_left else _Expect.STRING
        return None

    def _keep(self, char: str) -> None:
        if len(self._open) == 1:
            self._parts.append(char)

    def _end_string(self) -> Mark | None:
        if len(self._open) == 1:
            value: str = json.loads('"' + "".join(self._parts) + '"')
            if self._string_is_key:
                self.key = value
            else:
                self.string = value
        if self._string_is_key:
            self._expect = _Expect.COLON
            return None
        return self._value_ended()

    def _in_scalar(self, text: str, position: int) -> tuple[int, Mark | None]:
        end = _run_end(_SCALAR_RUN, text, position)
        self._parts.append(text[position:end])
        if end == len(text):
            return end, None
        scalar = "".join(self._parts)
        self._parts.clear()
        if _SCALAR.fullmatch(scalar) is None:
            return end, Mark.BROKEN
        return end, self._value_ended()


def _run_end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    assert match is not None  # every run may be empty
    return match.end()
