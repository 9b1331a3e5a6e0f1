"""Checks a grammar before a request is admitted: syntax, size, and the shapes that are known to explode.

Needs neither torch nor a tokenizer, so the HTTP process can run it. llguidance does the syntax; its own limits (fuel
for lexers and parsers) stop most hostile input, so this file refuses only what gets past them: see the constants.
Sources: https://github.com/guidance-ai/llguidance, docs/syntax.md and docs/json_schema.md.
"""

from __future__ import annotations

import json
import re
from typing import Any, Never

from llguidance import LLMatcher, LLParserLimits

from skyline.engine.sampling_params import MAX_GRAMMAR_CHARS, GrammarSpec

MAX_DEPTH = 64  # of nested objects and arrays in a JSON schema, and of groups in a regular expression
MAX_CHOICES = 1000
MAX_CHOICE_CHARS = 10_000
MAX_REPEAT = 100_000  # product of nested counted repetitions, as in (a{1000}){100}
# Intersecting regular expressions takes time exponential in their number, and llguidance's fuel does not count it.
MAX_INTERSECTED_PATTERNS = 3

# Between JSON tokens: a space, a line break, some indentation. Without a bound, a model that does not know how
# to go on writes blanks until max_tokens.
_WHITESPACE = r"[ \t]?(\r?\n[ \t]{0,16})?"

_LARK_TOKEN = re.compile(
    r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?P<regex>(?:\\.|[^/\\\n])+)/'
    r"|(?P<json>%json\b)|(?P<directive>%(?:regex|llguidance)\b)|(?P<set>[&~])|(?P<count>\{[\d,\s]+\})"
)
_COUNT = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")


class GrammarError(ValueError):
    """A grammar that cannot be used; the text says why, in words for the client who sent it."""


def validate_grammar(spec: GrammarSpec) -> None:
    """Raise GrammarError if `spec` is malformed, too large, or of a shape that cannot be compiled in bounded time."""
    grammar = to_llguidance(spec)
    # llguidance raises for some errors, returns others, and turns Rust panics into a BaseException of its own.
    try:
        message = LLMatcher.validate_grammar(grammar, limits=parser_limits())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        message = str(error) or type(error).__name__
    if message:
        raise GrammarError(f"invalid {_name(spec)}: {brief(message)}")


def parser_limits() -> LLParserLimits:
    """llguidance's limits, below its defaults: tens of milliseconds a step at worst, some 100 MB a grammar."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=50_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _json_grammar(schema: Any) -> str:
    options = {"whitespace_pattern": _WHITESPACE} if isinstance(schema, dict) else None  # true and false take none
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options))


def to_llguidance(spec: GrammarSpec) -> str:
    """The grammar in llguidance's own form. Raises GrammarError for what can be seen without compiling it."""
    text = spec.text
    if len(text) > MAX_GRAMMAR_CHARS:
        raise GrammarError(f"the {_name(spec)} has {len(text)} characters; at most {MAX_GRAMMAR_CHARS} are allowed")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise GrammarError(f"the {_name(spec)} is not valid Unicode text") from None
    try:
        if spec.kind == "json_object":
            return _json_grammar({"type": "object"})
        if spec.kind == "json_schema":
            schema = _parse_json(text, "JSON schema")
            check_schema(schema)
            return _json_grammar(schema)
        if spec.kind == "regex":
            check_regex(text)
            return str(LLMatcher.grammar_from_regex(text))
        if spec.kind == "choice":
            return str(LLMatcher.grammar_from_lark(_choice_grammar(_parse_json(text, "choice"))))
        if spec.kind == "lark":
            check_lark(text)
            return str(LLMatcher.grammar_from_lark(text))
    except GrammarError:
        raise
    except ValueError as error:
        raise GrammarError(f"invalid {_name(spec)}: {brief(str(error))}") from None
    raise GrammarError(f"unknown kind of grammar {spec.kind!r}")


def brief(message: str) -> str:
    """llguidance's messages without its dump of parser state, at most 500 characters."""
    text = message.split("\n<", 1)[0].strip()
    return text if len(text) <= 500 else text[:500] + "..."


def check_schema(schema: Any) -> None:
    """Raise GrammarError if a decoded JSON schema is not an object or boolean, too deep, or would explode."""
    if not isinstance(schema, (dict, bool)):
        raise GrammarError("a JSON schema must be a JSON object or a boolean")
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH + 1):
        for node in level:
            if isinstance(node, dict):
                _check_schema_object(node)
        level = [child for node in level for child in _children(node) if isinstance(child, (dict, list))]
        if not level:
            break
    else:
        raise GrammarError(f"the JSON schema is nested deeper than {MAX_DEPTH} levels")
    try:
        _check_intersections(schema)
    except RecursionError:
        raise GrammarError("the JSON schema's references are nested too deep") from None


