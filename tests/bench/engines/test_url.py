"""Endpoints that already run."""

from __future__ import annotations

import socket
import time

import pytest

from skyline.bench.engines import EngineError, serve
from skyline.bench.suite import EngineSpec, ModelSpec
from tests.bench.engines.conftest import Start

MODEL = ModelSpec(name="fake", source="fake-model")


def _attach(url: str, **fields: object):  # type: ignore[no-untyped-def]
    spec = EngineSpec.model_validate({"engine": "url", "url": url, "start_timeout_s": 5, **fields})
    return serve(spec, MODEL, log=None)  # type: ignore[arg-type]


def test_what_runs_is_used_and_left_running(start: Start) -> None:
    with start() as server:
        for url in (server.url, server.url + "/", server.url + "/v1", server.url + "/v1/"):
            with _attach(url) as endpoint:
                assert endpoint.url == server.url and endpoint.model == "fake-model"
                assert endpoint.version == "1.2.3"
                assert endpoint.ignore_eos == {"ignore_eos": True}
                assert endpoint.command is None and endpoint.startup_s is None and endpoint.facts() is None
                assert endpoint.alive() is None
                counters = endpoint.cache_counters()
                assert counters is not None and counters[1] == 4
        assert server.alive() is None


def test_a_server_that_refuses_ignore_eos_is_asked_in_other_ways(start: Start) -> None:
    with start("--strict", "ignore_eos") as server, _attach(server.url) as endpoint:
        assert list(endpoint.ignore_eos) == ["generation_config"]
    with start("--strict", "ignore_eos,generation_config") as server, _attach(server.url) as endpoint:
        assert endpoint.ignore_eos == {}


def test_an_unreachable_one_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"url: http://127.0.0.1:\d+ cannot be reached: Connection refused"):
        _attach(f"http://127.0.0.1:{port}").__enter__()
    assert time.monotonic() - began < 3


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(EngineError, match="cannot be reached"):
        _attach("http://skyline-test.invalid").__enter__()


def test_one_that_never_answers_ends_with_the_timeout() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(EngineError, match=r"cannot be reached: no answer within 1 s"),
    ):
        _attach(f"http://127.0.0.1:{silent.getsockname()[1]}", start_timeout_s=1).__enter__()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", ""])
def test_no_address(url: str) -> None:
    with pytest.raises(EngineError, match="is not the address of an endpoint"):
        _attach(url).__enter__()


def test_a_wrong_model_name(start: Start) -> None:
    with start() as server, pytest.raises(EngineError, match="serves no model 'gpt', it lists fake-model, other"):
        _attach(server.url, served_model="gpt").__enter__()


def test_the_key_comes_from_a_variable(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with start() as plain:
        with pytest.raises(EngineError, match="MY_KEY is to hold the endpoint's key, and is not set"):
            _attach(plain.url, api_key_env="MY_KEY").__enter__()
        monkeypatch.setenv("MY_KEY", "sesame\n")
        with _attach(plain.url, api_key_env="MY_KEY") as endpoint:
            assert endpoint.headers == {"Authorization": "Bearer sesame"}


def test_a_wrong_key_is_named_by_its_variable_only(locked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"refuses a request without a key .give api_key_env.: HTTP 401: wrong key"):
        _attach(locked).__enter__()
    monkeypatch.setenv("MY_KEY", "wrong-secret")
    with pytest.raises(EngineError, match="refuses the key in MY_KEY") as error:
        _attach(locked, api_key_env="MY_KEY").__enter__()
    assert "wrong-secret" not in str(error.value)
    monkeypatch.setenv("MY_KEY", "sesame")
    with _attach(locked, api_key_env="MY_KEY") as endpoint:
        assert endpoint.model == "fake-model"


def test_one_that_loads_is_waited_for_but_not_for_ever(loading: str) -> None:
    with pytest.raises(EngineError, match=r"still says after 0.5 s that it is loading"):
        _attach(loading, start_timeout_s=0.5).__enter__()
    with _attach(loading, start_timeout_s=30) as endpoint:
        assert endpoint.model == "fake-model"
