"""A real server through the official client, and what happens when clients, the engine or the server itself go away."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.server import Server, serve


@pytest.fixture(scope="module")
def demo_server(demo_model: Path) -> Iterator[Server]:
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def client(demo_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=demo_server.url + "/v1", api_key="none")


QUESTION = [
    {
        "role": "user",
        "content": "Tom has 12 apples, gives half of them to a friend and then finds 7 more. How many apples does Tom "
        "have now?",
    }
]


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    whole = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    text = whole.choices[0].message.content
    assert text is not None and text.endswith("#### 13") and whole.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_structured_output(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"apples": {"type": "integer", "maximum": 99, "minimum": 0}, "owner": {"enum": ["Tom", "Ann"]}},
        "required": ["apples", "owner"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="skyline-demo",
        messages=QUESTION,
        max_tokens=1500,
        seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
    )
    assert answer.choices[0].finish_reason == "stop"
    value = json.loads(answer.choices[0].message.content or "")
    assert isinstance(value["apples"], int) and value["owner"] in ("Tom", "Ann")


def test_forced_tool_call(client: openai.OpenAI) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"enum": [1, 2, 3]}, "b": {"enum": [4, 5]}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    }
    answer = client.chat.completions.create(
        model="skyline-demo",
        messages=QUESTION,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,  # this model knows no tools, and would call on and on
        max_tokens=1500,
        temperature=0,
    )
    call = (answer.choices[0].message.tool_calls or [])[0]
    assert answer.choices[0].finish_reason == "tool_calls" and call.function.name == "add"
    assert set(json.loads(call.function.arguments)) == {"a", "b"}


def test_a_client_that_leaves_frees_its_blocks(demo_server: Server) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", demo_server.port), timeout=10) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    demo_server.wait_idle(timeout=8)


def test_a_client_that_does_not_read_holds_up_nobody(demo_server: Server) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True, "logprobs": 5}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", demo_server.port))
        slow.sendall(head.encode() + b"\r\n\r\n" + body)
        status, answer = demo_server.post("/v1/completions", {"prompt": "x", "max_tokens": 5, "temperature": 0})
        assert status == 200 and answer["usage"]["completion_tokens"] == 5
    demo_server.wait_idle()


def test_engine_killed(tiny_checkpoint: Path) -> None:
    """Everyone who waits hears of it, /health turns 503, and the server itself stays up to say so."""
    with serve(str(tiny_checkpoint)) as server:
        failures: list[tuple[int, dict]] = []
        body = {"prompt": [5] * 20, "max_tokens": 230, "ignore_eos": True, "n": 64}
        waiting = [
            threading.Thread(target=lambda: failures.append(server.post("/v1/completions", body))) for _ in "abc"
        ]
        for thread in waiting:
            thread.start()
        deadline = time.monotonic() + 30
        while server.metric("skyline_requests_unfinished") < 3 * 64:  # in half a second all may have been answered
            assert time.monotonic() < deadline, "some were answered before the others came in"
            time.sleep(0.01)
        os.kill(server.processes()[1], signal.SIGKILL)
        for thread in waiting:
            thread.join(20)
        assert len(failures) == 3
        assert all(status == 503 and "signal 9" in answer["error"]["message"] for status, answer in failures)
        status, text = server.get("/health")
        assert status == 503 and "signal 9" in text
        assert server.post("/v1/completions", {"prompt": "x"})[0] == 503
        assert server.metric("skyline_engine_up") == 0


def test_sigterm_lets_requests_finish(tiny_checkpoint: Path) -> None:
    with serve(str(tiny_checkpoint)) as server:
        answers: list[tuple[int, dict]] = []
        body = {"prompt": [5] * 20, "max_tokens": 200, "ignore_eos": True, "n": 16}
        thread = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body)))
        thread.start()
        while server.metric("skyline_requests_unfinished") < 16:
            time.sleep(0.01)
        os.kill(server.process.pid, signal.SIGTERM)
        thread.join(30)
        assert answers and answers[0][0] == 200
        assert answers[0][1]["usage"]["completion_tokens"] == 16 * 200
        assert server.process.wait(20) == 0
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            urllib.request.urlopen(server.url + "/health", timeout=5)
