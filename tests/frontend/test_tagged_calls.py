"""Calls with arguments between tags, and calls with their name before a JSON object: details of single formats."""

from __future__ import annotations

import json

import pytest

from skyline.frontend.parsers import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    ContentDelta,
    ParsedMessage,
    ToolCallArguments,
    ToolCallInvalid,
    ToolCallStart,
    make_parser,
)
from skyline.frontend.parsers.typed_value import as_json, parameter_types
from tests.frontend.parsing import call, numbered_ids, run, whole

QWEN, GLM, MINIMAX = TOOL_FORMATS["qwen3_coder"], TOOL_FORMATS["glm45"], TOOL_FORMATS["minimax_m2"]
DSML, V31, V3 = TOOL_FORMATS["deepseek_v32"], TOOL_FORMATS["deepseek_v31"], TOOL_FORMATS["deepseek_v3"]
MISTRAL, MISTRAL_V3 = TOOL_FORMATS["mistral"], TOOL_FORMATS["mistral_v3"]
SCHEMAS = {"f": {"properties": {"s": {"type": "string"}, "n": {"type": "integer"}}}}


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("12", {"string"}, "12"),
        ('"quoted"', {"string"}, '"quoted"'),
        (" a\n", {"string"}, " a\n"),
        ("12", {"integer"}, 12),
        (" 12\n", {"integer"}, 12),
        ("twelve", {"integer"}, "twelve"),
        ("1.5", {"number"}, 1.5),
        ("true", {"boolean"}, True),
        ("True", {"boolean"}, True),
        ("None", {"integer", "null"}, None),
        ("None", {"string", "null"}, "None"),
        ("null", {"string", "null"}, None),
        ("null", {"string"}, "null"),
        ("12", {"string", "null"}, "12"),
        ("12", {"string", "number"}, 12),
        ('"a"', {"string", "null"}, '"a"'),
        ('{"a": [1]}', {"object"}, {"a": [1]}),
        ("[1, 2", {"array"}, "[1, 2"),
        ('{"a": 1}', None, {"a": 1}),
        ("word", None, "word"),
        ("True", None, "True"),
        ("", None, ""),
        ('1, "b": 2', None, '1, "b": 2'),  # no way to slip in another member
        ("1}", None, "1}"),
        ("NaN", None, "NaN"),
        ("1e999", {"number"}, float("inf")),  # JSON, however large; it stays as it was written
        ("01", {"integer"}, "01"),
        ("[" * 300 + "]" * 300, None, "[" * 300 + "]" * 300),  # too deep for readers
    ],
)
def test_typed_values(text, types, value):
    assert json.loads(as_json(text, None if types is None else frozenset(types))) == value


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"string", "null"}),
        ({"oneOf": [{"type": "integer"}, {"anyOf": [{"type": "array"}]}]}, {"integer", "array"}),
        ({"anyOf": [{"type": "string"}, {}]}, None),
        ({"enum": ["a", 1, None, True, [], {}]}, {"string", "number", "null", "boolean", "array", "object"}),
        ({"const": "a"}, {"string"}),
        ({"$ref": "#/$defs/text"}, {"string"}),
        ({"$ref": "#/definitions/a~1b"}, {"number"}),
        ({"$ref": "#/$defs/loop"}, None),
        ({"$ref": "#/nowhere/at/all"}, None),
        ({"$ref": "http://elsewhere"}, None),
        ({"$ref": 5}, None),
        ({}, None),
        (True, None),
        ({"type": 5}, None),
        ({"type": []}, None),
        ({"anyOf": []}, None),
        ({"anyOf": "no"}, None),
    ],
)
def test_types_of_a_schema(schema, types):
    loop = {"anyOf": [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/loop"}]}
    definitions = {"$defs": {"text": {"type": "string"}, "loop": loop}, "definitions": {"a/b": {"type": "number"}}}
    found = parameter_types({"properties": {"x": schema}, **definitions}, "x")
    assert found == (None if types is None else frozenset(types))


@pytest.mark.parametrize("parameters", [None, {}, [], "text", {"properties": []}, {"properties": {"y": {}}}])
def test_types_without_a_schema(parameters):
    assert parameter_types(parameters, "x") is None
    assert parameter_types({"additionalProperties": {"type": "string"}}, "x") == {"string"}


# --- one format each -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "text", "name", "arguments"),
    [
        # Strings are what stands between the tags, to the letter; for Qwen without one newline at each side.
        (QWEN, "<tool_call><function=f><parameter=s>a</parameter></function></tool_call>", "f", {"s": "a"}),
        (QWEN, "<tool_call>\n<function=f>\n<parameter=s>\n\n a\n\n</parameter>\n</function>", "f", {"s": "\n a\n"}),
        (QWEN, "<tool_call>\n<function=f>\n<parameter=s>\n</parameter>\n</function>", "f", {"s": ""}),
        (QWEN, "<tool_call>\n<function=f>\n<parameter=s>\n\n</parameter>\n</function>", "f", {"s": ""}),
        (QWEN, "<tool_call><function=f><parameter=n>\n7\n</parameter></function>", "f", {"n": 7}),
        (
            QWEN,
            "<tool_call><function=f><parameter=s>\n<parameter=n></function></tool_call>\n</parameter></function>",
            "f",
            {"s": "<parameter=n></function></tool_call>"},
        ),
        (GLM, "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>\na\n</arg_value>\n</tool_call>", "f", {"s": "\na\n"}),
        (GLM, "<tool_call>f<arg_key>n</arg_key><arg_value>7</arg_value></tool_call>", "f", {"n": 7}),
        (GLM, "<tool_call>\nf\n</tool_call>", "f", {}),
        (
            MINIMAX,
            '<minimax:tool_call><invoke name="f"><parameter name="s"><b a="1"></parameter></invoke>'
            "</minimax:tool_call>",
            "f",
            {"s": '<b a="1">'},
        ),
        (
            DSML,
            '<｜DSML｜function_calls><｜DSML｜invoke name="f"><｜DSML｜parameter name="n" string="true">7'
            '</｜DSML｜parameter><｜DSML｜parameter name="s" string="false">[7]</｜DSML｜parameter></｜DSML｜invoke>',
            "f",
            {"n": "7", "s": [7]},  # what the model says of a value goes before the schema
        ),
        (MISTRAL, '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"n": 7}', "f", {"n": 7}),
        (MISTRAL, '[TOOL_CALLS]f{"n": 7}', "f", {"n": 7}),
        (MISTRAL, '[TOOL_CALLS] f [ARGS] {"n": 7}\n', "f", {"n": 7}),
        (MISTRAL_V3, '[TOOL_CALLS]{"name": "f", "arguments": {"n": 7}}', "f", {"n": 7}),
        (MISTRAL_V3, '[TOOL_CALLS][{"name": "f", "arguments": {"n": 7}}', "f", {"n": 7}),
        (V31, '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"n": 7}', "f", {"n": 7}),
        (V31, '<｜tool▁calls▁begin｜>\n<｜tool▁call▁begin｜>f\n<｜tool▁sep｜>\n{"n": 7}<｜tool▁calls▁e', "f", {"n": 7}),
        (V3, '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n{"n": 7}\n``', "f", {"n": 7}),
    ],
)
def test_a_call(format, text, name, arguments):
    message = whole(text, None, format, allowed={"f"}, schemas=SCHEMAS)
    assert message.content is None
    assert [(made.name, json.loads(made.arguments)) for made in message.tool_calls] == [(name, arguments)]
    for place in range(len(text)):
        pieces = [text[:place], text[place:]]
        assert run(pieces, None, format, schemas=SCHEMAS) == run([text], None, format, schemas=SCHEMAS)


@pytest.mark.parametrize(
    ("format", "text", "announced"),
    [
        (QWEN, "<tool_call>f</tool_call>", False),
        (QWEN, '<tool_call>{"name": "f", "arguments": {}}</tool_call>', False),
        (QWEN, "<tool_call><function=></function></tool_call>", False),
        (QWEN, "<tool_call><function=f g></function></tool_call>", False),
        (QWEN, "<tool_call><function=f>text</function></tool_call>", False),
        (QWEN, "<tool_call><function=f><parameter=></parameter></function>", False),
        (QWEN, "<tool_call><function=f><parameter=s>a</parameter>text</function>", True),
        (QWEN, "<tool_call><function=f><parameter=s>a</function></tool_call>", True),
        (QWEN, "<tool_call><function=f><parameter=s>a</parameter></tool_call>", True),
        (QWEN, f"<tool_call><function={'f' * 600}></function>", False),
        (GLM, "<tool_call>two words</tool_call>", False),
        (GLM, "<tool_call>f<arg_key>s</arg_key>x<arg_value>a</arg_value></tool_call>", True),
        (GLM, "<tool_call>f<arg_value>a</arg_value></tool_call>", False),
        (MINIMAX, "<minimax:tool_call>none</minimax:tool_call>", False),
        (MINIMAX, "<minimax:tool_call></minimax:tool_call>", False),
        (DSML, '<｜DSML｜function_calls><｜DSML｜invoke name="f"><｜DSML｜parameter name="s" string="maybe">', True),
        (V31, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>[1]<｜tool▁call▁end｜>", False),
        (V31, '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1]', True),
        (MISTRAL, "[TOOL_CALLS]f[ARGS]", False),
        (MISTRAL, f"[TOOL_CALLS]f[CALL_ID]{'i' * 600}[ARGS]", False),
        (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {}}]', False),
        (MISTRAL_V3, "[TOOL_CALLS][]", False),
        (MISTRAL_V3, "[TOOL_CALLS]f[ARGS]{}", False),
    ],
)
def test_no_call_is_content(format, text, announced):
    events = run([text], None, format, schemas=SCHEMAS)
    assert events[-1] == ContentDelta(text)
    assert (ToolCallInvalid(0) in events) is announced
    assert len(events) == 1 or announced


def test_how_arguments_are_streamed():
    """A string letter by letter, everything else when it is complete."""
    parser = make_parser(None, QWEN, schemas=SCHEMAS, new_call_id=numbered_ids())
    assert parser.push("Ok\n<tool_call>\n<function=f>\n") == [ContentDelta("Ok")]
    assert parser.push("<parameter=s>\n") == [ToolCallStart(0, "call_0", "f"), *pieces('{"s": ', '"')]
    assert parser.push('say "hi') == pieces('say \\"hi')
    assert parser.push("\n") == []  # may be the newline before the end
    assert parser.push("é</para") == pieces("\\né")
    assert parser.push("meter>\n<parameter=n>\n1") == pieces('"', ', "n": ')
    assert parser.push("2\n</parameter>") == pieces("12")
    assert parser.push("\n</function>\n") == pieces("}")
    assert parser.push("</tool_call>") + parser.finish() == []


def pieces(*texts: str) -> list[ToolCallArguments]:
    return [ToolCallArguments(0, text) for text in texts]


def test_call_that_breaks_after_it_was_announced():
    broken = "<tool_call><function=f><parameter=s>a</parameter>oops"
    text = broken + "<tool_call><function=g></function></tool_call>"
    assert run([text], None, QWEN, schemas=SCHEMAS) == [
        ToolCallStart(0, "call_0", "f"),
        ToolCallArguments(0, '{"s": "a"'),
        ToolCallInvalid(0),
        ContentDelta(broken),
        ToolCallStart(1, "call_1", "g"),
        ToolCallArguments(1, "{}"),
    ]


def test_reasoning_between_answers():
    """MiniMax M2 reasons whenever it likes; others do not."""
    reasoning = REASONING_FORMATS["minimax_m2"]
    block = '<minimax:tool_call>\n<invoke name="f">\n</invoke>\n</minimax:tool_call>'
    text = f"One.\n</think>\n\nA\n<think>\nTwo.\n</think>\nB\n{block}<think>Three.</think>"
    expected = ParsedMessage("A\nB", "One.\n\nTwo.\nThree.", [call("f", "{}")])
    assert whole(text, reasoning, MINIMAX) == expected
    events = run([text], reasoning, MINIMAX)
    assert all(run([text[:place], text[place:]], reasoning, MINIMAX) == events for place in range(len(text)))
    assert whole("<think>a</think>b<think>c", REASONING_FORMATS["qwen3"], MINIMAX).content == "b<think>c"
