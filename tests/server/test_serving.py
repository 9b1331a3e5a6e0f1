"""Authentication, clients that leave or do not read, overload, a dying engine, metrics, and the whole server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from skyline.engine.config import EngineConfig
from skyline.engine.messages import EngineReady, EngineStats
from skyline.frontend.async_llm import AsyncLLM
from skyline.server import ServerOptions, ServerStartError, create_app, serve
from skyline.server.app import create_admin_app
from tests.server.conftest import FakeEngine, app_client, assert_error, listening, until

pytestmark = pytest.mark.asyncio
CHAT = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


def routes(app: FastAPI) -> list[tuple[str, str]]:
    found = []
    for path, item in app.openapi()["paths"].items():
        found += [(method.upper(), path.replace("{model_id}", "x")) for method in item]
    return found


async def test_every_route_but_health_asks_for_the_key(llm: AsyncLLM) -> None:
    options = ServerOptions(api_keys=["first", "second"])
    app = create_app(llm, options)
    expected = {
        CHAT,
        "/v1/completions",
        "/v1/models",
        "/v1/models/x",
        "/tokenize",
        "/detokenize",
        "/metrics",
        "/version",
    }
    assert {path for _, path in routes(app)} == expected | {"/health"}
    client = app_client(llm, options)
    for method, path in [*routes(app), ("GET", "/openapi.json"), ("GET", "/nowhere"), ("DELETE", "/health/")]:
        if path == "/health":
            assert (await client.request(method, path)).status_code == 200
            continue
        for header in (None, "Bearer ", "Bearer wrong", "Basic first", "first"):
            response = await client.request(method, path, headers={"authorization": header} if header else {})
            assert_error(response, 401, "API key")
    for key in ("first", "second"):
        response = await client.post(CHAT, json=HI, headers={"authorization": f"Bearer {key}"})
        assert response.status_code == 200
    engine = llm.engine
    assert isinstance(engine, FakeEngine)
    salts = {request.cache_salt for request in engine.requests}
    assert len(salts) == 2 and not any("first" in salt for salt in salts)  # tenants share no cached prefix


async def test_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYLINE_API_KEY", "k")
    assert ServerOptions().api_keys == ["k"]


async def test_admin_routes_are_elsewhere(llm: AsyncLLM, engine: FakeEngine) -> None:
    app = create_app(llm, ServerOptions(api_keys=["k"]))
    key = {"authorization": "Bearer k"}
    assert_error(await app_client(llm, ServerOptions(api_keys=[])).post("/reset_prefix_cache"), 404)
    transport = httpx.ASGITransport(app=create_admin_app(app.state.service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as admin:
        assert_error(await admin.post("/reset_prefix_cache"), 401)
        assert (await admin.post("/reset_prefix_cache", headers=key)).status_code == 200
    assert engine.resets == 1


async def test_cors_is_off_by_default(llm: AsyncLLM) -> None:
    headers = {"origin": "http://a.example", "access-control-request-method": "POST"}
    for origins, allowed in (([], None), (["http://a.example"], "http://a.example")):
        client = app_client(llm, ServerOptions(api_keys=["k"], allowed_origins=origins))
        response = await client.options(CHAT, headers=headers)
        assert response.headers.get("access-control-allow-origin") == allowed


async def test_loading(llm: AsyncLLM, engine: FakeEngine) -> None:
    ready, engine.ready = engine.ready, None
    for client in (app_client(llm, ServerOptions(api_keys=[])), app_client(None, ServerOptions(api_keys=[]))):
        assert assert_error(await client.get("/health"), 503, "loading")["code"] == "loading"
        response = await client.post(CHAT, json=HI)
        assert_error(response, 503, "loading")
        assert int(response.headers["retry-after"]) > 0
        assert (await client.get("/version")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
    engine.ready = ready


async def test_a_stalled_engine(llm: AsyncLLM, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "health", lambda: "a step has been running for 130 s")
    client = app_client(llm, ServerOptions(api_keys=[]))
    response = await client.get("/health")
    assert assert_error(response, 503, "a step has been running")["code"] == "engine_stalled"
    assert int(response.headers["retry-after"]) > 0
    assert "skyline_engine_up 0.0" in (await client.get("/metrics")).text


async def test_overload(llm: AsyncLLM, engine: FakeEngine) -> None:
    llm.max_queued = 2
    engine.delay = 0.05
    client = app_client(llm, ServerOptions(api_keys=[]))
    first = asyncio.create_task(client.post(CHAT, json={**HI, "n": 2}))
    await until(lambda: engine.num_unfinished == 2)
    response = await client.post(CHAT, json=HI)
    assert_error(response, 429, "try again")
    assert "retry-after" in response.headers
    assert_error(await client.post(CHAT, json={**HI, "n": 3}), 400, "at most 2")
    assert (await first).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_disconnect_frees(llm: AsyncLLM, engine: FakeEngine, stream: bool, n: int) -> None:
    engine.reply, engine.delay = "x" * 4000, 0.005
    app = create_app(llm, ServerOptions(api_keys=[]))
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as client:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await client.post(CHAT, json={**HI, "stream": stream, "n": n})
        await until(lambda: engine.num_unfinished == 0)
        assert len(engine.aborted) == n
        text = (await client.get("/metrics")).text
        assert f'skyline_requests_finished_total{{finish_reason="abort"}} {n}.0' in text


async def test_disconnect_before_the_first_token(llm: AsyncLLM, engine: FakeEngine) -> None:
    engine.delay = 60
    app = create_app(llm, ServerOptions(api_keys=[]))
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as client:
        for body in (False, True):
            with contextlib.suppress(httpx.TimeoutException):
                await client.post("/v1/completions", json={"prompt": ["a", "b"], "stream": body}, timeout=1.0)
        await until(lambda: engine.num_unfinished == 0)
    assert len(engine.aborted) == 4


async def test_a_client_that_does_not_read(llm: AsyncLLM, engine: FakeEngine) -> None:
    """Its updates pile up merged in one place; others go on, and it gets everything when it reads at last."""
    engine.reply = "x" * 4000
    app = create_app(llm, ServerOptions(api_keys=[]))
    async with listening(app) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        host, port = url.removeprefix("http://").split(":")
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(slow, (host, int(port)))
        body = b'{"prompt": "a", "max_tokens": 4000, "logprobs": 5, "stream": true}'
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        await loop.sock_sendall(slow, head.encode() + b"\r\nConnection: close\r\n\r\n" + body)
        await until(lambda: len(engine.requests) == 1 and engine.num_unfinished == 0, 20)
        assert (await client.post(CHAT, json=HI)).status_code == 200
        received = b""
        while part := await loop.sock_recv(slow, 1 << 20):
            received += part
        slow.close()
    assert received.count(b'"text":"') >= 1 and b"[DONE]" in received
    texts = [part.split(b'"', 1)[0] for part in received.split(b'"text":"')[1:]]
    assert sum(map(len, texts)) == 4000


@pytest.mark.parametrize("stream", [False, True])
async def test_engine_death_reaches_everyone(llm: AsyncLLM, engine: FakeEngine, stream: bool) -> None:
    engine.delay, engine.reply = 0.02, "x" * 1000
    client = app_client(llm, ServerOptions(api_keys=[]))
    waiting = [asyncio.create_task(client.post(CHAT, json={**HI, "stream": stream})) for _ in range(3)]
    await until(lambda: engine.num_unfinished == 3)
    await asyncio.sleep(0.1)
    engine.die()
    for task in waiting:
        response = await task
        if stream:
            assert '"code":"engine_dead"' in response.text and response.text.endswith("data: [DONE]\n\n")
        else:
            assert_error(response, 503, "engine")
    assert_error(await client.get("/health"), 503, "ended unexpectedly")
    assert_error(await client.post(CHAT, json=HI), 503, "ended unexpectedly")
    assert "skyline_engine_up 0.0" in (await client.get("/metrics")).text


async def test_metrics(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.stats = EngineStats(
        running=3, waiting=2, blocks_total=64, blocks_held=10, blocks_cached=4, preemptions=5, aborted=6,
        prefix_queried_tokens=100, prefix_hit_tokens=40, prompt_tokens=70, generated_tokens=80, steps=9,
        step_seconds=1.5, decode_recorded=7, decode_replayed=30, decode_eager=4,
        prompts_recorded=3, prompts_replayed=20, prompts_eager=9,
    )  # fmt: skip
    await client.post(CHAT, json=HI)
    await client.post(CHAT, json={**HI, "n": 0})
    text = (await client.get("/metrics")).text
    for line in (
        "skyline_requests_running 3.0",
        "skyline_requests_waiting 2.0",
        'skyline_kv_blocks{state="held"} 10.0',
        'skyline_kv_blocks{state="cached"} 4.0',
        'skyline_kv_blocks{state="free"} 50.0',
        "skyline_kv_blocks_capacity 64.0",
        "skyline_prefix_cache_queried_tokens_total 100.0",
        "skyline_prefix_cache_hit_tokens_total 40.0",
        "skyline_preemptions_total 5.0",
        "skyline_aborts_total 6.0",
        "skyline_prompt_tokens_total 70.0",
        "skyline_generated_tokens_total 80.0",
        "skyline_engine_steps_total 9.0",
        "skyline_decode_sizes_recorded 7.0",
        'skyline_decode_steps_total{mode="replayed"} 30.0',
        'skyline_decode_steps_total{mode="call by call"} 4.0',
        "skyline_prompt_sizes_recorded 3.0",
        'skyline_prompt_steps_total{mode="replayed"} 20.0',
        'skyline_prompt_steps_total{mode="call by call"} 9.0',
        "skyline_engine_step_seconds_total 1.5",
        'skyline_requests_finished_total{finish_reason="stop"} 1.0',
        'skyline_request_errors_total{code="400"} 1.0',
        "skyline_time_to_first_token_seconds_count 1.0",
        "skyline_inter_token_latency_seconds_count 6.0",
        "skyline_request_latency_seconds_count 1.0",
    ):
        assert line in text.splitlines(), line
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# HELP")}
    assert names == {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}


async def test_openapi_describes_every_body(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    schema = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/ChatRequest"}
    assert "messages" in document["components"]["schemas"]["ChatRequest"]["required"]
    for path in document["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]


@pytest.fixture
def running(fake_engine: None, checkpoint: Path) -> Any:
    """`serve` in this process, and what it called back."""
    calls: dict[str, Any] = {}

    def on_ready(ready: EngineReady, seconds: float) -> None:
        calls["ready"] = seconds

    def on_listening(host: str, port: int) -> None:
        calls["url"] = f"http://{host}:{port}"

    def start(**options: Any) -> asyncio.Task[None]:
        return asyncio.create_task(
            serve(
                EngineConfig(model=str(checkpoint)),
                ServerOptions(api_keys=[], port=0, **options),
                on_ready=on_ready,
                on_listening=on_listening,
            )
        )

    return start, calls


async def test_sigterm_drains(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start, calls = running
    engines: list[FakeEngine] = []
    original = FakeEngine.__init__

    def init(self: FakeEngine, config: EngineConfig) -> None:
        original(self, config)
        self.encode, self.reply, self.delay = (lambda text: [64] * len(text)), "x" * 200, 0.01
        engines.append(self)

    monkeypatch.setattr(FakeEngine, "__init__", init)
    server = start(drain_timeout=0.5)
    await until(lambda: "ready" in calls)
    async with httpx.AsyncClient(base_url=calls["url"], timeout=20) as client:
        short = asyncio.create_task(client.post("/v1/completions", json={"prompt": "a", "max_tokens": 10}))
        long = asyncio.create_task(client.post(CHAT, json=HI))
        streamed = asyncio.create_task(client.post(CHAT, json={**HI, "stream": True}))
        await until(lambda: engines[0].num_unfinished == 3)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await short).status_code == 200
        assert_error(await long, 503, "shutting down")
        assert '"code":"draining"' in (await streamed).text
    await asyncio.wait_for(server, 10)
    assert len(engines[0].aborted) == 2 and engines[0].error == "closed"


async def test_a_port_in_use(running: Any, checkpoint: Path, fake_engine: None) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = ServerOptions(api_keys=[], port=taken.getsockname()[1])
        with pytest.raises(ServerStartError, match="in use"):
            await serve(EngineConfig(model=str(checkpoint)), options)


async def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="nothing"):
        await serve(EngineConfig(model=str(tmp_path / "nothing")), ServerOptions(api_keys=[], port=0))
