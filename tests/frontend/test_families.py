"""What every model family's format must do, with outputs written as its chat template writes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyline.frontend.parsers import (
    ContentDelta,
    ParsedMessage,
    ToolCallArguments,
    ToolCallInvalid,
    ToolCallStart,
    make_parser,
    random_call_id,
)
from tests.frontend.parsing import FAMILIES, Family, numbered_ids, run, whole

pytestmark = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.tools.name)

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "note": {"type": ["string", "null"]},
        "spec": {"$ref": "#/$defs/spec"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "$defs": {"spec": {"type": "object"}},
}
SCHEMAS = {"weather": SCHEMA, "now": {"type": "object"}}
VALUES: dict[str, Any] = {
    "city": 'Zürich "北京"\n\n\tC:\\dir </b> {"a": 1} 12',
    "days": 3,
    "note": None,
    "spec": {"deep": [{"x": {"y": [1.5, True, "]}"]}}], "é": "\n"},
    "tags": ["a", "b<c"],
}
TWO = [("weather", VALUES), ("now", {})]


def made(message: ParsedMessage) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in message.tool_calls]


def parsed(family: Family, text: str, allowed: set[str] | None = None) -> ParsedMessage:
    return whole(text, *family.formats, allowed=allowed, schemas=SCHEMAS)


def test_calls(family):
    for calls in ([("weather", VALUES)], [("now", {})], TWO, [*TWO, *TWO]):
        message = parsed(family, family.text("", "", calls))
        assert (message.content, made(message)) == (None, calls)
        assert [call.id for call in message.tool_calls] == [f"call_{number}" for number in range(len(calls))]


def test_reasoning_content_and_calls(family):
    text = family.text("First, the\n\nweather.", "I look it up.", TWO)
    message = parsed(family, text)
    assert (message.reasoning, message.content, made(message)) == ("First, the\n\nweather.", "I look it up.", TWO)
    no_content = parsed(family, family.text("Hm", "", TWO))
    assert (no_content.reasoning, no_content.content, made(no_content)) == ("Hm", None, TWO)
    no_calls = parsed(family, family.text("Hm", "  Yes.\n- no\n", []))
    assert no_calls == ParsedMessage(no_calls.content, "Hm", [])
    assert (no_calls.content or "").strip() == "Yes.\n- no"


def test_every_split_gives_the_same_events(family):
    text = family.text("Hm", "See:", TWO)
    expected = run([text], *family.formats, schemas=SCHEMAS)
    for place in range(len(text) + 1):
        assert run([text[:place], text[place:]], *family.formats, schemas=SCHEMAS) == expected, text[:place]
    assert run(text, *family.formats, schemas=SCHEMAS) == expected


def test_unfinished_output(family):
    """Every beginning of an output: only whole calls count, and the broken rest is content as it was written."""
    text = family.text("", "", TWO)
    counts = []
    for place in range(len(text) + 1):
        events = run([text[:place]], *family.formats, schemas=SCHEMAS)
        message = parsed(family, text[:place])
        assert made(message) == TWO[: len(message.tool_calls)]
        counts.append(len(message.tool_calls))
        if ToolCallInvalid(len(message.tool_calls)) in events:
            assert isinstance(events[-1], ContentDelta)
            assert events[-1].text.strip() and text[:place].endswith(events[-1].text.lstrip("\n"))
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 2


def test_arguments_are_streamed(family):
    """Most of a long string is passed on before the call is complete."""
    text = family.calls([("weather", {"city": "a long name " * 40})])
    parser = make_parser(*family.formats, schemas=SCHEMAS, new_call_id=numbered_ids())
    if family.reasoning.starts_inside:
        text = family.reasoning.end + text
    events = parser.push(text[: text.index("long name") + 300])
    assert ToolCallStart(0, "call_0", "weather") in events
    assert sum(len(event.text) for event in events if isinstance(event, ToolCallArguments)) > 250


def test_unknown_function_is_content(family):
    text = family.text("", "", [("weather", VALUES)])
    message = parsed(family, text, allowed={"now"})
    assert message.tool_calls == []
    if family.reasoning.harmony:
        text = text.removesuffix("<|call|>")  # ends the message whatever is in it
    before = f"\n\n{family.reasoning.end}\n\n" if family.reasoning.starts_inside else ""
    assert message.content == text.removeprefix(before)
    known = parsed(family, family.text("", "", TWO), allowed={"weather", "now"})
    assert made(known) == TWO


# In a block of several calls, what follows a broken one is not looked at.
SHARED_BLOCK = {"minimax_m2", "deepseek_v32", "deepseek_v31", "deepseek_v3", "mistral_v3"}


def test_the_first_call_is_unknown(family):
    message = parsed(family, family.text("", "", TWO), allowed={"now"})
    assert made(message) == ([] if family.tools.name in SHARED_BLOCK else TWO[1:])
    assert "weather" in (message.content or "")


def test_broken_calls(family):
    """One character is lost, anywhere: no exception, calls are valid, and no function is made up."""
    text = family.text("", "", TWO)
    for place in range(len(text)):
        calls = made(parsed(family, text[:place] + text[place + 1 :], allowed={"weather", "now"}))
        assert all(isinstance(arguments, dict) for _, arguments in calls)
        assert [name for name, _ in calls] in ([], ["weather"], ["now"], ["weather", "now"])


def test_text_after_a_call(family):
    text = family.text("", "", [("now", {})])
    after = "<|start|>assistant<|channel|>final<|message|>Done." if family.reasoning.harmony else "\nDone."
    message = parsed(family, text + after)
    assert (message.content, made(message)) == ("Done.", [("now", {})])


def test_ids_that_the_templates_accept(family):
    ids = {random_call_id(family.tools) for _ in range(8)}
    assert len(ids) == 8
    if family.tools.name.startswith("mistral"):
        assert all(len(made_id) == 9 and made_id.isalnum() and made_id.isascii() for made_id in ids)
    else:
        assert all(made_id.startswith("call_") for made_id in ids)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
keys = st.text(st.characters(whitelist_categories=["L", "N"], whitelist_characters="_-. "), min_size=1).filter(
    lambda key: key == key.strip()
)


@given(arguments=st.dictionaries(keys, json_values, max_size=3))
@settings(max_examples=60, deadline=None)
def test_round_trip(family, arguments):
    """Whatever a template writes comes back, if the schema tells strings from other values."""
    properties = {key: {"type": "string"} if isinstance(value, str) else {} for key, value in arguments.items()}
    schemas = {"f": {"type": "object", "properties": properties}}
    text = family.text("", "", [("f", arguments)])
    assert made(whole(text, *family.formats, schemas=schemas)) == [("f", arguments)]
