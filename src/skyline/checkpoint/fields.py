"""Reading JSON files that somebody else wrote: bounded in size, every value checked, every error names its key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skyline.checkpoint.errors import CheckpointError

MAX_JSON_BYTES = 10 * 1024 * 1024


def read_json_object(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object in `path`; CheckpointError if it is missing, above `limit` bytes or not a JSON object."""
    data = read_bytes(path, limit)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download or export the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, but holds a {type(value).__name__}")
    return value


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a file of at most `limit` bytes, or raise CheckpointError."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; the folder must hold a complete checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > limit:
        raise CheckpointError(f"{path} is larger than {limit // 1024**2} MiB, so it is not a file of that kind")
    return data


class Fields:
    """Typed access to a JSON object. JSON null counts as absent. `where` names the object in error messages."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def error(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} {problem}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer from `low` to `high`; without a default the key is required."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"must be an integer from {low} to {high}, not {_shown(value)}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number from `low` to `high`; without a default the key is required."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        valid = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not valid or not math.isfinite(value) or not low <= value <= high:
            raise self.error(key, f"must be a number from {low:g} to {high:g}, not {_shown(value)}")
        return float(value)

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        return self.number(key, low, high) if key in self else None

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        return self.integer(key, low, high) if key in self else None

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {_shown(value)}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; without a default the key is required."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, not {_shown(value)}")
        return value

    def optional_object(self, key: str) -> dict[str, Any] | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, f"must be an object, not {_shown(value)}")
        return value

    def token_ids(self, key: str) -> list[int]:
        """Token ids written as one integer, a list of them, or null. Some exporters write -1 for "none"."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or token >= 2**31:
                raise self.error(key, f"must be a token id or a list of them, not {_shown(value)}")
        return list(dict.fromkeys(token for token in ids if token >= 0))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
