"""Chat completions, through the official client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pydantic
import pytest

from tests.server.conftest import MODEL, FakeEngine, assert_error

pytestmark = pytest.mark.asyncio
HI: list[Any] = [{"role": "user", "content": "Hi"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers",
            "parameters": {
                "type": "object",
                "properties": {"a": {"$ref": "#/$defs/num"}, "b": {"type": "number"}},
                "required": ["a", "b"],
                "$defs": {"num": {"type": "number"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
CALLS = (
    'Let me see.<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>\n'
    '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
)


async def test_whole_answer(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    answer = await api.chat.completions.create(model=MODEL, messages=HI)
    assert answer.choices[0].message.content == "Hello!"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    assert answer.usage is not None
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert engine.requests[0].prompt == engine.encode(prompt)
    assert answer.usage.prompt_tokens == len(engine.encode(prompt))
    assert answer.usage.completion_tokens == 7  # with EOS
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 16


async def test_defaults_come_from_the_checkpoint(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    await api.chat.completions.create(model=MODEL, messages=HI)
    await api.chat.completions.create(model=MODEL, messages=HI, temperature=0.0, top_p=1.0, max_completion_tokens=3)
    default, explicit = (request.params for request in engine.requests)
    assert (default.temperature, default.top_k, default.top_p, default.max_tokens) == (0.6, 20, 0.95, None)
    assert (explicit.temperature, explicit.top_k, explicit.top_p, explicit.max_tokens) == (0.0, 20, 1.0, 3)


async def test_every_sampling_field_arrives(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    extra = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [7],
        "bad_words": ["no"],
        "allowed_token_ids": [1, 2],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "priority": -3,
        "cache_salt": "s",
    }
    await api.chat.completions.create(
        model=MODEL,
        messages=HI,
        seed=4,
        stop="zzz",
        logit_bias={"5": -100},
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        max_tokens=9,
        extra_body=extra,
    )
    request = engine.requests[0]
    params = request.params
    for name, value in extra.items():
        if name not in ("priority", "cache_salt"):
            assert getattr(params, name) == value, name
    assert (params.seed, params.stop, params.logit_bias, params.max_tokens) == (4, ["zzz"], {5: -100.0}, 9)
    assert (params.presence_penalty, params.frequency_penalty) == (0.5, -0.5)
    assert (request.priority, request.cache_salt) == (-3, ":s")


@pytest.mark.parametrize("n", [1, 3])
async def test_stream(api: openai.AsyncOpenAI, n: int) -> None:
    stream = await api.chat.completions.create(
        model=MODEL, messages=HI, stream=True, n=n, stream_options={"include_usage": True}
    )
    texts, roles, reasons, usage = [""] * n, [""] * n, [""] * n, None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role or ""
            reasons[choice.index] += choice.finish_reason or ""
    assert texts == ["Hello!"] * n
    assert roles == ["assistant"] * n
    assert reasons == ["stop"] * n
    assert usage is not None and usage.completion_tokens == 7 * n


async def test_raw_events(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": HI, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert "usage" not in events[0]


async def test_continuous_usage(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": HI, "stream": True, "stream_options": options}
    response = await client.post("/v1/chat/completions", json=body)
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 7


async def test_n_choices_with_a_seed(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    answer = await api.chat.completions.create(model=MODEL, messages=HI, n=2, seed=10)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [request.params.seed for request in engine.requests] == [10, 11]


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string(client: httpx.AsyncClient, engine: FakeEngine, stream: bool) -> None:
    body = {"messages": HI, "stop": ["lo"], "stream": stream}
    response = await client.post("/v1/chat/completions", json=body)
    if stream:
        choices = [json.loads(line[6:])["choices"][0] for line in response.text.split("\n\n")[:-2]]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == "Hel"
        last = choices[-1]
    else:
        last = response.json()["choices"][0]
        assert last["message"]["content"] == "Hel"
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "lo")
    assert engine.num_unfinished == 0


async def test_logprobs(api: openai.AsyncOpenAI) -> None:
    answer = await api.chat.completions.create(model=MODEL, messages=HI, logprobs=True, top_logprobs=2, max_tokens=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == ["H", "e", "l"]
    assert logprobs.content[0].bytes == [72]
    assert [top.logprob for top in logprobs.content[0].top_logprobs] == [-1.0, -2.0]
    assert answer.choices[0].finish_reason == "length"


async def test_streamed_logprobs(api: openai.AsyncOpenAI) -> None:
    tokens = []
    stream = await api.chat.completions.create(model=MODEL, messages=HI, logprobs=True, stream=True)
    async for chunk in stream:
        assert chunk.choices[0].logprobs is not None
        tokens += [entry.token for entry in chunk.choices[0].logprobs.content or []]
    assert tokens == [*"Hello!", "<|im_end|>"]


async def test_prompt_logprobs(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": HI, "prompt_logprobs": 1})
    answer = response.json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert answer["prompt_logprobs"][0] is None
    assert {"logprob", "rank", "decoded_token"} == set(next(iter(answer["prompt_logprobs"][1].values())))


async def test_reasoning(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.reply = "<think>Two and two.</think>Four."
    message = (await api.chat.completions.create(model=MODEL, messages=HI)).choices[0].message
    assert message.content == "Four."
    assert message.reasoning_content == message.reasoning == "Two and two."  # type: ignore[attr-defined]
    usage = (await api.chat.completions.create(model=MODEL, messages=HI)).usage
    assert usage is not None and usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == 14
    thought = text = ""
    async for chunk in await api.chat.completions.create(model=MODEL, messages=HI, stream=True):
        text += chunk.choices[0].delta.content or ""
        thought += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
    assert (thought, text) == ("Two and two.", "Four.")


async def test_reasoning_goes_back_into_the_template(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    history = [*HI, {"role": "assistant", "content": "Four.", "reasoning": "2+2"}, *HI]
    await api.chat.completions.create(model=MODEL, messages=history, reasoning_effort="none")
    text = "<|im_start|>assistant\n<think>2+2</think>Four.<|im_end|>"
    prompt, turn = engine.requests[0].prompt, engine.encode(text)
    assert any(prompt[start : start + len(turn)] == turn for start in range(len(prompt)))
    assert prompt[-5:] == engine.encode("<think>\n\n</think>\n")


@pytest.mark.parametrize("parallel", [True, False])
async def test_tool_calls(api: openai.AsyncOpenAI, engine: FakeEngine, parallel: bool) -> None:
    engine.reply = CALLS
    request: dict[str, Any] = {"model": MODEL, "messages": HI, "tools": TOOLS, "parallel_tool_calls": parallel}
    choice = (await api.chat.completions.create(**request)).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content or "").strip() == "Let me see."
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    assert calls == [("add", '{"a": 1, "b": 2}'), ("now", "{}")][: 2 if parallel else 1]

    streamed: dict[int, list[str]] = {}
    reason = None
    async for chunk in await api.chat.completions.create(**request, stream=True):
        reason = chunk.choices[0].finish_reason or reason
        for call in chunk.choices[0].delta.tool_calls or []:
            if call.id:
                streamed[call.index] = [call.function.name, ""]
            streamed[call.index][1] += call.function.arguments
    assert [tuple(call) for call in streamed.values()] == calls
    assert reason == "tool_calls"


async def test_tools_are_left_alone_when_nobody_asked(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.reply = CALLS
    for extra in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        message = (await api.chat.completions.create(model=MODEL, messages=HI, **extra)).choices[0].message  # type: ignore[call-overload]
        assert message.content == CALLS and not message.tool_calls


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("named", [False, True])
async def test_forced_calls(api: openai.AsyncOpenAI, engine: FakeEngine, named: bool, stream: bool) -> None:
    arguments = '{"a": 1, "b": "}{\\""}'
    choice: Any = {"type": "function", "function": {"name": "add"}} if named else "required"
    engine.reply = arguments if named else f'[{{"name": "add", "parameters": {arguments}}}]'
    request: dict[str, Any] = {"model": MODEL, "messages": HI, "tools": TOOLS, "tool_choice": choice}
    if stream:
        name = text = ""
        async for chunk in await api.chat.completions.create(**request, stream=True):
            for call in chunk.choices[0].delta.tool_calls or []:
                name += call.function.name or ""
                text += call.function.arguments
    else:
        answer = (await api.chat.completions.create(**request)).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        [whole] = answer.message.tool_calls or []
        name, text = whole.function.name, whole.function.arguments
    assert (name, json.loads(text)) == ("add", json.loads(arguments))
    grammar = engine.requests[0].params.grammar
    assert grammar is not None and grammar.kind == "json_schema"
    schema = json.loads(grammar.text)
    if not named:
        assert schema["items"]["anyOf"][0]["properties"]["parameters"]["properties"]["a"]["$ref"] == "#/$defs/0.num"
        assert schema["$defs"]["0.num"] == {"type": "number"}


async def test_a_history_with_tools(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.reply = CALLS
    first = await api.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS)
    message = first.choices[0].message.model_dump()
    history: list[Any] = [
        *HI,
        message,
        {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "3"},
    ]
    engine.reply = "Three."
    answer = await api.chat.completions.create(model=MODEL, messages=history, tools=TOOLS)
    assert answer.choices[0].message.content == "Three."


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
            "json_schema",
            '{"type": "object"}',
        ),
        ({"structured_outputs": {"regex": "[ab]+"}}, "regex", "[ab]+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a", "b"]'),
        ({"structured_outputs": {"json": {"type": "object"}}}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
        ({"guided_json": '{"type": "object"}'}, "json_schema", '{"type": "object"}'),
        ({"guided_regex": "a|b"}, "regex", "a|b"),
        ({"guided_choice": ["é"]}, "choice", '["é"]'),
        ({"guided_grammar": 'start: "a"'}, "lark", 'start: "a"'),
    ],
)
async def test_structured_output(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], kind: str, text: str
) -> None:
    for path, prompt in (("chat/completions", {"messages": HI}), ("completions", {"prompt": "Hi"})):
        response = await client.post(f"/v1/{path}", json={**prompt, **fields})
        assert response.status_code == 200, response.text
        grammar = engine.requests[-1].params.grammar
        assert grammar is not None and (grammar.kind, grammar.text) == (kind, text)


async def test_roles_and_parts(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    messages = [
        {"role": "developer", "content": "Be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert (await client.post("/v1/chat/completions", json={"messages": messages})).status_code == 200
    expected = "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"
    assert engine.requests[0].prompt == engine.encode(expected)


async def test_continue_final_message(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    messages = [*HI, {"role": "assistant", "content": "The answer"}]
    body = {"messages": messages, "continue_final_message": True}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert engine.requests[0].prompt[-len("The answer") :] == engine.encode("The answer")


async def test_failure_of_one_request(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.reply = "FAIL"
    assert_error(await client.post("/v1/chat/completions", json={"messages": HI}), 500, "the step failed")
    response = await client.post("/v1/chat/completions", json={"messages": HI, "stream": True})
    events = response.text.split("\n\n")
    assert json.loads(events[-3][6:])["error"]["message"] == "the step failed; try again"
    assert events[-2] == "data: [DONE]"
    engine.reply = lambda request: "FAIL" if request.request_id.endswith("-0") else "x" * 1000
    engine.delay = 0.001
    assert_error(await client.post("/v1/chat/completions", json={"messages": HI, "n": 3}), 500)
    assert engine.num_unfinished == 0 and len(engine.aborted) == 2


class Answer(pydantic.BaseModel):
    unit: str
    value: int


@pytest.mark.parametrize("stream", [False, True])
async def test_parsed_answers_go_back_into_the_conversation(
    api: openai.AsyncOpenAI, engine: FakeEngine, stream: bool
) -> None:
    """The openai client's parse() and stream() helpers; what they return is sent back with fields of their own."""
    engine.reply = '{"unit": "apples", "value": 7}'
    arguments: dict[str, Any] = {"model": MODEL, "messages": HI, "response_format": Answer}
    if stream:
        async with api.chat.completions.stream(**arguments) as events:
            completion = await events.get_final_completion()
    else:
        completion = await api.chat.completions.parse(**arguments)
    message = completion.choices[0].message
    assert message.parsed == Answer(unit="apples", value=7)
    engine.reply = '[{"name": "Answer", "parameters": {"unit": "pears", "value": 1}}]'
    calling = await api.chat.completions.parse(
        model=MODEL,
        messages=[*HI, message, *HI],  # type: ignore[list-item]
        tools=[openai.pydantic_function_tool(Answer)],
        tool_choice="required",
    )
    assert calling.choices[0].finish_reason == "tool_calls"
    call = calling.choices[0].message.tool_calls[0]  # type: ignore[index]
    assert call.function.parsed_arguments == Answer(unit="pears", value=1)
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    engine.reply = "Done."
    last = await api.chat.completions.create(
        model=MODEL,
        messages=[*HI, calling.choices[0].message, result],  # type: ignore[list-item]
    )
    assert last.choices[0].message.content == "Done."
