"""Reading other tools' JSON, whose shape is theirs to change: every look says what it wanted and where."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ResultFileError(ValueError):
    """The file cannot be imported; the message says what is wrong with it, or what to say besides."""


class Fields:
    """An object of a result file. `where` is its place in the file, for messages.

    `number` and the like raise ResultFileError where the field is missing or is something else; `maybe_...` give None
    where it is missing, null, NaN or infinite.
    """

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, Mapping):
            raise ResultFileError(f"{where} should be an object, and is {_what(data)}")
        self.data = data
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.data.get(key) is not None

    def maybe_number(self, key: str) -> float | None:
        value = self.data.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ResultFileError(f"{self.where}: {key} should be a number, and is {_what(value)}")
        return float(value) if math.isfinite(value) else None

    def number(self, key: str) -> float:
        return self._required(key, self.maybe_number(key))

    def maybe_whole(self, key: str) -> int | None:
        value = self.maybe_number(key)
        return None if value is None else round(value)

    def whole(self, key: str) -> int:
        return self._required(key, self.maybe_whole(key))

    def maybe_text(self, key: str) -> str | None:
        value = self.data.get(key)
        if value is not None and not isinstance(value, str):
            raise ResultFileError(f"{self.where}: {key} should be text, and is {_what(value)}")
        return value or None

    def text(self, key: str) -> str:
        return self._required(key, self.maybe_text(key))

    def flag(self, key: str) -> bool:
        """True for true and "true": InferenceX writes both."""
        return str(self.data.get(key)).lower() == "true"

    def maybe_part(self, key: str) -> Fields | None:
        value = self.data.get(key)
        return None if value is None else Fields(value, f"{self.where}: {key}")

    def part(self, key: str) -> Fields:
        return self._required(key, self.maybe_part(key))

    def parts(self, key: str) -> Iterator[Fields]:
        """The objects of a list."""
        for index, value in enumerate(self.column(key)):
            yield Fields(value, f"{self.where}: {key}[{index}]")

    def column(self, key: str) -> list[Any]:
        """A list, empty where it is missing."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, list):
            raise ResultFileError(f"{self.where}: {key} should be a list, and is {_what(value)}")
        return value or []

    def numbers(self, key: str) -> list[float]:
        """A list of finite numbers, empty where it is missing."""
        return self._finite(key, self.column(key))

    def rows(self, key: str) -> list[list[float]]:
        """A list of lists of finite numbers, empty where it is missing."""
        rows = self.column(key)
        for index, row in enumerate(rows):
            if not isinstance(row, list):
                raise ResultFileError(f"{self.where}: {key}[{index}] should be a list, and is {_what(row)}")
        return [self._finite(f"{key}[{index}]", row) for index, row in enumerate(rows)]

    def _finite(self, key: str, values: list[Any]) -> list[float]:
        for index, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ResultFileError(f"{self.where}: {key}[{index}] should be a number, and is {_what(value)}")
        return [float(value) for value in values]

    def _required(self, key: str, value: T | None) -> T:
        if value is None:
            raise ResultFileError(f"{self.where}: {key} is missing")
        return value


def at(unix_seconds: float) -> datetime.datetime:
    try:
        return datetime.datetime.fromtimestamp(unix_seconds, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        raise ResultFileError(f"{unix_seconds:g} is no time in seconds since 1970") from None


def read_time(text: str, form: str | None = None) -> datetime.datetime:
    """ISO 8601, or as `form` says. A time without a zone is the local time of a machine that is not known: it is taken
    as UTC."""
    try:
        when = datetime.datetime.fromisoformat(text) if form is None else datetime.datetime.strptime(text, form)
    except ValueError:
        raise ResultFileError(f"{text!r} is no time") from None
    return when if when.tzinfo else when.replace(tzinfo=datetime.UTC)


def _what(value: Any) -> str:
    names = {type(None): "null", bool: "a truth value", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), repr(value))
