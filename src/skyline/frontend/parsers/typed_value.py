"""Values written as plain text, as JSON of the type that a function's JSON schema asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from skyline.frontend.parsers.json_scan import Mark, ObjectScanner
from skyline.frontend.parsers.markers import WHITESPACE

ONLY_STRING = frozenset(["string"])

_MAX_SCHEMAS = 64  # looked at for one parameter; a schema may refer to itself
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}  # templates write them so, and models copy them
_KINDS = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}


def parameter_types(parameters: object, name: str) -> frozenset[str] | None:
    """The JSON types that a function's `parameters` schema allows for one of them; None if it does not say."""
    if not isinstance(parameters, Mapping):
        return None
    properties = parameters.get("properties")
    schema = properties.get(name) if isinstance(properties, Mapping) else None
    if schema is None:
        schema = parameters.get("additionalProperties")
    found: set[str] = set()
    pending: list[object] = [schema]
    for _ in range(_MAX_SCHEMAS):
        if not pending:
            return frozenset(found)
        types = _types(pending.pop(), parameters, pending)
        if types is None:
            return None
        found |= types
    return None


def as_json(text: str, types: frozenset[str] | None) -> str:
    """The JSON text of a value: `text` itself where that is JSON of one of the types, else a string."""
    written = text.strip(WHITESPACE)
    if types is not None and "string" not in types:
        written = _PYTHON_WORDS.get(written, written)
    kind = _kind(written)
    fits = kind is not None
    if types is not None and "string" in types:
        # What else a string may look like counts only if that, too, is allowed; and quotes are part of the string.
        fits = kind != "string" and (kind in types or (kind == "integer" and "number" in types))
    return written if fits else json.dumps(text, ensure_ascii=False)


def _types(schema: object, root: Mapping[str, Any], pending: list[object]) -> set[str] | None:
    """The types that the schema itself names, while those of the schemas that it offers instead become pending."""
    if not isinstance(schema, Mapping):
        return None
    declared = schema.get("type")
    if isinstance(declared, str):
        return {declared}
    if isinstance(declared, list):
        return {name for name in declared if isinstance(name, str)} or None
    if "$ref" in schema:
        pending.append(_referred(schema["$ref"], root))
        return set()
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list) and schema[key]:
            pending += schema[key]
            return set()
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
    return set(map(_kind_of_value, values)) or None


def _referred(reference: object, root: Mapping[str, Any]) -> object:
    """What a reference within the schema points to: https://datatracker.ietf.org/doc/html/rfc6901"""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found: object = root
    for part in reference[2:].split("/"):
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def _kind_of_value(value: object) -> str:
    if isinstance(value, str):
        return "string"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return "null" if value is None else "array" if isinstance(value, list) else "object"


def _kind(text: str) -> str | None:
    """The type of a JSON text; None if it is none."""
    scanner = ObjectScanner()
    member = f'{{"":{text}}}'
    starts = position = 0
    mark = Mark.MORE
    while mark is not Mark.DONE:
        mark, position = scanner.scan(member, position)
        starts += mark is Mark.VALUE_START
        if mark in (Mark.MORE, Mark.BROKEN):
            return None
    if starts != 1 or position != len(member):
        return None
    return _KINDS.get(text[0]) or ("number" if set(text) & set(".eE") else "integer")
