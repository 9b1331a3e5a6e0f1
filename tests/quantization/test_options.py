"""The option's way from the command line to the engine's settings."""

from __future__ import annotations

import typing

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from skyline.cli import app, console
from skyline.engine.config import EngineConfig, Quantization
from skyline.quantization import SCHEMES


def test_every_scheme_can_be_asked_for() -> None:
    assert {*SCHEMES, "none"} == set(typing.get_args(Quantization))


def test_settings() -> None:
    config = EngineConfig(model="m")
    assert config.quantization is None and config.quantization_group == 64
    for group in (32, 64, 128):
        EngineConfig(model="m", quantization="int4", quantization_group=group).validate()
    for group in (0, 16, 48, 256):
        with pytest.raises(ValueError, match=f"quantization_group must be 32, 64 or 128, not {group}"):
            EngineConfig(model="m", quantization_group=group).validate()
    with pytest.raises(msgspec.ValidationError, match="quantization"):
        msgspec.convert({"model": "m", "quantization": "int3"}, EngineConfig)


@pytest.mark.parametrize("command", ["serve", "generate", "chat", "explain"])
def test_commands_pass_it_on(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def record(model: str | None, **fields: object) -> typing.NoReturn:
        given.update(fields)
        raise typer.Exit(7)

    monkeypatch.setattr(console, "engine_config", record)
    result = CliRunner().invoke(app, [command, "m", "--quantization", "int4", "--quantization-group", "32"])
    assert result.exit_code == 7, result.output
    assert given["quantization"] == "int4" and given["quantization_group"] == 32
    given.clear()
    assert CliRunner().invoke(app, [command, "m"]).exit_code == 7
    assert given["quantization"] is None and given["quantization_group"] == 64


def test_commands_refuse_what_there_is_not() -> None:
    result = CliRunner().invoke(app, ["explain", "m", "--quantization", "int3"])
    assert result.exit_code == 2 and "int8-weight-only" in result.output
    result = CliRunner().invoke(app, ["explain", "m", "--quantization-group", "48"])
    assert result.exit_code == 1 and "32, 64 or 128" in result.output
