"""The commands as a user runs them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import typer

from skyline.checkpoint import Tokenizer
from skyline.cli.options import parse_bytes
from skyline.cli.serve import EXAMPLE


def skyline(*arguments: str, stdin: str = "", timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "skyline", *arguments]
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, env=environment)


def one_red_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error of a command that failed as it should."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


@pytest.mark.parametrize("command", ["serve", "generate", "chat", "explain", "eval", "version"])
def test_every_command_has_help(command: str) -> None:
    done = skyline(command, "--help")
    assert done.returncode == 0
    assert "Usage: " in done.stdout


def test_help_lists_the_commands_and_imports_little() -> None:
    program = "import sys; sys.argv = ['skyline', '--help']\nfrom skyline.cli import main\ntry: main()\n"
    program += "finally: print(sorted({'torch', 'fastapi', 'zmq', 'tokenizers', 'asyncio'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines()[-1] == "[]", "the start of every command would wait for these imports"
    assert all(command in done.stdout for command in ("serve", "generate", "chat", "explain", "eval", "version"))


def test_version_does_not_import_torch() -> None:
    done = skyline("version")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["skyline", "python", "torch"]


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GiB", 4 << 30), ("4gib", 4 << 30), ("1.5 MiB", 3 << 19), ("2GB", 2 * 10**9), ("2G", 2 * 10**9), ("4096", 4096)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4 XiB", "1e9", "4GiBB", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="4GiB"):
        parse_bytes(text)


def test_generate_streams_the_same_from_option_and_standard_input(tiny_checkpoint: Path) -> None:
    settings = ("--max-tokens", "12", "--temperature", "0", "--ignore-eos", "--threads", "1")
    done = skyline("generate", str(tiny_checkpoint), "--prompt", "The quick", *settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert skyline("generate", str(tiny_checkpoint), *settings, stdin="The quick").stdout == done.stdout


def test_chat_keeps_the_conversation(tiny_checkpoint: Path) -> None:
    settings = ("--max-tokens", "8", "--temperature", "0", "--threads", "1")
    done = skyline("chat", str(tiny_checkpoint), *settings, stdin="Anna\n\n/reset\nAnna\nAnna\n/quit\nnever asked\n")
    assert done.returncode == 0, done.stderr
    # Three answers; the second conversation starts like the first one.
    first, again = done.stdout.split("\n")[0], done.stdout
    assert first and again.count(first) >= 2


def test_explain_prints_every_op(tiny_checkpoint: Path) -> None:
    done = skyline("explain", str(tiny_checkpoint))
    assert done.returncode == 0, done.stderr
    for text in ("Qwen3ForCausalLM", "linear", "paged_attention", "KV cache", "Decode", "Prefill"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("explain", "EMPTY"), "config.json"),
        (("explain", "MODEL", "--context", "100000"), "context of 256"),
        (("explain", "MODEL", "--device", "tpu"), "cpu or cuda"),
        (("serve", "EMPTY", "--port", "0"), "config.json"),
        (("serve", "no/such/folder/here", "--port", "0"), "no folder"),
        (("serve", "MODEL", "--max-num-batched-tokens", "8", "--port", "0"), "max_num_batched_tokens"),
        (("serve", "MODEL", "--tool-call-parser", "no-such", "--port", "0"), "tool_parser"),
        (("serve", "MODEL", "--num-kv-blocks", "1", "--max-model-len", "256", "--port", "0"), "KV cache"),
        (("generate", "MODEL", "--prompt", "x " * 1000, "--threads", "1"), "the prompt has"),
        (("eval", "demo", "--url", "http://127.0.0.1:1"), "cannot reach"),
        (("eval", "demo", "--url", "http://127.0.0.1:1", "--", "--dtype", "float32"), "--url"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], said: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    places = {"MODEL": str(tiny_checkpoint), "EMPTY": str(tmp_path)}
    assert said in one_red_line(skyline(*(places.get(argument, argument) for argument in arguments)))


def test_a_port_in_use(tiny_checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        error = one_red_line(skyline("serve", str(tiny_checkpoint), "--port", port))
    assert port in error and "--port" in error


def test_explain_for_a_gpu(tiny_checkpoint: Path) -> None:
    done = skyline("explain", str(tiny_checkpoint), "--hardware", "l4", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "Kernel launches a layer" in done.stdout
    assert "NVIDIA L4, 0.30 TB/s" in done.stdout and done.stdout.count("on NVIDIA L4: memory takes") == 2


def test_explain_json(tiny_checkpoint: Path) -> None:
    done = skyline("explain", str(tiny_checkpoint), "--json", "--batch", "4", "--context", "64")
    facts = json.loads(done.stdout)
    assert facts["layers"] == 2 and facts["steps"]["decode"]["requests"] == 4


def test_serve_takes_a_chat_template_and_ends_on_sigterm(tiny_checkpoint: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    options = ["--chat-template", str(template), "--port", "0", "--threads", "1", "--num-kv-blocks", "64"]
    command = [sys.executable, "-m", "skyline", "serve", str(tiny_checkpoint), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = ""
        while "\ncurl " not in log:
            line = process.stderr.readline()
            assert line, f"the server ended: {log}"
            log += line
        assert "KV cache" in log and "ready" in log
        address = log.rpartition("\ncurl ")[2].split()[0]
        body = json.dumps({"messages": [{"role": "user", "content": "one two"}], "max_tokens": 2})
        request = urllib.request.Request(address, body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            usage = json.load(response)["usage"]
        process.terminate()
        assert process.wait(60) == 0
    # The checkpoint's own template would have added its tags.
    assert usage["prompt_tokens"] == len(Tokenizer(tiny_checkpoint).encode("one two"))


def test_eval_starts_a_server_with_the_options_given(demo_model: Path) -> None:
    done = skyline("eval", "demo", "--limit", "8", "--json", "--", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["total"] == 8 and 0 <= result["exact_match"] <= 1
    assert "cannot" not in done.stderr


def test_the_example_that_serve_prints_is_answered_correctly(demo_model: Path) -> None:
    done = skyline("chat", "--temperature", "0", stdin=EXAMPLE + "\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("#### 13")
