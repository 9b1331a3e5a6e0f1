"""Chat completions of models that do not write their calls as JSON between two markers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tokenizers

from skyline.frontend.async_llm import AsyncLLM
from skyline.server import ServerOptions
from tests.server.conftest import MODEL, FakeEngine, app_client, write_checkpoint

pytestmark = pytest.mark.asyncio
HI: list[Any] = [{"role": "user", "content": "Hi"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "write",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}}},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
ARGUMENTS = {"path": "12\n</b>", "lines": 12}
QWEN3_CODER = (
    "{%- if tools %}{{ tools | tojson }}<tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{%- for call in m.tool_calls or [] %}<tool_call>\n<function={{ call.function.name }}>\n"
    "{%- for key, value in call.function.arguments.items() %}<parameter={{ key }}>\n"
    "{{ value if value is string else value | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_CODER_ANSWER = (
    "I write.\n<tool_call>\n<function=write>\n<parameter=path>\n12\n</b>\n</parameter>\n<parameter=lines>\n12\n"
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>"
)
HARMONY = (
    "{%- for m in messages %}<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
HARMONY_MARKERS = ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"]
HARMONY_ANSWER = (
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I write.<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.write <|constrain|>json<|message|>"
    + json.dumps(ARGUMENTS, ensure_ascii=False)
)
MISTRAL = "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}{# [TOOL_CALLS]name[ARGS] #}"
Make = Callable[[str], openai.AsyncOpenAI]


@pytest.fixture
def served(tmp_path: Path, make_llm: Callable[..., AsyncLLM]) -> Callable[[str], tuple[Any, AsyncLLM]]:
    """(client, llm) of a checkpoint with this chat template, which has harmony's special tokens."""

    def serve(chat_template: str) -> tuple[Any, AsyncLLM]:
        folder = write_checkpoint(tmp_path, chat_template=chat_template)
        file = str(folder / "tokenizer.json")
        backend = tokenizers.Tokenizer.from_file(file)
        backend.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in HARMONY_MARKERS])
        backend.save(file)
        config = json.loads((folder / "config.json").read_text())
        config["vocab_size"] = backend.get_vocab_size()
        (folder / "config.json").write_text(json.dumps(config))
        llm = make_llm(folder)
        return app_client(llm, ServerOptions(api_keys=[])), llm

    return serve


def official(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=client, max_retries=0)


async def answer(api: openai.AsyncOpenAI, stream: bool, **extra: Any) -> dict[str, Any]:
    """Reasoning, content, (name, arguments) of the calls and the reason to finish."""
    request: dict[str, Any] = {"model": MODEL, "messages": HI, **extra}
    if not stream:
        choice = (await api.chat.completions.create(**request)).choices[0]
        message, calls = choice.message, choice.message.tool_calls or []
        return {
            "reasoning": getattr(message, "reasoning_content", None) or "",
            "content": message.content or "",
            "calls": [(call.function.name, call.function.arguments) for call in calls],
            "finish": choice.finish_reason,
        }
    result: dict[str, Any] = {"reasoning": "", "content": "", "calls": [], "finish": None}
    async for chunk in await api.chat.completions.create(**request, stream=True):
        delta = chunk.choices[0].delta
        result["reasoning"] += getattr(delta, "reasoning_content", None) or ""
        result["content"] += delta.content or ""
        result["finish"] = chunk.choices[0].finish_reason or result["finish"]
        for call in delta.tool_calls or []:
            if call.id:
                result["calls"].append((call.function.name, ""))
            name, arguments = result["calls"][call.index]
            result["calls"][call.index] = name, arguments + call.function.arguments
    return result


@pytest.mark.parametrize("stream", [False, True])
async def test_tagged_calls(served: Any, stream: bool) -> None:
    client, llm = served(QWEN3_CODER)
    llm.engine.reply = QWEN3_CODER_ANSWER
    found = await answer(official(client), stream, tools=TOOLS)
    calls = [(name, json.loads(arguments)) for name, arguments in found["calls"]]
    assert calls == [("write", ARGUMENTS), ("now", {})]
    assert (found["content"].strip(), found["finish"]) == ("I write.", "tool_calls")


async def test_tagged_calls_go_back_into_the_template(served: Any) -> None:
    client, llm = served(QWEN3_CODER)
    llm.engine.reply = QWEN3_CODER_ANSWER
    first = await official(client).chat.completions.create(model=MODEL, messages=HI, tools=TOOLS)
    history: Any = [*HI, first.choices[0].message, {"role": "tool", "tool_call_id": "x", "content": "done"}]
    await official(client).chat.completions.create(model=MODEL, messages=history, tools=TOOLS)
    prompt = llm.tokenizer.decode(llm.engine.requests[-1].prompt, skip_special_tokens=False)
    assert "<parameter=path>\n12\n</b>\n</parameter>\n<parameter=lines>\n12\n</parameter>" in prompt


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("skip", [None, True, False])
async def test_harmony(served: Any, stream: bool, skip: bool | None) -> None:
    """Its markers are special tokens: the parser sees them and the client does not, whatever it asks for."""
    client, llm = served(HARMONY)
    llm.engine.reply = HARMONY_ANSWER
    extra = {} if skip is None else {"skip_special_tokens": skip}
    found = await answer(official(client), stream, tools=TOOLS, extra_body=extra)
    [(name, arguments)] = found["calls"]
    assert (name, json.loads(arguments)) == ("write", ARGUMENTS)
    assert (found["reasoning"], found["content"], found["finish"]) == ("Hm.", "I write.", "tool_calls")
    llm.engine.reply = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    found = await answer(official(client), stream, extra_body=extra)
    assert found == {"reasoning": "Hm.", "content": "Yes.", "calls": [], "finish": "stop"}


