"""Plain completions, tokenization and models."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import MODEL, VOCAB, FakeEngine, assert_error

pytestmark = pytest.mark.asyncio


async def test_whole_answer(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.reply = "x" * 40
    answer = await api.completions.create(model=MODEL, prompt="Hi")
    assert answer.choices[0].text == "x" * 16 and answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.prompt_tokens == 2


@pytest.mark.parametrize("prompt", [["ab", "c"], [[64, 65], [66]]])
@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts(client: httpx.AsyncClient, engine: FakeEngine, prompt: Any, stream: bool) -> None:
    engine.reply = lambda request: f"{len(request.prompt)}{request.request_id[-1]}"
    body = {"prompt": prompt, "n": 2, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    response = await client.post("/v1/completions", json=body)
    if stream:
        texts = [""] * 4
        chunks = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
        for chunk in chunks:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["text"]
        usage = chunks[-1]["usage"]
    else:
        texts = [choice["text"] for choice in response.json()["choices"]]
        usage = response.json()["usage"]
    assert texts == ["20", "21", "10", "11"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 12)


async def test_legacy_logprobs(api: openai.AsyncOpenAI) -> None:
    answer = await api.completions.create(model=MODEL, prompt="Hi", logprobs=2, max_tokens=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset) == (["H", "e"], [-0.5, -0.5], [0, 1])
    assert logprobs.top_logprobs is not None and len(logprobs.top_logprobs[0]) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 2])
async def test_echo_with_logprobs(client: httpx.AsyncClient, max_tokens: int, stream: bool) -> None:
    body = {"prompt": "Say", "echo": True, "logprobs": 1, "max_tokens": max_tokens, "stream": stream}
    response = await client.post("/v1/completions", json=body)
    if stream:
        choices = [json.loads(line[6:])["choices"][0] for line in response.text.split("\n\n")[:-2]]
    else:
        choices = response.json()["choices"]
        assert response.json()["usage"]["completion_tokens"] == max_tokens
    assert "".join(choice["text"] for choice in choices) == "Say" + "He"[:max_tokens]
    assert choices[-1]["finish_reason"] == "length"
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    assert tokens == [*"Say", *"He"[:max_tokens]]
    assert offsets == list(range(3 + max_tokens))
    assert choices[0]["logprobs"]["token_logprobs"][0] is None


async def test_models(api: openai.AsyncOpenAI, client: httpx.AsyncClient) -> None:
    [card] = (await api.models.list()).data
    assert card.id == MODEL
    assert (await client.get(f"/v1/models/{MODEL}")).json()["max_model_len"] == 4096
    assert_error(await client.get("/v1/models/other"), 404, MODEL)


async def test_tokenize_and_back(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = (await client.post("/tokenize", json={"prompt": "Hé", "return_token_strs": True})).json()
    assert (answer["count"], answer["max_model_len"], len(answer["token_strs"])) == (3, 4096, 3)
    assert (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json() == {"prompt": "Hé"}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": False}
    answer = (await client.post("/tokenize", json=chat)).json()
    assert answer["tokens"] == engine.encode("<|im_start|>user\nHi<|im_end|>\n")
    assert_error(await client.post("/detokenize", json={"tokens": [VOCAB]}), 400, "tokens")
    assert_error(await client.post("/tokenize", json={}), 400, "prompt or messages")
