from __future__ import annotations

import re

import msgspec
import pytest

from skyline.frontend.parsers import (
    ContentDelta,
    JsonCall,
    ParsedMessage,
    ReasoningDelta,
    ReasoningFormat,
    ToolCallArguments,
    ToolCallInvalid,
    ToolCallStart,
    ToolFormat,
    make_parser,
    parse_whole,
)
from tests.frontend.parsing import HERMES, LLAMA, QWEN, R1, call, numbered_ids, run, whole

# --- reasoning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "format", "reasoning", "content"),
    [
        ("<think>\nhm, well\n</think>\n\nYes.\n", QWEN, "hm, well", "Yes.\n"),
        ("\n<think>a</think>b", QWEN, "a", "b"),
        ("<think>\n\n</think>\n\nYes.", QWEN, None, "Yes."),
        (" Yes <think> no", QWEN, None, " Yes <think> no"),
        ("<thi", QWEN, None, "<thi"),
        ("  ", QWEN, None, "  "),
        ("<think>never closed </thin", QWEN, "never closed </thin", None),
        ("<think>a</think>b</think>c", QWEN, "a", "b</think>c"),
        ("hm\n\n  indented\n</think>\nYes.", R1, "hm\n\n  indented", "Yes."),
        (" <think>\nhm</think>Yes.", R1, "hm", "Yes."),
        ("</think>Yes.", R1, None, "Yes."),
        ("hm", R1, "hm", None),
        (" <th", R1, "<th", None),
        ("", R1, None, None),
        ("a <tool_call> b</think> c", R1, "a <tool_call> b", "c"),
    ],
)
def test_reasoning(text, format, reasoning, content):
    for tools in (None, HERMES, LLAMA):
        assert whole(text, format, tools) == ParsedMessage(content, reasoning, [])


def test_reasoning_is_streamed():
    parser = make_parser(QWEN, None)
    assert parser.push("<think>\n") == []
    assert parser.push("one ") == [ReasoningDelta("one")]
    assert parser.push("two</th") == [ReasoningDelta(" two")]
    assert parser.push("ink>\n") == []
    assert parser.push("Yes") == [ContentDelta("Yes")]


# --- tool calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', None, [("f", '{"a": 1}')]),
        ('Let me see.\n\n<tool_call>{"name":"f","arguments":{}}</tool_call>\n', "Let me see.", [("f", "{}")]),
        (
            '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n'
            '{"name": "g", "arguments": {"b": 2}}\n</tool_call>',
            None,
            [("f", "{}"), ("g", '{"b": 2}')],
        ),
        ('A\n<tool_call>{"name":"f","arguments":{}}</tool_call>\nB\n', "A\nB\n", [("f", "{}")]),
        ('\n<tool_call>{"name":"f","arguments":{}}</tool_call>\nB', "B", [("f", "{}")]),
        # Models forget the end marker, or the arguments.
        ('<tool_call>{"name":"f","arguments":{}}', None, [("f", "{}")]),
        ('<tool_call>{"name":"f","arguments":{}}\n</tool_c', None, [("f", "{}")]),
        ('<tool_call>{"name":"f"}</tool_call>', None, [("f", "{}")]),
        (
            '<tool_call>{"name":"f","arguments":{}}<tool_call>{"name":"g","arguments":{}}</tool_call>',
            None,
            [("f", "{}"), ("g", "{}")],
        ),
        # Markers inside strings are text.
        (
            '<tool_call>{"name": "f", "arguments": {"a": "</tool_call> <tool_call>"}}</tool_call>',
            None,
            [("f", '{"a": "</tool_call> <tool_call>"}')],
        ),
        # Not a call: content, as it was written.
        ("<tool_call>", "<tool_call>", []),
        ("a <tool_call>\nnone\n</tool_call> b", "a <tool_call>\nnone\n</tool_call> b", []),
        ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
        ('<tool_call>{"name": 1, "arguments": {}}', '<tool_call>{"name": 1, "arguments": {}}', []),
        ('<tool_call>{"name": "f", "arg', '<tool_call>{"name": "f", "arg', []),
        ('<tool_call>{"name": "f", "arguments": {"a": ', '<tool_call>{"name": "f", "arguments": {"a": ', []),
        ('<tool_call>{"name": "f", "arguments": "{}"}', '<tool_call>{"name": "f", "arguments": "{}"}', []),
        ('<tool_call>["f"]</tool_call>', '<tool_call>["f"]</tool_call>', []),
        (
            '<tool_call>oops <tool_call>{"name": "f", "arguments": {}}</tool_call>',
            "<tool_call>oops",
            [("f", "{}")],
        ),
        ('{"name": "f", "parameters": {}}', '{"name": "f", "parameters": {}}', []),
    ],
)  # fmt: skip
def test_hermes(text, content, calls):
    expected = [call(name, arguments, number) for number, (name, arguments) in enumerate(calls)]
    assert whole(text, None, HERMES) == ParsedMessage(content, None, expected)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', None, [("f", '{"a": 1}')]),
        ('<|python_tag|>{"name": "f", "parameters": {}}', None, [("f", "{}")]),
        ('\n {"type": "function", "name": "f", "parameters": {}}\n', None, [("f", "{}")]),
        ('{"name":"f","parameters":{}}; {"name":"g","arguments":{}}', None, [("f", "{}"), ("g", "{}")]),
        ('{"name":"f","parameters":{}}\n{"name":"g","parameters":{}};', None, [("f", "{}"), ("g", "{}")]),
        (
            '<|python_tag|>{"name":"f","parameters":{}};<|python_tag|>{"name":"g","parameters":{}}',
            None,
            [("f", "{}"), ("g", "{}")],
        ),
        ('Well: <|python_tag|>{"name": "f", "parameters": {}}', "Well:", [("f", "{}")]),
        ('{"name":"f","parameters":{}}; then', "; then", [("f", "{}")]),
        ('{"name":"f","parameters":{}};; {"name":"g"}', ';; {"name":"g"}', [("f", "{}")]),
        ('{"name":"f","parameters":{}} <|py', "<|py", [("f", "{}")]),
        # A JSON answer, even one with a name, is not a call; nor is JSON within text.
        ('{"name": "Alice", "age": 30}', '{"name": "Alice", "age": 30}', []),
        ('Here: {"name": "f", "parameters": {}}', 'Here: {"name": "f", "parameters": {}}', []),
        ('{"a": 1} {"name": "f", "parameters": {}}', '{"a": 1} {"name": "f", "parameters": {}}', []),
        ('<|python_tag|>search.call(query="x")', '<|python_tag|>search.call(query="x")', []),
        ('{"name":"f","parameters":{}}; {"b": 1}', '; {"b": 1}', [("f", "{}")]),
    ],
)  # fmt: skip
def test_llama3_json(text, content, calls):
    expected = [call(name, arguments, number) for number, (name, arguments) in enumerate(calls)]
    assert whole(text, None, LLAMA) == ParsedMessage(content, None, expected)


