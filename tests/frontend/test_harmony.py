"""The harmony format: messages as in https://cookbook.openai.com/articles/openai-harmony, and broken ones."""

from __future__ import annotations

import pytest

from skyline.frontend.parsers import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    ContentDelta,
    ParsedMessage,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallInvalid,
    ToolCallStart,
    forced_header,
    make_parser,
)
from tests.frontend.parsing import call, numbered_ids, run, whole

REASONING, TOOLS = REASONING_FORMATS["gpt_oss"], TOOL_FORMATS["gpt_oss"]
SF = '{"location":"San Francisco"}'
NEXT = "<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<|channel|>final<|message|>2 + 2 = 4.<|return|>", None, "2 + 2 = 4."),
        ("<|channel|>final<|message|>2 + 2 = 4.", None, "2 + 2 = 4."),
        (f"<|channel|>analysis<|message|>Hm.{NEXT}<|channel|>final<|message|>4.<|return|>", "Hm.", "4."),
        (
            f"<|channel|>analysis<|message|>A{NEXT}<|channel|>analysis<|message|>B{NEXT}<|channel|>final<|message|>C",
            "A\nB",
            "C",
        ),
        # A preamble is for the user.
        (
            f"<|channel|>commentary<|message|>**Plan**:\n1. a{NEXT}<|channel|>final<|message|>Done.<|return|>",
            None,
            "**Plan**:\n1. a\nDone.",
        ),
        ("<|start|>assistant<|channel|>final<|message|>4.<|return|>", None, "4."),
        ("<|message|>4.<|return|>", None, "4."),
        # Cut off: what has a channel belongs there; half a header is nothing.
        ("<|channel|>analysis<|message|>Hm. <|en", "Hm. <|en", None),
        (f"<|channel|>analysis<|message|>Hm.{NEXT}<|channel|>fin", "Hm.", None),
        ("<|channel|>analysis", None, None),
        ("<|chan", None, None),
        ("", None, None),
        ("\n", None, None),
        # No header at all, or one that cannot be.
        ("Four.", None, "Four."),
        (" to be", None, " to be"),
        ("to=", None, "to="),
        ("a<|end|>b", None, "a\nb"),
        ("<|channel|>" + "x" * 600 + "<|message|>a", None, "<|channel|>" + "x" * 600 + "<|message|>a"),
        # Missing ends, doubled channels, and names nobody knows.
        ("<|channel|>analysis<|message|>A<|start|>assistant<|channel|>final<|message|>B", "A", "B"),
        ("<|channel|>commentary<|channel|>analysis<|message|>A", "A", None),
        ("<|channel|>commentary?<|message|>A", None, "A"),
        (f"<|channel|>oops{NEXT}<|channel|>final<|message|>A", None, "<|channel|>oops\nA"),
        ("<|channel|>oops<|start|>assistant<|channel|>final<|message|>A", None, "<|channel|>oops\nA"),
        # Other markers are text inside of a message.
        ("<|channel|>final<|message|>a <|channel|> b <|message|> c", None, "a <|channel|> b <|message|> c"),
    ],
)
def test_messages(text, reasoning, content):
    for tools in (None, TOOLS):
        assert whole(text, REASONING, tools) == ParsedMessage(content, reasoning, [])
    for place in range(len(text)):
        assert run([text[:place], text[place:]], REASONING, TOOLS) == run([text], REASONING, TOOLS)


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.get_weather<|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.get_weather<|message|>",
        "<|channel|>commentary to=functions.get_weather json<|message|>",
        "<|channel|>commentary to=functions.get_weather code<|message|>",
        " to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>",
        "<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>",
        "<|channel|>analysis to=functions.get_weather <|constrain|>json<|message|>",
        "<|channel|>commentary to=get_weather <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>\n ",
    ],
)
@pytest.mark.parametrize("end", ["<|call|>", "", "<|end|>", "\n<|call|>", "<|call|>\n"])
def test_headers_of_calls(header, end):
    text = f"{header}{SF}{end}"
    message = whole(text, REASONING, TOOLS, allowed={"get_weather"})
    assert message == ParsedMessage(None, None, [call("get_weather", SF)])
    for place in range(len(text)):
        assert run([text[:place], text[place:]], REASONING, TOOLS) == run([text], REASONING, TOOLS)


