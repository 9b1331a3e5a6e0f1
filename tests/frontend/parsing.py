from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skyline.frontend.parsers import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    ContentDelta,
    Event,
    ParsedMessage,
    ReasoningDelta,
    ReasoningFormat,
    ToolCall,
    ToolCallArguments,
    ToolFormat,
    make_parser,
    parse_whole,
)

QWEN, R1 = REASONING_FORMATS["qwen3"], REASONING_FORMATS["deepseek_r1"]
HERMES, LLAMA = TOOL_FORMATS["hermes"], TOOL_FORMATS["llama3_json"]

Calls = Sequence[tuple[str, Mapping[str, Any]]]


def numbered_ids():
    return map("call_{}".format, itertools.count()).__next__


def run(parts: Iterable[str], *formats, allowed=None, schemas=None) -> list[Event]:
    """All events, with neighbours of the same kind joined."""
    parser = make_parser(*formats, allowed_tools=allowed, schemas=schemas, new_call_id=numbered_ids())
    joined: list[Event] = []
    for event in [event for part in parts for event in parser.push(part)] + parser.finish():
        last = joined[-1] if joined else None
        if isinstance(event, ContentDelta | ReasoningDelta) and type(last) is type(event):
            joined[-1] = type(event)(last.text + event.text)
        elif isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments):
            assert last.index == event.index
            joined[-1] = ToolCallArguments(event.index, last.text + event.text)
        else:
            joined.append(event)
    assert parser.finish() == []
    return joined


def whole(text: str, *formats, allowed=None, schemas=None) -> ParsedMessage:
    return parse_whole(text, *formats, allowed_tools=allowed, schemas=schemas, new_call_id=numbered_ids())


def cut(text: str, places: Sequence[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


def call(name: str, arguments: str, number: int = 0) -> ToolCall:
    return ToolCall(f"call_{number}", name, arguments)


# --- what models write, as their chat templates do -------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """`calls` writes tool calls as this family does; `text` a whole output with reasoning, content and calls."""

    reasoning: ReasoningFormat
    tools: ToolFormat
    calls: Callable[[Calls], str]
    text: Callable[[str, str, Calls], str]

    @property
    def formats(self) -> tuple[ReasoningFormat, ToolFormat]:
        return self.reasoning, self.tools


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else _json(value)


def _hermes(calls: Calls) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {_json(values)}}}\n</tool_call>' for name, values in calls
    )


def _qwen3_coder(calls: Calls) -> str:
    def one(name: str, values: Mapping[str, Any]) -> str:
        parameters = "".join(f"<parameter={key}>\n{_plain(value)}\n</parameter>\n" for key, value in values.items())
        return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"

    return "\n".join(one(*made) for made in calls)


def _glm45(calls: Calls) -> str:
    def one(name: str, values: Mapping[str, Any]) -> str:
        pairs = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{_plain(value)}</arg_value>\n" for key, value in values.items()
        )
        return f"<tool_call>{name}\n{pairs}</tool_call>"

    return "\n".join(one(*made) for made in calls)


def _minimax_m2(calls: Calls) -> str:
    def one(name: str, values: Mapping[str, Any]) -> str:
        parameters = "".join(f'<parameter name="{key}">{_plain(value)}</parameter>\n' for key, value in values.items())
        return f'<invoke name="{name}">\n{parameters}</invoke>\n'

    return f"<minimax:tool_call>\n{''.join(one(*made) for made in calls)}</minimax:tool_call>"


def _deepseek_v32(calls: Calls) -> str:
    def one(name: str, values: Mapping[str, Any]) -> str:
        parameters = "".join(
            f'<｜DSML｜parameter name="{key}" string="{_json(isinstance(value, str))}">{_plain(value)}'
            "</｜DSML｜parameter>\n"
            for key, value in values.items()
        )
        return f'<｜DSML｜invoke name="{name}">\n{parameters}</｜DSML｜invoke>\n'

    return f"<｜DSML｜function_calls>\n{''.join(one(*made) for made in calls)}</｜DSML｜function_calls>"


def _deepseek_v31(calls: Calls) -> str:
    made = "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{_json(values)}<｜tool▁call▁end｜>" for name, values in calls
    )
    return f"<｜tool▁calls▁begin｜>{made}<｜tool▁calls▁end｜>"


def _deepseek_v3(calls: Calls) -> str:
    made = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{_json(values)}\n```<｜tool▁call▁end｜>"
        for name, values in calls
    )
    return f"<｜tool▁calls▁begin｜>{made}<｜tool▁calls▁end｜>"


def _mistral(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{_json(values)}" for name, values in calls)


def _mistral_v3(calls: Calls) -> str:
    made = [{"name": name, "arguments": dict(values), "id": "abcdefghi"} for name, values in calls]
    return f"[TOOL_CALLS] {_json(made)}"


def _harmony(calls: Calls) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{_json(values)}<|call|>"
        for name, values in calls
    )


def _harmony_text(reasoning: str, content: str, calls: Calls) -> str:
    parts = [f"<|channel|>analysis<|message|>{reasoning}<|end|>"] if reasoning else []
    parts += [f"<|channel|>commentary<|message|>{content}<|end|>"] if content else []
    return "<|start|>assistant".join([*parts, *([_harmony(calls)] if calls else [])])


def _family(reasoning: str, tools: str, calls: Callable[[Calls], str]) -> Family:
    format = REASONING_FORMATS[reasoning]

    def text(thought: str, content: str, made: Calls) -> str:
        start = "" if format.starts_inside else format.start
        before = f"{start}\n{thought}\n{format.end}\n\n" if thought or format.starts_inside else ""
        return before + (f"{content}\n" if content and made else content) + (calls(made) if made else "")

    return Family(format, TOOL_FORMATS[tools], calls, text)


FAMILIES = [
    _family("qwen3", "hermes", _hermes),
    _family("deepseek_r1", "qwen3_coder", _qwen3_coder),
    _family("qwen3", "glm45", _glm45),
    _family("minimax_m2", "minimax_m2", _minimax_m2),
    _family("qwen3", "deepseek_v32", _deepseek_v32),
    _family("qwen3", "deepseek_v31", _deepseek_v31),
    _family("deepseek_r1", "deepseek_v3", _deepseek_v3),
    _family("mistral", "mistral", _mistral),
    _family("mistral", "mistral_v3", _mistral_v3),
    Family(REASONING_FORMATS["gpt_oss"], TOOL_FORMATS["gpt_oss"], _harmony, _harmony_text),
]
