"""What is published keeps its flags and loses its keys."""

from __future__ import annotations

import pytest

from skyline.bench.dashboard import redact


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vllm serve m --api-key sk-1 --port 80", "vllm serve m --api-key *** --port 80"),
        ("vllm serve m --api-key=sk-1", "vllm serve m --api-key=***"),
        ("HF_TOKEN=a  OPENAI_API_KEY='b c' serve", "HF_TOKEN=***  OPENAI_API_KEY=*** serve"),
        ("AWS_ACCESS_KEY_ID=a AWS_SECRET_ACCESS_KEY=b x", "AWS_ACCESS_KEY_ID=*** AWS_SECRET_ACCESS_KEY=*** x"),
        ("env DB=postgres://me:pass@host/db serve", "env DB=postgres://***@host/db serve"),
        ("curl -H 'Authorization: Bearer abc' x", "curl -H 'Authorization: Bearer ***' x"),
        ("--max-tokens 100 --tokenizer t --key-cache int8", "--max-tokens 100 --tokenizer t --key-cache int8"),
        ("it's one quote --password p", "it's one quote --password ***"),
        ("--token --verbose", "--token ***"),
        ("", ""),
    ],
)
def test_commands(line: str, expected: str) -> None:
    assert redact.command(line) == expected


def test_an_engine_of_a_specification() -> None:
    args = ["--api-key", "sk", "--threads", "2"]
    spec = {
        "engine": "url",
        "args": args,
        "env": {"SECRET": "s", "OMP_NUM_THREADS": "2"},
        "url": "http://user:word@127.0.0.1:1/v1",
    }
    assert redact.engine(spec) == {
        "engine": "url",
        "args": ["--api-key", "***", "--threads", "2"],
        "env": {"SECRET": "***", "OMP_NUM_THREADS": "2"},
        "url": "http://***@127.0.0.1:1/v1",
    }
    assert args[1] == "sk"
    assert redact.engine({"engine": "vllm"}) == {"engine": "vllm"}