async def test_harmony_stops_at_its_own_tokens(served: Any) -> None:
    client, llm = served(HARMONY)
    api = official(client)
    await answer(api, False, extra_body={"stop_token_ids": [7]})
    await answer(api, False, extra_body={"ignore_eos": True})
    first, second = (request.params.stop_token_ids for request in llm.engine.requests)
    assert first == [7, llm.tokenizer.token_id("<|call|>"), llm.tokenizer.token_id("<|return|>")]
    assert second == []


async def test_raw_completions_of_a_harmony_model(served: Any) -> None:
    client, llm = served(HARMONY)
    llm.engine.reply = HARMONY_ANSWER
    for skip, text in ((False, HARMONY_ANSWER), (True, None)):
        body = {"prompt": "Hi", "max_tokens": 500, "skip_special_tokens": skip}
        response = await client.post("/v1/completions", json=body)
        found = response.json()["choices"][0]["text"]
        assert found == text if text is not None else "<|" not in found and "analysisHm." in found
        assert llm.engine.requests[-1].params.stop_token_ids == []


@pytest.mark.parametrize(
    ("extra", "header"),
    [
        ({}, ""),
        ({"response_format": {"type": "json_object"}}, "<|channel|>final<|message|>"),
        ({"tools": TOOLS, "tool_choice": "required"}, "<|channel|>final<|message|>"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "write"}}},
            "<|channel|>commentary to=functions.write <|constrain|>json<|message|>",
        ),
    ],
)
async def test_grammars_of_a_harmony_model(served: Any, extra: dict[str, Any], header: str) -> None:
    """A grammar holds from the first token on, so the prompt has to have the header."""
    client, llm = served(HARMONY)
    arguments = '{"path": "a"}'
    required = extra.get("tool_choice") == "required"
    llm.engine.reply = f'[{{"name": "write", "parameters": {arguments}}}]' if required else arguments
    found = await answer(official(client), False, **extra)
    prompt = llm.tokenizer.decode(llm.engine.requests[-1].prompt, skip_special_tokens=False)
    assert prompt == f"<|start|>user<|message|>Hi<|end|><|start|>assistant{header}"
    called = "tool_choice" in extra
    assert found["calls"] == ([("write", arguments)] if called else [])
    assert found["content"] == ("" if called else arguments)


@pytest.mark.parametrize("template", [QWEN3_CODER, MISTRAL])
async def test_forced_calls_are_json_whatever_the_format(served: Any, template: str) -> None:
    client, llm = served(template)
    llm.engine.reply = '[{"name": "now", "parameters": {}}, {"name": "write", "parameters": {"lines": 1}}]'
    found = await answer(official(client), False, tools=TOOLS, tool_choice="required")
    assert found["calls"] == [("now", "{}"), ("write", '{"lines": 1}')]
    assert llm.engine.requests[0].params.grammar.kind == "json_schema"


async def test_mistral_gets_ids_that_its_templates_accept(served: Any) -> None:
    client, llm = served(MISTRAL)
    api = official(client)
    llm.engine.reply = '[TOOL_CALLS]write[ARGS]{"path": "a"}'
    auto = await api.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS)
    llm.engine.reply = '[{"name": "now", "parameters": {}}]'
    forced = await api.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS, tool_choice="required")
    for made in (auto, forced):
        [call] = made.choices[0].message.tool_calls or []
        assert len(call.id) == 9 and call.id.isalnum()


async def test_continuing_a_harmony_message(served: Any) -> None:
    client, llm = served(HARMONY)
    assert isinstance(llm.engine, FakeEngine)
    llm.engine.reply = " is four."
    history = [*HI, {"role": "assistant", "content": "The answer"}]
    for extra in ({}, {"tools": TOOLS}):
        body = {"messages": history, "continue_final_message": True, **extra}
        response = await client.post("/v1/chat/completions", json=body)
        assert response.json()["choices"][0]["message"]["content"] == " is four.", response.text


async def test_arguments_are_text_where_a_template_adds_them_to_others(served: Any) -> None:
    """DeepSeek's templates join them to strings, all others write the object with `tojson`."""
    template = (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}"
        "{{ 'a ' + call['function']['arguments'] + ' b' }} {{ call.function.arguments | tojson }}"
        "{% endfor %}{% endfor %}"
    )
    client, llm = served(template)
    call = {"id": "call_1", "type": "function", "function": {"name": "write", "arguments": json.dumps(ARGUMENTS)}}
    answered: Any = {"role": "tool", "tool_call_id": "call_1", "content": "ok"}
    messages: Any = [*HI, {"role": "assistant", "tool_calls": [call]}, answered]
    await official(client).chat.completions.create(model=MODEL, messages=messages)
    prompt = llm.tokenizer.decode(llm.engine.requests[-1].prompt, skip_special_tokens=False)
    assert prompt == f"a {json.dumps(ARGUMENTS)} b {json.dumps(ARGUMENTS)}"
