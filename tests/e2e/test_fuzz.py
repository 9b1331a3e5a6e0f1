"""Whatever is sent to any route, the answer is a proper one, and nothing is left behind in the engine."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from tests.e2e.server import Server, serve


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[Server]:
    with serve(str(tiny_checkpoint), "--max-num-seqs", "16", "--num-kv-blocks", "64") as server:
        yield server
        server.wait_idle()
        assert server.get("/health")[0] == 200


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_generated_requests(server: Server, mode: GenerationMode) -> None:
    """From the OpenAPI schema: valid and invalid values of every field of every route."""
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 9

    def check(case: schemathesis.Case) -> None:
        response = case.call(timeout=60)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["message"] and error["type"]

    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # any path is a string, so nothing could be wrong
        run = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        run(given(operation.as_strategy(generation_mode=mode))(check))()


_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 1e308, -1e308, 0.5, "", "x", "\ud800", "\x00",
    "a" * 20000, [], [[]], [None], [[1, 2], [3]], {}, {"type": "json_object"}, {"a": {"b": {"c": []}}}, [{}],
    ["a"] * 300, [1] * 5000,
]  # fmt: skip

_CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
_COMPLETION = {"prompt": "hi", "max_tokens": 3}


@pytest.mark.parametrize("route,body", [("/v1/chat/completions", _CHAT), ("/v1/completions", _COMPLETION)])
def test_every_field_with_every_odd_value(server: Server, route: str, body: dict[str, Any]) -> None:
    """Each field of the request, one after the other, replaced by values of all kinds."""
    document = json.loads(server.get("/openapi.json")[1])
    content = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = _resolve(document, content)["properties"]
    assert len(fields) > 25
    for field in fields:
        for value in _VALUES:
            status, answer = server.post(route, json.dumps({**body, field: value}, ensure_ascii=True).encode())
            assert status in (200, 400, 404, 413, 429), (field, value, status, answer)
            if status != 200:
                assert answer["error"]["message"], (field, value)


def _resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        target: Any = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        schema = target
    return schema


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"messages": NaN}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "hi"}], "seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_broken_bodies(server: Server, raw: bytes) -> None:
    for route in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        status, answer = server.post(route, raw)
        assert 400 <= status < 500, (route, status)
        assert answer["error"]["message"]


def test_random_bytes_on_the_socket(server: Server) -> None:
    """What is not HTTP at all closes the connection, and the server goes on."""
    draw = random.Random(5)
    for _ in range(30):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(draw.randbytes(draw.randrange(1, 3000)))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    assert server.get("/health")[0] == 200