def _check_schema_object(node: dict[str, Any]) -> None:
    if "x-guidance" in node:
        raise GrammarError("the JSON schema keyword 'x-guidance' is not supported")
    if isinstance(pattern := node.get("pattern"), str):
        check_regex(pattern)
    if isinstance(patterns := node.get("patternProperties"), dict):
        for pattern in patterns:
            check_regex(pattern)


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def _check_intersections(schema: Any) -> None:
    """Bound how many patterns may have to hold for one string: allOf adds them up, alternatives take the largest."""
    known: dict[int, int] = {}

    def count(node: Any, refs: int) -> int:
        if not isinstance(node, dict) or refs > MAX_DEPTH:
            return 0
        if id(node) in known:
            return known[id(node)]
        known[id(node)] = 0  # what a cycle adds to itself
        total = _constrains_text(node)
        total += sum(count(child, refs) for child in _children(node.get("allOf")))
        for key in ("anyOf", "oneOf"):
            total += max((count(child, refs) for child in _children(node.get(key))), default=0)
        if isinstance(ref := node.get("$ref"), str):
            total += count(_resolve(schema, ref), refs + 1)
        known[id(node)] = total
        return total

    def merged(node: Any) -> int:
        return _constrains_text(node) + sum(merged(child) for child in _children(node))

    stack = [schema]
    while stack:
        node = stack.pop()
        stack += [child for child in _children(node) if isinstance(child, (dict, list))]
        if not isinstance(node, dict):
            continue
        # Merging objects intersects the schemas of properties with the same name.
        parts = sum(merged(part) > 0 for part in _children(node.get("allOf")))
        if max(count(node, 0), parts) > MAX_INTERSECTED_PATTERNS:
            raise GrammarError(
                f"the JSON schema requires more than {MAX_INTERSECTED_PATTERNS} patterns or formats of the same value "
                "(through allOf, anyOf, oneOf or $ref); merge them into one pattern"
            )


def _constrains_text(node: Any) -> int:
    return int(isinstance(node, dict) and any(isinstance(node.get(key), str) for key in ("pattern", "format")))


def _resolve(schema: Any, ref: str) -> Any:
    """What a local JSON pointer (RFC 6901) refers to; None if nothing. Other references llguidance refuses."""
    node = schema
    if not ref.startswith("#/"):
        return schema if ref == "#" else None
    for part in ref[2:].split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            node = node.get(part)
        else:
            return None
    return node


def check_regex(pattern: str) -> None:
    """Raise GrammarError if nested counted repetitions multiply to more than MAX_REPEAT, or groups nest too deep."""
    # worst[-1] is the largest expansion of any part of the group that is open, of the last atom: `atom`.
    worst, atom, place = [1], 1, 0
    while place < len(pattern):
        char = pattern[place]
        if char == "\\":
            place, atom = place + 1, 1
        elif char == "[":
            place, atom = _end_of_class(pattern, place), 1
        elif char == "(":
            worst.append(1)
            if len(worst) > MAX_DEPTH + 1:
                raise GrammarError(f"the regular expression has groups nested deeper than {MAX_DEPTH} levels")
        elif char == ")" and len(worst) > 1:
            atom = worst.pop()
            worst[-1] = max(worst[-1], atom)
        elif char == "{" and (found := _COUNT.match(pattern, place)):
            atom *= max(1, *(_number(number) for number in found.groups()))
            worst[-1] = max(worst[-1], atom)
            if atom > MAX_REPEAT:
                _too_many("regular expression")
            place = found.end() - 1
        elif char not in "*+?":
            atom = 1
        place += 1


def _number(digits: str) -> int:
    return int(digits) if 0 < len(digits) < 10 else MAX_REPEAT + 1 if digits else 0


def _too_many(what: str) -> Never:
    raise GrammarError(f"the {what} repeats a part more than {MAX_REPEAT} times, counting nested repetitions")


def _end_of_class(pattern: str, start: int) -> int:
    """Index of the bracket that closes the character class opened at `start`, or of the pattern's last character."""
    place = start + 1
    while place < len(pattern) - 1 and pattern[place] != "]":
        place += 2 if pattern[place] == "\\" else 1
    return place


def check_lark(text: str) -> None:
    """Raise GrammarError for Lark features whose cost has no bound: set operations on terminals, foreign directives."""
    place = 0
    while found := _LARK_TOKEN.search(text, place):
        place = found.end()
        if found["set"]:
            raise GrammarError(f"the operator {found['set']} on terminals is not supported in Lark grammars")
        if found["directive"]:
            raise GrammarError(f"{found['directive']} is not supported in Lark grammars")
        if found["regex"]:
            check_regex(found["regex"])
        if found["count"]:
            check_regex("." + "".join(found["count"].split()))
        if found["json"]:
            start = len(text) - len(text[place:].lstrip())
            try:
                schema, place = json.JSONDecoder().raw_decode(text, start)
            except (ValueError, RecursionError) as error:
                raise GrammarError(f"what follows %json is not valid JSON: {error}") from None
            check_schema(schema)


def _parse_json(text: str, what: str) -> Any:
    def refuse(constant: str) -> Never:
        raise GrammarError(f"the {what} is not valid JSON: {constant} is not a JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise GrammarError(f"the {what} is nested deeper than {MAX_DEPTH} levels") from None
    except GrammarError:
        raise
    except ValueError as error:
        raise GrammarError(f"the {what} is not valid JSON: {error}") from None


def _choice_grammar(choices: Any) -> str:
    if not isinstance(choices, list) or not choices or not all(isinstance(entry, str) for entry in choices):
        raise GrammarError("choice must be a JSON list of one or more strings")
    if len(choices) > MAX_CHOICES:
        raise GrammarError(f"choice has {len(choices)} entries; at most {MAX_CHOICES} are allowed")
    for entry in choices:
        if not 1 <= len(entry) <= MAX_CHOICE_CHARS:
            raise GrammarError(f"each choice must have 1 to {MAX_CHOICE_CHARS} characters")
    try:
        return "start: " + " | ".join(json.dumps(entry, ensure_ascii=False) for entry in choices).encode().decode()
    except UnicodeEncodeError:
        raise GrammarError("choice: an entry is not valid Unicode text") from None


def _name(spec: GrammarSpec) -> str:
    names = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "Lark grammar"}
    return names.get(spec.kind, str(spec.kind))