def test_call_after_reasoning():
    text = '<think>\nI need the weather.\n</think>\n\n<tool_call>\n{"name": "w", "arguments": {}}\n</tool_call>'
    assert whole(text, QWEN, HERMES) == ParsedMessage(None, "I need the weather.", [call("w", "{}")])
    bare = 'hm</think>\n{"name": "w", "parameters": {}}'
    assert whole(bare, R1, LLAMA) == ParsedMessage(None, "hm", [call("w", "{}")])


def test_unknown_function_is_content():
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert whole(text, None, HERMES, allowed={"g"}) == ParsedMessage(text, None, [])
    assert whole(text, None, HERMES, allowed=set()) == ParsedMessage(text, None, [])
    assert whole(text, None, HERMES, allowed={"f"}).tool_calls == [call("f", "{}")]


def test_arguments_are_streamed_as_they_come():
    parser = make_parser(None, HERMES, new_call_id=numbered_ids())
    assert parser.push("Ok <tool_") == [ContentDelta("Ok")]
    assert parser.push('call>\n{"name": "f') == []
    assert parser.push('", "arguments": ') == []
    assert parser.push('{"a') == [ToolCallStart(0, "call_0", "f"), ToolCallArguments(0, '{"a')]
    assert parser.push('": 1') == [ToolCallArguments(0, '": 1')]
    assert parser.push("}}\n</tool_call>") == [ToolCallArguments(0, "}")]
    assert parser.finish() == []


def test_arguments_before_the_name_wait_for_it():
    parser = make_parser(None, HERMES, new_call_id=numbered_ids())
    assert parser.push('<tool_call>{"arguments": {"a": 1}, "name": "f') == []
    assert parser.push('"') == [ToolCallStart(0, "call_0", "f"), ToolCallArguments(0, '{"a": 1}')]


def test_call_that_breaks_after_it_was_announced():
    broken, good = '<tool_call>{"name": "f", "arguments": {"a": 1]', '}\n<tool_call>{"name": "g", "arguments": {}}'
    assert run([broken + good], None, HERMES) == [
        ToolCallStart(0, "call_0", "f"),
        ToolCallArguments(0, '{"a": 1'),
        ToolCallInvalid(0),
        ContentDelta(broken + "}"),
        ToolCallStart(1, "call_1", "g"),
        ToolCallArguments(1, "{}"),
    ]
    assert whole(broken + good, None, HERMES) == ParsedMessage(broken + "}", None, [call("g", "{}", 1)])


def test_default_call_ids():
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>' * 2
    ids = [made.id for made in parse_whole(text, None, HERMES).tool_calls]
    assert len(set(ids)) == 2
    assert all(re.fullmatch("call_[0-9a-f]{24}", made) for made in ids)


def test_a_format_of_ones_own():
    tools = ToolFormat("fenced", start="", body=JsonCall(name_key="tool", arguments_keys=("args",)), bare=True)
    assert whole('{"tool": "f", "args": {"a": 1}}', None, tools).tool_calls == [call("f", '{"a": 1}')]
    assert whole("text {", None, tools).content == "text {"
    with pytest.raises(ValueError, match="bare"):
        ToolFormat("x", start="")
    with pytest.raises(ValueError, match="separator"):
        ToolFormat("x", start="<", separator=", ")
    with pytest.raises(ValueError, match="markers"):
        ReasoningFormat("x", start="<think>", end="")


def test_events_are_plain_data():
    assert msgspec.json.encode(ToolCallArguments(0, "{")) == b'{"index":0,"text":"{"}'
