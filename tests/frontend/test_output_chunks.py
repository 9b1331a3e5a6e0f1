from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skyline.frontend.parsers import (
    ContentDelta,
    OutputParser,
    ParsedMessage,
    ToolCallArguments,
    ToolCallInvalid,
    ToolCallStart,
)
from tests.frontend.parsing import FORMATS, HERMES, LLAMA, QWEN, R1, call, cut, run, whole

FRAGMENTS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", "<tool_call", "</tool_", "<", "<t",
    '{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "parameters": {"s": "</tool_call><tool_call>"}}',
    '{"arguments": {"x": [{}, [1, {"y": "}{"}]]}, "name": "late"}', '{"name": "g"}', '{"name": "", "arguments": {}}',
    '{"name": "q", "arguments": {"t": "\\"\\\\ \\u00e9 \\ud83d\\ude00"}}', '{"name": "n", "arguments": [1]}',
    '{"name": "\\ud800", "arguments": {}}', '{"n\\u0061me": "\\u0066", "arguments": {"a": -1.5e+3}}',
    '{"name": "b", "arguments": {"a": 01}}', '{"name": "b", "arguments": {"a": tru}}', '{"name": "b", "arguments": {"',
    '{"name": "unknown", "arguments": {}}', '{"name": "f", "arguments": {"a": 1}, "name": "g", "arguments": {}}',
    '{"name": "f", "arguments": {"a": "x\ny"}}', '{"answer": 42}', '"name"', ":", ",", "{", "}", "[", "]", '"', "\\",
    ";", " ", "\n", "\n\n", "\t", "\xa0", "text", "你好", "é", "1", "null",
]  # fmt: skip

texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=14).map("".join)


@given(text=texts, formats=st.sampled_from(FORMATS), places=st.lists(st.integers(0, 10_000), max_size=10))
@settings(max_examples=400, deadline=None)
def test_any_chunks_give_the_events_of_the_whole(text, formats, places):
    allowed = {"f", "g", "late", "q", "b", "n"}
    expected = run([text], *formats, allowed=allowed)
    assert run(cut(text, places), *formats, allowed=allowed) == expected
    assert run(text, *formats, allowed=allowed) == expected


@given(text=texts, formats=st.sampled_from(FORMATS))
@settings(max_examples=400, deadline=None)
@example(text='<tool_call>{"name": "f", "arguments": {"a": 1]', formats=(None, HERMES))
def test_calls_are_valid_and_nothing_is_lost(text, formats):
    message = whole(text, *formats)
    for made in message.tool_calls:
        assert made.name
        assert isinstance(json.loads(made.arguments), dict)
        assert made.arguments in text or made.arguments == "{}"
    events = run([text], *formats)
    announced = [event.index for event in events if isinstance(event, ToolCallStart)]
    assert announced == list(range(len(announced)))

    # What is missing in the parts can only be markers, the frame around calls, and white space.
    kept = "".join(filter(None, [message.reasoning, message.content]))
    if not message.tool_calls:
        without = text
        for marker in ("<think>", "</think>"):
            kept, without = kept.replace(marker, ""), without.replace(marker, "")
        assert "".join(kept.split()) == "".join(without.split())


@given(text=texts)
@settings(max_examples=200, deadline=None)
def test_without_formats_the_text_is_the_content(text):
    assert whole(text, None, None) == ParsedMessage(text or None, None, [])


@given(
    arguments=st.dictionaries(
        st.text(max_size=4),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=3,
    ),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 2]),
    name_first=st.booleans(),
    formats=st.sampled_from([(None, HERMES), (QWEN, HERMES), (None, LLAMA)]),
)
@settings(max_examples=150, deadline=None)
def test_arguments_are_the_json_that_was_written(arguments, ascii_only, indent, name_first, formats):
    written = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
    members = ['"name": "tool"', f'"parameters": {written}']
    text = "{" + ", ".join(members if name_first else members[::-1]) + "}"
    if formats[1] is HERMES:
        text = f"<tool_call>\n{text}\n</tool_call>"
    assert whole(text, *formats) == ParsedMessage(None, None, [call("tool", written)])


# --- hostile text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [HERMES, LLAMA])
@pytest.mark.parametrize(
    "unit",
    ["<tool_call", "<tool_call>", "<|python_tag|>", "<|python_tag|>{", "<", " ", "[", "a ", '<tool_call>{"name":"f"}'],
)
@pytest.mark.parametrize("prefix", ["", '<tool_call>{"name":"f","arguments":{"a":"', "</think>", "{"])
def test_work_grows_with_the_text(monkeypatch, unit, prefix, tools):
    """Counts the characters handed to the steps of the parser, which is what a quadratic parser repeats."""
    work = 0

    def counted(method: str):
        original = getattr(OutputParser, method)

        def wrapper(self, text, position):
            nonlocal work
            used = original(self, text, position)
            work += 1 + used - position + min(len(text) - used, len(tools.start))
            return used

        return wrapper

    for name in ("_before_reasoning", "_in_reasoning", "_message_start", "_in_content", "_in_call", "_after_call"):
        monkeypatch.setattr(OutputParser, name, counted(name))
    text = prefix + unit * (20_000 // len(unit))
    for size in (7, len(text)):
        work = 0
        parser = OutputParser(R1 if prefix == "</think>" else None, tools, new_call_id=lambda: "id")
        events = [event for at in range(0, len(text), size) for event in parser.push(text[at : at + size])]
        held = len(parser._rest)
        events += parser.finish()
        assert held < len(tools.start)
        assert work < 8 * len(text)
        released = sum(len(event.text) for event in events if isinstance(event, ContentDelta | ToolCallArguments))
        assert released <= 3 * len(text)


def test_deep_nesting_is_content():
    text = '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 10_000
    events = run([text], None, HERMES)
    assert ToolCallInvalid(0) in events
    assert events[-1] == ContentDelta(text)


def test_long_hostile_text_passes():
    """Seconds at most; a quadratic parser would take hours."""
    units = ("<tool_call", "<tool_call>{", " ", '{"name":"f","parameters":{"a":"')
    for unit, tools in itertools.product(units, (HERMES, LLAMA)):
        text = unit * (250_000 // len(unit))
        assert run((text[at : at + 4096] for at in range(0, len(text), 4096)), None, tools)