def test_events_of_a_stream():
    parser = make_parser(REASONING, TOOLS, new_call_id=numbered_ids())
    assert parser.push("<|channel|>analysis<|message|>") == []
    assert parser.push("Need it.") == [ReasoningDelta("Need it.")]
    assert parser.push("<|end|><|start|>assistant<|channel|>commentary") == []
    assert parser.push("<|message|>I look.") == [ContentDelta("I look.")]
    assert parser.push("<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json") == []
    assert parser.push('<|message|>{"a') == [ToolCallStart(0, "call_0", "f"), ToolCallArguments(0, '{"a')]
    assert parser.push('": 1}') == [ToolCallArguments(0, '": 1}')]
    assert parser.push("<|call|>") == []
    assert parser.finish() == []


@pytest.mark.parametrize("body", ["", '{"a": 1', '{"a": 01}<|call|>', "[1]<|call|>", "code()<|call|>", "<|call|>"])
def test_bodies_that_are_no_arguments(body):
    header = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    events = run([header + body], REASONING, TOOLS)
    assert events[-1] == ContentDelta((header + body).removesuffix("<|call|>"))
    announced = body.startswith("{")
    assert (ToolCallInvalid(0) in events) is announced
    after = whole(f"{header}[1]{NEXT}{header}{SF}<|call|>", REASONING, TOOLS)
    assert (after.content, after.tool_calls) == (header + "[1]", [call("f", SF)])


def test_functions_that_nobody_offered():
    text = f"<|channel|>commentary to=browser.search <|constrain|>json<|message|>{SF}"
    assert whole(text, REASONING, TOOLS, allowed={"search"}) == ParsedMessage(text, None, [])
    assert whole(text, REASONING, None) == ParsedMessage(text, None, [])
    assert whole(text, REASONING, TOOLS, allowed={"browser.search"}).tool_calls == [call("browser.search", SF)]


def test_text_after_the_arguments_is_content():
    text = f"<|channel|>commentary to=functions.f<|message|>{SF} and more<|call|>"
    assert whole(text, REASONING, TOOLS) == ParsedMessage("and more", None, [call("f", SF)])


def test_without_a_reasoning_format_all_text_is_content():
    text = f"<|channel|>analysis<|message|>A{NEXT}<|channel|>final<|message|>B"
    assert whole(text, None, TOOLS) == ParsedMessage("A\nB", None, [])


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("<|start|>user<|message|>Hi<|end|><|start|>assistant", "Yes.", [ContentDelta("Yes.")]),
        ("<|start|>assistant<|channel|>final<|message|>The answer ", "is 4.", [ContentDelta("is 4.")]),
        ("<|start|>assistant<|channel|>analysis<|message|>Hm", ", well", [ReasoningDelta(", well")]),
        ("<|start|>assistant<|channel|>", "analysis<|message|>Hm", [ReasoningDelta("Hm")]),
        ("no harmony", "<|channel|>final<|message|>4.", [ContentDelta("4.")]),
    ],
)
def test_the_prompt_may_have_begun_the_message(prompt, text, expected):
    parser = make_parser(REASONING, TOOLS, prompt=prompt)
    assert parser.push(text) + parser.finish() == expected


def test_headers_for_grammars():
    prompt = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
    assert forced_header(prompt, None) == "<|channel|>final<|message|>"
    assert forced_header(prompt, "f") == "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    assert forced_header(prompt + "<|channel|>final<|message|>", None) == ""
    assert forced_header("<|im_start|>assistant\n", "f") == ""
    made = whole(forced_header(prompt, "f") + SF, REASONING, TOOLS)
    assert made.tool_calls == [call("f", SF)]
