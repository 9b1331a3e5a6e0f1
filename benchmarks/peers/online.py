"""Servers under a closed loop: c clients, each sending its next request when the last one is answered.

Requests go to /v1/completions as text of one digit a token, streamed, greedy, end-of-sequence ignored. The client
runs on the same cores as the server. Servers stay loaded and are stopped while others are measured, if all of them fit
into memory.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.peers.engines import PEERS, ROOT
from benchmarks.peers.offline import Plan
from benchmarks.peers.processes import end, send
from benchmarks.peers.results import Results
from benchmarks.peers.turns import Turns, need_mib

NO_SERVER = {
    "openvino": "no HTTP server in its Python packages (OpenVINO Model Server is a program of its own)",
    "transformers": "not a server to compare with: `generate` has no continuous batching",
}
END_TOKENS = (2041, 2043)  # of the checkpoint's tokenizer
START_SECONDS = 600


class ServerError(RuntimeError):
    fatal = False


@dataclass
class Answer:
    first: float  # seconds to the first token
    last: float  # seconds to the last one
    tokens: int


class Server:
    def __init__(self, plan: Plan, model: str, kind: str, name: str, settings: dict[str, Any]) -> None:
        self.name, self.plan = name, plan
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        peer, path = PEERS[name], str(plan.files(model, kind, name))
        self.command = [peer.python(plan.work), *_arguments(name, path, self.port, plan.threads, kind, settings)]
        self.log = plan.work / "logs" / f"server-{model}-{kind}-{peer.key}.log"
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env=peer.variables(plan.work, plan.threads), cwd=ROOT if peer.ours else plan.work,
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        path = "/v1/models" if self.name == "llama.cpp" else "/health"
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise ServerError(f"the server ended with {self.process.returncode} (logs/{self.log.name})")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
                    if response.status == 200:
                        break
            except OSError:
                time.sleep(0.2)
        else:
            raise ServerError(f"the server was not ready within {START_SECONDS} s (logs/{self.log.name})")
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models", timeout=30) as response:
            self.model_id = json.load(response)["data"][0]["id"]

    def pause(self) -> None:
        send(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        send(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        end(self.process)

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model_id,
            "prompt": "".join(random.choice("0123456789") for _ in range(self.plan.prompt)),
            "max_tokens": self.plan.new,
            "temperature": 0,
            "stream": True,
        }
        if self.name == "llama.cpp":  # its server has no ignore_eos
            body["logit_bias"] = {str(token): -100 for token in END_TOKENS}
        else:
            body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        return body


def _arguments(name: str, path: str, port: int, threads: int, kind: str, settings: dict[str, Any]) -> list[str]:
    length, seqs = str(settings["max_model_len"]), str(settings["max_num_seqs"])
    room = settings["kv_tokens"] * settings["kv_token_bytes"]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    if PEERS[name].ours:
        quantization = [] if kind == "bf16" else ["--quantization", kind]
        return ["-m", "skyline", "serve", path, *where, "--threads", str(threads), "--max-model-len", length,
                "--max-num-seqs", seqs, "--kv-cache-memory", str(room), "--kv-cache-dtype", PEERS[name].kv_cache_dtype,
                *quantization]  # fmt: skip
    if name == "vllm":
        return ["-m", "vllm.entrypoints.openai.api_server", "--model", path, *where, "--dtype", "bfloat16",
                "--max-model-len", length, "--max-num-seqs", seqs, "--no-enable-prefix-caching",
                "--kv-cache-memory-bytes", str(room)]  # fmt: skip
    return ["-m", "llama_cpp.server", "--model", path, *where, "--n_threads", str(threads), "--n_threads_batch",
            str(threads), "--n_ctx", length, "--interrupt_requests", "false"]  # fmt: skip


def measure_online(
    plan: Plan, results: Results, model: str, kind: str, names: Sequence[str], concurrencies: Sequence[int], each: int
) -> None:
    settings = plan.settings(model, kind, concurrencies)
    values: dict[tuple[str, int, str], list[float]] = {}

    def start(name: str) -> Server:
        server = Server(plan, model, kind, name, settings)
        results.describe(name, kind, {"server": _public(server.command, plan, name)})
        return server

    def take(server: Server, name: str, concurrency: int, number: int) -> None:
        count = each if number else 1
        answers, seconds = asyncio.run(_load(server, concurrency, count))
        short = [answer.tokens for answer in answers if answer.tokens != plan.new]
        if short:
            raise ServerError(f"answers of {sorted(set(short))} tokens where {plan.new} were asked for")
        if not number:
            return
        measured = {
            "throughput": sum(answer.tokens for answer in answers) / seconds,
            "ttft": statistics.median(answer.first for answer in answers),
            "tpot": 1000 * statistics.median((a.last - a.first) / max(a.tokens - 1, 1) for a in answers),
        }
        for quantity, value in measured.items():
            values.setdefault((name, concurrency, quantity), []).append(value)

    def failed(name: str, concurrency: int | None, error: Exception) -> None:
        cell = "online" if concurrency is None else f"online_c{concurrency}"
        results.fail(model, kind, cell, name, f"{type(error).__name__}: {error}")

    for name in names:
        if name in NO_SERVER:
            results.fail(model, kind, "online", name, NO_SERVER[name])
    served = [name for name in names if name not in NO_SERVER]
    room = settings["kv_tokens"] * settings["kv_token_bytes"]
    together = plan.together(need_mib(plan.files(model, kind, name), room) for name in served)
    results.layout[f"{model} {kind} online"] = "all loaded, taking turns" if together else "started anew in each round"
    Turns(start, take, lambda server, name: None, failed).run(served, concurrencies, plan.rounds, together)
    for concurrency in concurrencies:
        for quantity, unit in (("throughput", "tok/s"), ("ttft", "s"), ("tpot", "ms")):
            for name in served:
                found = values.get((name, concurrency, quantity), [])
                results.add(model, kind, f"online_c{concurrency}_{quantity}", name, found, unit)


async def _load(server: Server, concurrency: int, each: int) -> tuple[list[Answer], float]:
    """All answers, and seconds from the first request to the last token."""
    timeout = aiohttp.ClientTimeout(total=1200)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def client() -> list[Answer]:
            return [await _request(session, server) for _ in range(each)]

        began = time.perf_counter()
        answers = await asyncio.gather(*(client() for _ in range(concurrency)))
        return [answer for mine in answers for answer in mine], time.perf_counter() - began


async def _request(session: aiohttp.ClientSession, server: Server) -> Answer:
    began = time.perf_counter()
    first = last = 0.0
    chunks = 0
    usage: dict[str, Any] | None = None
    url = f"http://127.0.0.1:{server.port}/v1/completions"
    async with session.post(url, json=server.body()) as response:
        if response.status != 200:
            raise ServerError(f"HTTP {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            if event.get("choices") and event["choices"][0].get("text"):
                last = time.perf_counter() - began
                first = first or last
                chunks += 1
    if usage and usage["prompt_tokens"] != server.plan.prompt:
        raise ServerError(f"the prompt became {usage['prompt_tokens']} tokens, not {server.plan.prompt}")
    return Answer(first, last, usage["completion_tokens"] if usage else chunks)


def _public(command: list[str], plan: Plan, name: str) -> str:
    """The command without this machine's paths."""
    return " ".join(["python", *command[1:]]).replace(str(plan.work), "WORK")
