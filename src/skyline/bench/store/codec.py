"""Records as the text and bytes that are stored."""

from __future__ import annotations

import datetime
import json
import math
import zlib
from typing import Any, TypeVar

import pydantic

from skyline.bench.results import Record
from skyline.bench.store.errors import StoreError

R = TypeVar("R", bound=Record)


def encode(record: Record, without: set[str] | None = None) -> str:
    """JSON. Raises StoreError if a number in it is NaN or infinite, which JSON cannot hold and null would hide.

    Half a surrogate pair, as broken output of an engine may leave it, becomes "?": neither JSON nor databases hold it.
    """
    data = record.model_dump(mode="json", exclude=without)
    try:
        text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        place = ".".join(_not_finite(data))
        raise StoreError(
            f"a {type(record).__name__} was not saved: its {place} is not a finite number; leave out what is unknown"
        ) from None
    return text.encode("utf-8", "replace").decode("utf-8")


def decode(kind: type[R], text: str | bytes) -> R:
    try:
        return kind.model_validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise StoreError(
            f"a stored {kind.__name__} cannot be read ({place}: {first['msg']}): the store is damaged, or something"
            " other than Skyline wrote to it"
        ) from None


def pack(record: Record | None) -> bytes | None:
    return None if record is None else zlib.compress(encode(record).encode("utf-8"), 6)


def unpack(kind: type[R], data: bytes | None) -> R | None:
    if data is None:
        return None
    try:
        text = zlib.decompress(data)
    except zlib.error as error:
        raise StoreError(f"a stored {kind.__name__} cannot be read ({error}): the store is damaged") from None
    return decode(kind, text)


def micros(when: datetime.datetime) -> int:
    """Microseconds since 1970. A time without a zone is taken as UTC."""
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.UTC)
    return (when - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(microseconds=1)


def name(text: str) -> str:
    """As it stands in a column: PostgreSQL's text holds no NUL, and neither database half a surrogate pair."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _not_finite(data: Any) -> list[str]:
    """The way to the first number that is NaN or infinite; empty if there is none."""
    if isinstance(data, float) and not math.isfinite(data):
        return [repr(data)]
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        if way := _not_finite(value):
            return [str(key), *way]
    return []
