from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skyline.frontend.parsers import (
    ContentDelta,
    ParsedMessage,
    ReasoningFormat,
    ToolCallArguments,
    ToolCallInvalid,
    ToolCallStart,
    ToolFormat,
    make_parser,
)
from skyline.frontend.parsers.output import OutputParser
from tests.frontend.parsing import FAMILIES, HERMES, LLAMA, QWEN, R1, call, cut, run, whole

FORMATS = [*itertools.product([None, QWEN, R1], [None, HERMES, LLAMA]), *(family.formats for family in FAMILIES)]
FORMATS += [(None, family.tools) for family in FAMILIES]

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

# Pieces of what each family writes: cut where markers begin and end, so that they meet in every order.
EDGES = re.compile(r"(<[^<>]*>|\[[A-Z_]+\]|```json|```|[{}\[\],]|\n)")
SAMPLE = [("f", {"a": "x\ny", "b": [1, None], "c": {"d": "é</b>"}}), ("g", {})]
SCHEMAS = {"f": {"properties": {"a": {"type": "string"}, "c": {"type": "object"}}}}


@st.composite
def outputs(draw) -> tuple[str, tuple[ReasoningFormat | None, ToolFormat | None]]:
    """A text with pieces of the format's calls in it, and the format."""
    family = draw(st.sampled_from(FAMILIES))
    sample = family.text("hm", "Yes.", SAMPLE)
    own = [piece for piece in EDGES.split(sample) if piece]
    own += [family.calls(SAMPLE[:1]), family.calls(SAMPLE[1:]), family.calls(SAMPLE), sample, "<|start|>assistant"]
    pieces = st.sampled_from(own) | st.sampled_from(FRAGMENTS) | st.text(max_size=3)
    text = "".join(draw(st.lists(pieces, max_size=14)))
    return text, draw(st.sampled_from([family.formats, (None, family.tools), (family.reasoning, None)]))


@given(output=outputs(), places=st.lists(st.integers(0, 10_000), max_size=10))
@settings(max_examples=250, deadline=None)
def test_any_chunks_of_any_family_give_the_events_of_the_whole(output, places):
    text, formats = output
    expected = run([text], *formats, allowed={"f", "g"}, schemas=SCHEMAS)
    assert run(cut(text, places), *formats, allowed={"f", "g"}, schemas=SCHEMAS) == expected
    assert run(text, *formats, allowed={"f", "g"}, schemas=SCHEMAS) == expected


@given(output=outputs())
@settings(max_examples=250, deadline=None)
def test_calls_of_any_family_are_valid_and_nothing_is_lost(output):
    text, formats = output
    events = run([text], *formats, schemas=SCHEMAS)
    message = whole(text, *formats, schemas=SCHEMAS)
    for made in message.tool_calls:
        assert made.name
        assert isinstance(json.loads(made.arguments), dict)
    announced = [event.index for event in events if isinstance(event, ToolCallStart)]
    assert announced == list(range(len(announced)))
    if message.tool_calls or any(format is not None and format.harmony for format in formats):
        return
    kept = "".join(filter(None, [message.reasoning, message.content]))
    for marker in formats[0].markers if formats[0] is not None else ():
        kept, text = kept.replace(marker, ""), text.replace(marker, "")
    assert sorted("".join(kept.split())) == sorted("".join(text.split()))  # with `anywhere`, in another order


@given(text=texts, formats=st.sampled_from(FORMATS), places=st.lists(st.integers(0, 10_000), max_size=10))
@settings(max_examples=400, deadline=None)
def test_any_chunks_give_the_events_of_the_whole(text, formats, places):
    allowed = {"f", "g", "late", "q", "b", "n"}
    expected = run([text], *formats, allowed=allowed)
    assert run(cut(text, places), *formats, allowed=allowed) == expected
    assert run(text, *formats, allowed=allowed) == expected


@given(text=texts, formats=st.sampled_from(FORMATS[:9]))
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
        parser = make_parser(R1 if prefix == "</think>" else None, tools, new_call_id=lambda: "id")
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


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.tools.name)
def test_little_is_held_back(family):
    """Text is looked at again only while it is held back: that this is short makes the work grow with the text."""
    sample = family.calls(SAMPLE)
    units = [*dict.fromkeys(EDGES.findall(sample)), sample[: len(sample) // 3], sample, " ", "<", "<|", "a "]
    for prefix, unit in itertools.product(["", sample[: len(sample) // 4]], units):
        text = prefix + unit * (2000 // len(unit))
        parser = make_parser(*family.formats, schemas=SCHEMAS, new_call_id=lambda: "id")
        for at in range(0, len(text), 7):
            parser.push(text[at : at + 7])
            assert len(parser._rest) < 40  # the longest marker has as many


def test_long_hostile_text_passes():
    """Seconds at most; a quadratic parser would take hours."""
    units = ("<tool_call", "<tool_call>{", " ", '{"name":"f","parameters":{"a":"')
    for unit, tools in itertools.product(units, (HERMES, LLAMA)):
        text = unit * (250_000 // len(unit))
        assert run((text[at : at + 4096] for at in range(0, len(text), 4096)), None, tools)
    for family in FAMILIES:
        sample = family.calls(SAMPLE)
        for unit in (sample[: len(sample) // 3], sample[: sample.index("x")]):
            text = unit * (100_000 // len(unit))
            assert run((text[at : at + 4096] for at in range(0, len(text), 4096)), None, family.tools)
