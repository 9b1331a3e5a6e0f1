"""White space at the edges of a text that arrives in pieces."""

from __future__ import annotations

from skyline.frontend.parsers.markers import WHITESPACE


class SpacedText:
    """Lets text through, except white space that may prove to be at an edge: that waits for what follows.

    `skip_space` drops white space until the next other character.
    """

    def __init__(self, skip_space: bool) -> None:
        self.skip_space = skip_space
        self.begun = False  # anything was let through
        self._waiting: list[str] = []

    def push(self, text: str) -> str:
        if not text:
            return ""
        if self.skip_space:
            text = text.lstrip(WHITESPACE)
            self.skip_space = not text
        body = text.rstrip(WHITESPACE)
        if not body:
            self._waiting.append(text)
            return ""
        self.begun = True
        result = "".join(self._waiting) + body
        self._waiting = [text[len(body) :]]
        return result

    def take_waiting(self) -> str:
        """Give up the white space that waits."""
        text = "".join(self._waiting)
        self._waiting.clear()
        return text
