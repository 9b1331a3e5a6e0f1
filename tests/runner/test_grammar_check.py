"""What the front end refuses before admission, and that looking takes no time even for hostile input."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from skyline.engine.grammar_check import MAX_GRAMMAR_CHARS, GrammarError, validate_grammar
from skyline.engine.sampling_params import GrammarSpec


def nested(levels: int, key: str = "anyOf") -> object:
    schema: object = {"type": "string"}
    for _ in range(levels):
        schema = {key: [schema]}
    return schema


def chained_refs(count: int) -> dict[str, object]:
    defs = {
        f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"pattern": f"(.*[a-m]){{{i + 2}}}.*"}]}
        for i in range(count)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{count}": {"type": "string"}}}


GOOD = [
    GrammarSpec("json_object"),
    GrammarSpec("json_schema", "true"),
    GrammarSpec("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'),
    GrammarSpec("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#"}}}}'),
    GrammarSpec("json_schema", '{"type": "object", "properties": {"pattern": {"type": "string", "pattern": "a+"}}}'),
    GrammarSpec("regex", r"[a-z]{1,10}(\{x\}|[)(]{2})"),
    GrammarSpec("regex", "(a|b)*c"),
    GrammarSpec("choice", '["yes", "no", "\\u00e4 \\ud83d\\ude00\\n\\"/&"]'),
    GrammarSpec("lark", 'start: "a&b~" X // & comment\nX: /[&~]+/'),
    GrammarSpec("lark", 'start: "x" %json {"type": "object", "description": "a & b"} "y"'),
]

BAD = [
    GrammarSpec("json_schema", ""),
    GrammarSpec("json_schema", "{"),
    GrammarSpec("json_schema", "[]"),
    GrammarSpec("json_schema", "3"),
    GrammarSpec("json_schema", '{"maximum": NaN}'),
    GrammarSpec("json_schema", '{"type": "foo"}'),
    GrammarSpec("json_schema", "false"),
    GrammarSpec("json_schema", '{"$ref": "https://example.com/x.json"}'),
    GrammarSpec("json_schema", '{"$ref": "#/$defs/missing"}'),
    GrammarSpec("json_schema", '{"x-guidance": {"whitespace_pattern": "(a{1000}){1000}"}}'),
    GrammarSpec("json_schema", json.dumps(nested(70))),
    GrammarSpec("json_schema", "[" * 50_000),
    GrammarSpec("json_schema", '{"a":' * 19_000 + "1" + "}" * 2),
    GrammarSpec("json_schema", json.dumps({"type": "string", "pattern": "(a{1000}){1000}"})),
    GrammarSpec("json_schema", json.dumps({"allOf": [{"pattern": f"(.*[a-m]){{{i}}}.*"} for i in range(2, 30)]})),
    GrammarSpec("json_schema", json.dumps(chained_refs(20))),
    GrammarSpec("json_schema", '"' + "x" * MAX_GRAMMAR_CHARS + '"'),
    GrammarSpec("regex", "("),
    GrammarSpec("regex", "(?=a)b"),
    GrammarSpec("regex", r"(a)\1"),
    GrammarSpec("regex", "(a{1000}){1000}"),
    GrammarSpec("regex", "((a|a)*){1,99999999999999999999}"),
    GrammarSpec("regex", "a{1000000000}"),
    GrammarSpec("regex", "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"),
    GrammarSpec("regex", "(" * 20_000 + "a" + ")" * 20_000),
    GrammarSpec("regex", "a" * (MAX_GRAMMAR_CHARS + 1)),
    GrammarSpec("regex", "\ud800"),
    GrammarSpec("choice", "[]"),
    GrammarSpec("choice", '"yes"'),
    GrammarSpec("choice", '[""]'),
    GrammarSpec("choice", "[1]"),
    GrammarSpec("choice", '["\\ud800"]'),
    GrammarSpec("choice", json.dumps(["x"] * 1001)),
    GrammarSpec("choice", json.dumps(["x" * 10_001])),
    GrammarSpec("lark", ""),
    GrammarSpec("lark", "start: x"),
    GrammarSpec("lark", "start: X\nX: /(.*a){9}/ & /(.*b){9}/"),
    GrammarSpec("lark", "start: X\nX: ~/a+/"),
    GrammarSpec("lark", "start: X\nX: /(a{1000}){1000}/"),
    GrammarSpec("lark", 'start: "a"{1000000}'),
    GrammarSpec("lark", 'start: %llguidance {"no_forcing": true}'),
    GrammarSpec("lark", 'start: %json {"type": "string", "pattern": "(a{1000}){1000}"}'),
    GrammarSpec("lark", "start: %json {"),
    GrammarSpec("lark", "start: " + "(" * 40_000 + '"a"' + ")" * 40_000),
    GrammarSpec("nonsense", ""),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("spec", GOOD, ids=lambda spec: f"{spec.kind}-{spec.text[:30]!r}")
def test_accepts(spec: GrammarSpec) -> None:
    validate_grammar(spec)


@pytest.mark.parametrize("spec", BAD, ids=lambda spec: f"{spec.kind}-{spec.text[:30]!r}")
def test_refuses_fast_with_a_short_message(spec: GrammarSpec) -> None:
    start = time.process_time()
    with pytest.raises(GrammarError) as caught:
        validate_grammar(spec)
    assert time.process_time() - start < 3.0
    assert 5 < len(str(caught.value)) < 700


def test_needs_no_torch() -> None:
    code = "import sys, skyline.engine.grammar_check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
