"""Finding markers in a text that arrives in pieces."""

from __future__ import annotations

import re

WHITESPACE = " \t\n\r"

_SPACE_RUN = re.compile(r"[ \t\n\r]*")


class Markers:
    """Several markers to look for at once. None of them may be empty or begin with another."""

    def __init__(self, *markers: str) -> None:
        self._markers = tuple(dict.fromkeys(markers))
        self._pattern = re.compile("|".join(map(re.escape, self._markers))) if markers else None
        self._first_chars = re.compile("|".join({re.escape(marker[0]) for marker in markers})) if markers else None
        self._longest = max(map(len, markers), default=0)

    def find(self, text: str, position: int) -> tuple[int, str | None]:
        """(where the first marker begins, the marker), or (up to where there is certainly none, None)."""
        if self._pattern is None or self._first_chars is None:
            return len(text), None
        if found := self._pattern.search(text, position):
            return found.start(), found[0]
        begin = max(position, len(text) - self._longest + 1)
        while candidate := self._first_chars.search(text, begin):
            begin = candidate.start()
            if any(marker.startswith(text[begin:]) for marker in self._markers):
                return begin, None
            begin += 1
        return len(text), None


def matches(text: str, position: int, marker: str) -> bool | None:
    """Whether the marker stands at `position`; None if the text ends before that is certain."""
    if text.startswith(marker, position):
        return True
    return None if marker.startswith(text[position : position + len(marker)]) else False


def skip_space(text: str, position: int) -> int:
    """The first position from `position` on that is not white space."""
    match = _SPACE_RUN.match(text, position)
    assert match is not None  # the run may be empty
    return match.end()
