"""Tool calls that the request demands: a grammar makes the model write them as JSON, whatever its own format is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from skyline.engine.sampling_params import GrammarSpec
from skyline.frontend.parsers import Event, ToolCallArguments, ToolCallStart
from skyline.server.messages import FunctionSpec, NamedTool, Tool

MAX_FORCED_CALLS = 32  # without a bound, a model may go on calling until its context is full


def forced_grammar(tools: Sequence[Tool], choice: NamedTool | str, parallel: bool) -> GrammarSpec:
    """The named function's arguments; or, for "required", a list of {"name", "parameters"}."""
    if isinstance(choice, NamedTool):
        named = next(tool.function for tool in tools if tool.function.name == choice.function.name)
        return GrammarSpec("json_schema", json.dumps(_parameters(named), ensure_ascii=False))
    definitions: dict[str, Any] = {}
    calls = [_call_schema(number, tool.function, definitions) for number, tool in enumerate(tools)]
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_FORCED_CALLS if parallel else 1,
        "items": {"anyOf": calls},
    }
    if definitions:
        schema["$defs"] = definitions
    return GrammarSpec("json_schema", json.dumps(schema, ensure_ascii=False))


def _parameters(function: FunctionSpec) -> dict[str, Any]:
    return {"type": "object", **(function.parameters or {})}


def _call_schema(number: int, function: FunctionSpec, definitions: dict[str, Any]) -> dict[str, Any]:
    parameters = _parameters(function)
    # References are resolved from the root of the whole schema, so definitions move there, under names of their own.
    for key in ("$defs", "definitions"):
        for name, definition in (parameters.pop(key, None) or {}).items():
            definitions[f"{number}.{name}"] = _renamed(definition, number)
    return {
        "type": "object",
        "properties": {"name": {"enum": [function.name]}, "parameters": _renamed(parameters, number)},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _renamed(value: Any, number: int) -> Any:
    """The depth of `value` was bounded when the request was validated."""
    if isinstance(value, list):
        return [_renamed(item, number) for item in value]
    if not isinstance(value, dict):
        return value
    copy = {key: _renamed(item, number) for key, item in value.items()}
    reference = copy.get("$ref")
    if isinstance(reference, str):
        for prefix in ("#/$defs/", "#/definitions/"):
            if reference.startswith(prefix):
                copy["$ref"] = f"#/$defs/{number}.{reference.removeprefix(prefix)}"
    return copy


class NamedCallParser:
    """The whole text is the arguments of one call."""

    def __init__(self, name: str, new_call_id: Callable[[], str]) -> None:
        self._name = name
        self._new_call_id = new_call_id
        self._begun = False

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        if text and not self._begun:
            self._begun = True
            events.append(ToolCallStart(0, self._new_call_id(), self._name))
        if text:
            events.append(ToolCallArguments(0, text))
        return events

    def finish(self) -> list[Event]:
        return []


class CallListParser:
    """The text is the list that `forced_grammar` asks for. A call is reported when its object is complete."""

    def __init__(self, new_call_id: Callable[[], str]) -> None:
        self._new_call_id = new_call_id
        self._object: list[str] = []
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._count = 0

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        for char in text:
            if self._depth or char == "{":
                self._object.append(char)
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char == "{":
                self._depth += 1
            elif char == "}" and self._depth:
                self._depth -= 1
                if not self._depth:
                    events += self._call("".join(self._object))
                    self._object.clear()
        return events

    def finish(self) -> list[Event]:
        return []  # a call that was cut off is none

    def _call(self, text: str) -> list[Event]:
        try:
            call = json.loads(text)
            name, arguments = str(call["name"]), json.dumps(call["parameters"], ensure_ascii=False)
        except (ValueError, KeyError, TypeError, RecursionError):
            return []
        index = self._count
        self._count += 1
        return [ToolCallStart(index, self._new_call_id(), name), ToolCallArguments(index, arguments)]
