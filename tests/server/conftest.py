"""A scripted engine behind the real AsyncLLM and the real HTTP server."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tokenizers
import uvicorn
from tokenizers import decoders, models, pre_tokenizers

from skyline.engine.config import EngineConfig
from skyline.engine.messages import EngineOutput, EngineReady, EngineRequest, EngineStats, TokenLogprobs
from skyline.frontend.async_llm import AsyncLLM
from skyline.ipc.client import EngineDeadError, RequestStream
from skyline.server import ServerOptions, create_app
from skyline.server.http import BoundedHttp

MODEL = "test/model"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
EOS = 257  # <|im_end|>
VOCAB = 256 + len(SPECIAL)
MAX_LEN = 4096
TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Write <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n{% endif %}'
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n{% endif %}{% endif %}"
)


def write_checkpoint(folder: Path, *, chat_template: str | None = TEMPLATE) -> Path:
    """One token a byte, and a few special ones: a prompt of n ASCII characters has n tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    order = {char: index for index, char in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=order, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in SPECIAL[:2]])
    backend.add_tokens([tokenizers.AddedToken(text, special=False) for text in SPECIAL[2:]])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"eos_token": "<|im_end|>"}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_LEN,
        "rms_norm_eps": 1e-6,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20, "top_p": 0.95}))
    return folder


class FakeEngine:
    """Stands in for EngineClient: answers every request with `reply`, one token each `delay` seconds."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.ready: EngineReady | None = EngineReady(MAX_LEN, VOCAB, 64, 16, {})
        self.error: str | None = None
        self.stats = EngineStats(blocks_total=64)
        self.encode: Callable[[str], list[int]] = lambda text: []
        self.reply: str | Callable[[EngineRequest], str] = "Hello!"
        self.delay = 0.0
        self.tokens_a_step = 1
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.resets = 0
        self._streams: dict[str, tuple[RequestStream, asyncio.Task[None]]] = {}

    async def start(self) -> None: ...

    async def wait_ready(self) -> EngineReady:
        while self.ready is None:
            if self.error is not None:
                raise EngineDeadError(self.error)
            await asyncio.sleep(0.01)
        return self.ready

    def health(self) -> str | None:
        return self.error

    @property
    def num_unfinished(self) -> int:
        return len(self._streams)

    def submit(self, request: EngineRequest) -> RequestStream:
        self.requests.append(request)
        stream = RequestStream(request.request_id)
        if self.error is not None:
            stream.push(EngineOutput(request.request_id, finish_reason="error", error=self.error))
            return stream
        self._streams[request.request_id] = stream, asyncio.create_task(self._generate(request, stream))
        return stream

    async def _generate(self, request: EngineRequest, stream: RequestStream) -> None:
        text = self.reply if isinstance(self.reply, str) else self.reply(request)
        ids = [*self.encode(text), EOS]
        limit = MAX_LEN - len(request.prompt)
        if request.params.max_tokens is not None:
            limit = min(limit, request.params.max_tokens)
        done = 0
        while True:
            await asyncio.sleep(self.delay)
            if text == "FAIL" and done == 2:
                self._end(request.request_id)
                stream.push(EngineOutput(request.request_id, finish_reason="error", error="the step failed; try again"))
                return
            step = ids[done : min(done + self.tokens_a_step, limit)]
            output = EngineOutput(request.request_id, step, logprobs=self._logprobs(step, request.params.logprobs))
            if done == 0:
                output.cached_tokens = len(request.prompt) // 16 * 16
                if request.params.prompt_logprobs is not None:
                    output.prompt_logprobs = self._logprobs(request.prompt[1:], request.params.prompt_logprobs)
            done += len(step)
            if done == len(ids):
                output.finish_reason, output.stop_token = "stop", EOS
            elif done == limit:
                output.finish_reason = "length"
            if output.finish_reason is not None:
                self._end(request.request_id)
                stream.push(output)
                return
            stream.push(output)

    def _logprobs(self, ids: list[int], count: int | None) -> list[TokenLogprobs] | None:
        if count is None:
            return None
        likely = list(range(65, 65 + count))
        return [TokenLogprobs([token, *likely], [-0.5, *(-1.0 - index for index in range(count))], 1) for token in ids]

    def _end(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            found = self._streams.pop(request_id, None)
            if found is not None:
                found[1].cancel()
                self.aborted.append(request_id)

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def die(self, error: str = "the engine process ended unexpectedly") -> None:
        self.error = error
        streams, self._streams = self._streams, {}
        for stream, task in streams.values():
            task.cancel()
            stream.push(EngineOutput(stream.request_id, finish_reason="error", error=error))

    async def close(self) -> None:
        self.die("closed")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skyline.frontend.async_llm.EngineClient", FakeEngine)


@pytest.fixture
def make_llm(fake_engine: None) -> Callable[..., AsyncLLM]:
    def make(folder: Path, max_queued: int = 4096) -> AsyncLLM:
        llm = AsyncLLM(EngineConfig(model=str(folder)), MODEL, max_queued)
        llm.engine.encode = lambda text: llm.tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
        return llm

    return make


@pytest.fixture
def llm(make_llm: Callable[..., AsyncLLM], checkpoint: Path) -> AsyncLLM:
    return make_llm(checkpoint)


@pytest.fixture
def engine(llm: AsyncLLM) -> FakeEngine:
    engine = llm.engine
    assert isinstance(engine, FakeEngine)
    return engine


@pytest.fixture
def options() -> ServerOptions:
    return ServerOptions(api_keys=[])


@pytest.fixture
def client(llm: AsyncLLM, options: ServerOptions) -> httpx.AsyncClient:
    return app_client(llm, options)


def app_client(llm: AsyncLLM | None, options: ServerOptions) -> httpx.AsyncClient:
    """Requests go straight into the application."""
    transport = httpx.ASGITransport(app=create_app(llm, options))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.fixture
def api(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=client, max_retries=0)


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[str]:
    """A real server on a free port of the loopback interface."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=BoundedHttp, lifespan="off", log_level="error"))
    task = asyncio.create_task(server._serve([listener]))
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        await task


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def assert_error(response: httpx.Response, status: int, mentions: str = "") -> dict[str, Any]:
    """The response is an error in the OpenAI shape."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert mentions in f"{error['message']} {error['param']}", error
    return error


@pytest.fixture(autouse=True)
def no_key_in_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SKYLINE_API_KEY", raising=False)
    yield
