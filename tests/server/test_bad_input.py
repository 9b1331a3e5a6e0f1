"""Whatever a client sends: a 4xx in the OpenAI shape that names what is wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from skyline.engine.sampling_params import GrammarSpec
from skyline.frontend.async_llm import AsyncLLM
from skyline.server import ServerOptions
from tests.server.conftest import MAX_LEN, MODEL, FakeEngine, app_client, assert_error, write_checkpoint

pytestmark = pytest.mark.asyncio
HI: list[Any] = [{"role": "user", "content": "Hi"}]
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f"}}


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        value = {"properties": {"x": value}}
    return value


COMMON: list[tuple[dict[str, Any], str]] = [
    ({"temperatur": 1}, "did you mean 'temperature'"),
    ({"no_such_thing": 1}, "no_such_thing"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 10**30}, "n"),
    ({"n": True}, "n"),
    ({"n": [1]}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": MAX_LEN + 1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"min_tokens": 9, "max_tokens": 2}, "min_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["a" * 1025]}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"stop_token_ids": [0] * 5000}, "stop_token_ids"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(5000)}}, "logit_bias"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
    ({"bad_words": ["x"] * 300}, "bad_words"),
    ({"bad_words": [""]}, "bad_words"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"nothing": True}}, "nothing"),
    ({"priority": 2**31}, "priority"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"logits_processors": ["os.system"]}, "logits_processors"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": deep(40)}}}, "nested"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_regex": "x" * 200_000}, "guided_regex"),
    ({"guided_grammar": "start: ["}, "guided_grammar"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "only one"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "json_object": True}}, "exactly one"),
    ({"guided_regex": "a+", "ignore_eos": True}, "ignore_eos"),
    ({"model": 5}, "model"),
]
CHAT_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0]"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "colour"),
    ({"messages": [*HI, {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "text only"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": "x" * (MAX_LEN + 1)}]}, "shorten the prompt"),
    ({"messages": [{"role": "user", "content": "x" * 600_000}]}, "cannot fit"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "logprobs=true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [TOOL, TOOL]}, "same name"),
    ({"tools": [TOOL] * 600}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": deep(60)}}]}, "nested"),
    ({"tool_choice": "required"}, "tools"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "'g'"),
    ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "tool_choice"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"prediction": {}}, "prediction"),
    ({"functions": []}, "use tools"),
    ({"function_call": "auto"}, "use tool_choice"),
    ({"echo": True}, "echo"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"chat_template_kwargs": {"messages": []}}, "messages"),
    ({"chat_template_kwargs": {"self": 1}}, "self"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "exclude"),
]
PLAIN_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [2**70]}, "prompt"),
    ({"prompt": ["a"] * 5000}, "prompt"),
    ({"prompt": [1] * MAX_LEN}, "prompt"),
    ({"prompt": ["a"] * 4000, "n": 2}, "at most 4096"),
    ({"prompt": ["a"] * 30, "n": 100, "max_tokens": 4000}, "lower n or max_tokens"),
    ({"prompt": ["a"] * 4000, "guided_regex": "a" * 9000}, "takes a copy"),
    ({"prompt": ["a"] * 200, "allowed_token_ids": [1] * 256, "bad_words": ["x" * 1000] * 256}, "takes a copy"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"max_tokens": 0}, "echo"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"messages": HI}, "messages"),
]


@pytest.mark.parametrize(("fields", "mentions"), COMMON)
@pytest.mark.parametrize("path", [CHAT, PLAIN])
async def test_common_fields(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, fields: dict[str, Any], mentions: str
) -> None:
    body = {"messages": HI} if path == CHAT else {"prompt": "Hi"}
    assert_error(await client.post(path, json={**body, **fields}), 400, mentions)
    assert engine.requests == []


@pytest.mark.parametrize(("fields", "mentions"), CHAT_ONLY)
async def test_chat_fields(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], mentions: str
) -> None:
    assert_error(await client.post(CHAT, json={"messages": HI, **fields}), 400, mentions)
    assert engine.requests == []


@pytest.mark.parametrize(("fields", "mentions"), PLAIN_ONLY)
async def test_completion_fields(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], mentions: str
) -> None:
    assert_error(await client.post(PLAIN, json={"prompt": "Hi", **fields}), 400, mentions)
    assert engine.requests == []


@pytest.mark.parametrize("path", [CHAT, PLAIN, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    ("body", "mentions"),
    [
        (b"", "empty"),
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"5", "object"),
        (b'{"a": NaN}', "JSON"),
        (b'{"a": Infinity}', "JSON"),
        (b'{"a": 1e999}', "JSON"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\\ud800"}', "JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"\\u0000": 1}', "unknown field"),
    ],
)
async def test_malformed_bodies(client: httpx.AsyncClient, path: str, body: bytes, mentions: str) -> None:
    response = await client.post(path, content=body, headers={"content-type": "application/json"})
    assert_error(response, 400, mentions)


async def test_other_refusals(client: httpx.AsyncClient) -> None:
    assert_error(await client.post(CHAT, content=b"{}"), 415, "Content-Type")
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert_error(await client.post(CHAT, content=b"{}", headers=form), 415, "Content-Type")
    gzip = {"content-type": "application/json", "content-encoding": "gzip"}
    assert_error(await client.post(CHAT, content=b"{}", headers=gzip), 415, "Content-Encoding")
    assert_error(await client.get(CHAT), 405, CHAT)
    assert_error(await client.get("/v2/models"), 404, "/v2/models")
    assert_error(await client.post(CHAT, json={"messages": HI, "model": "gpt-4"}), 404, MODEL)
    assert_error(await client.post(CHAT, json={"n": 1}), 400, "messages")


async def test_large_bodies(llm: AsyncLLM) -> None:
    client = app_client(llm, ServerOptions(api_keys=[], max_body_bytes=1000))
    assert_error(await client.post(PLAIN, json={"prompt": "x" * 2000}), 413, "1000 bytes")

    async def parts() -> Any:  # no Content-Length
        for _ in range(10):
            yield b"x" * 200

    response = await client.post(PLAIN, content=parts(), headers={"content-type": "application/json"})
    assert_error(response, 413, "1000 bytes")


async def test_no_chat_template(make_llm: Callable[..., AsyncLLM], tmp_path: Path) -> None:
    client = app_client(make_llm(write_checkpoint(tmp_path, chat_template=None)), ServerOptions(api_keys=[]))
    assert_error(await client.post(CHAT, json={"messages": HI}), 400, "/v1/completions")
    assert (await client.post(PLAIN, json={"prompt": "Hi"})).status_code == 200


async def test_a_template_that_refuses(make_llm: Callable[..., AsyncLLM], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, chat_template="{{ raise_exception('users first') }}")
    client = app_client(make_llm(folder), ServerOptions(api_keys=[]))
    assert_error(await client.post(CHAT, json={"messages": HI}), 400, "users first")


async def test_an_unexpected_error_keeps_its_secrets(
    client: httpx.AsyncClient, llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(llm, "submit", broken)
    error = assert_error(await client.post(PLAIN, json={"prompt": "Hi"}), 500, "internal error")
    assert "secret" not in json.dumps(error)
    assert error["message"].split()[2].rstrip(";") in caplog.text


MEGABYTES = 15_000_000


def many(item: str) -> str:
    return "[" + ",".join([item] * (MEGABYTES // (len(item) + 1))) + "]"


@pytest.mark.parametrize(
    ("fields", "mentions"),
    [
        (f'"messages": {many(json.dumps(HI[0]))}', "objects and lists"),
        (f'"messages": [{{"role": {many("[1]")}, "content": "x"}}]', "objects and lists"),
        (f'"messages": {json.dumps(HI)}, "modalities": {many(chr(34) + "a" + chr(34))}', "modalities"),
        (
            f'"messages": {json.dumps(HI)}, "logit_bias": {json.dumps({f"a{i}": "x" for i in range(800_000)})}',
            "logit_bias",
        ),
    ],
    ids=["messages", "role", "modalities", "logit_bias"],
)
async def test_large_bodies_are_judged_quickly(client: httpx.AsyncClient, fields: str, mentions: str) -> None:
    """While a body is judged, no other request moves on: each of these took seconds when every part was looked at."""
    body = f"{{{fields}}}".encode()
    begin = time.process_time()
    response = await client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert time.process_time() - begin < 2.0
    assert_error(response, 400, mentions)


async def test_brackets_in_text_are_no_containers(client: httpx.AsyncClient) -> None:
    text = '{"a": [1]}\\ ' * 50_000
    response = await client.post("/v1/completions", json={"prompt": text})
    assert_error(response, 400, "cannot fit")


async def test_what_is_slow_is_checked_once_and_in_a_thread(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[tuple[str, bool]] = []

    def check(grammar: GrammarSpec) -> None:
        checked.append((grammar.text, threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr("skyline.frontend.async_llm.validate_grammar", check)
    body = {"prompt": ["a"] * 50, "guided_regex": "once|only", "bad_words": ["x"]}
    assert (await client.post(PLAIN, json=body)).status_code == 200
    assert checked == [("once|only", False)]
    assert len(engine.requests) == 50 and all(request.params.bad_words_token_ids for request in engine.requests)


@pytest.mark.parametrize(
    ("field", "harmless", "asking"),
    [
        ("length_penalty", 1.0, 2.0),
        ("early_stopping", False, True),
        ("spaces_between_special_tokens", True, False),
        ("include_reasoning", True, False),
        ("cache_prompt", True, False),
        ("use_beam_search", False, True),
    ],
)
async def test_habits_of_other_engines_clients(
    client: httpx.AsyncClient, field: str, harmless: object, asking: object
) -> None:
    """A value that changes nothing is taken; one that asks for something is refused rather than ignored."""
    body = {"messages": HI, "max_tokens": 1}
    assert (await client.post(CHAT, json={**body, field: harmless})).status_code == 200
    assert_error(await client.post(CHAT, json={**body, field: asking}), 400, field)
