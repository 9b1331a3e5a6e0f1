"""Streamed text of one sequence: what is certain goes out, what may still change or be cut off waits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from skyline.frontend.token_text import token_text


class _Tokenizer(Protocol):
    @property
    def backend(self) -> Any: ...


class IncrementalDetokenizer:
    """Turns generated token ids into text, in any number of pieces, and stops at the first stop string.

    All text released equals `decode(prompt + output)` without the beginning it shares with `decode(prompt)`, cut at the
    stop string, however the tokens were grouped into pushes. `tokenizer.backend` is a `tokenizers.Tokenizer`.

    The stop string that counts is the one completed first, the longest of those completed by the same character. It
    counts only if the token that completes it is at least the `min_tokens`-th. Text that may be the beginning of a stop
    string is held back. Empty stop strings raise ValueError.
    """

    def __init__(
        self,
        tokenizer: _Tokenizer,
        prompt_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self.num_tokens = 0  # tokens taken in; those after the one that completed the stop string do not count
        self._source = token_text(tokenizer.backend, prompt_ids, skip_special_tokens)
        self._stops = StopStrings(stop) if stop else None
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._released: list[str] = []

    @property
    def stop_reason(self) -> str | None:
        """The stop string that was found; from then on push and finish return ""."""
        return self._stops.found if self._stops is not None else None

    @property
    def text(self) -> str:
        """Everything released so far."""
        if len(self._released) > 1:
            self._released = ["".join(self._released)]
        return self._released[0] if self._released else ""

    @property
    def token_offsets(self) -> list[int]:
        """For each token taken in, the offset in the full text (in characters) at which its text begins.

        Tokens that make one character together share its offset. An offset is final once text at or beyond it has
        been released. The list is the live one: do not change it.
        """
        return self._source.offsets

    def push(self, token_ids: Sequence[int]) -> str:
        """Take in the next tokens and return the text that is now certain."""
        push = self._source.push
        stops = self._stops
        if stops is None:
            self.num_tokens += len(token_ids)
            text = "".join([push(token_id) for token_id in token_ids])
        else:
            parts = []
            for token_id in token_ids:
                if stops.found is not None:
                    break
                self.num_tokens += 1
                parts.append(self._search(stops, push(token_id)))
            text = "".join(parts)
        if text:
            self._released.append(text)
        return text

    def finish(self) -> str:
        """The sequence has ended: return the text that was held back, with U+FFFD for an unfinished character."""
        stops = self._stops
        if stops is not None and stops.found is not None:
            return ""
        text = self._source.flush()
        if stops is not None:
            text = self._search(stops, text) + stops.flush()
        if text:
            self._released.append(text)
        return text

    def _search(self, stops: StopStrings, text: str) -> str:
        if not text:
            return ""
        text = stops.push(text, armed=self.num_tokens >= self._min_tokens)
        if self._include_stop and stops.found is not None:
            text += stops.found
        return text


class StopStrings:
    """Finds the first of several strings in a stream, holding back as little as possible.

    For each string it remembers the earliest place where an occurrence may have begun. A place is given up once and for
    all at the first character that differs, so the work grows with the text and not with what is held.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("stop strings must not be empty")
        self.found: str | None = None
        self._stops = list(dict.fromkeys(stops))
        self._first_chars = re.compile("|".join(re.escape(stop[0]) for stop in self._stops))
        self._held = ""
        self._candidates = [0] * len(self._stops)  # positions in _held

    def push(self, text: str, armed: bool = True) -> str:
        """Return the text that no stop string can cut any more. If one is in it, set `found` and drop the rest.

        An occurrence that is complete while `armed` is false never counts. Do not push after one was found.
        """
        if not self._held and self._first_chars.search(text) is None:
            return text
        text = self._held + text
        found: tuple[int, int, str] | None = None
        keep = len(text)
        for index, stop in enumerate(self._stops):
            begin = self._begin(text, stop, self._candidates[index], armed)
            self._candidates[index] = begin
            end = begin + len(stop)
            if end <= len(text) and (found is None or (end, begin) < found[:2]):
                found = (end, begin, stop)
            keep = min(keep, begin)
        if found is not None:
            self._held = ""
            self.found = found[2]
            return text[: found[1]]
        self._held = text[keep:]
        self._candidates = [begin - keep for begin in self._candidates]
        return text[:keep]

    def flush(self) -> str:
        """The text ends here: return what was held back."""
        text, self._held = self._held, ""
        self._candidates = [0] * len(self._stops)
        return text

    @staticmethod
    def _begin(text: str, stop: str, begin: int, armed: bool) -> int:
        """Where the first occurrence that is complete or still possible begins; len(text) if there is none."""
        while (begin := text.find(stop[0], begin)) >= 0:
            rest = len(text) - begin
            if rest >= len(stop):
                if armed and text.startswith(stop, begin):
                    return begin
            elif stop.startswith(text[begin:]):
                return begin
            begin += 1
        return len(text)
