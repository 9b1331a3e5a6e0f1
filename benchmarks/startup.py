"""Time from process start to the first token, cold process and warm page cache, through the HTTP server.

    python benchmarks/startup.py                          # the embedded model
    python benchmarks/startup.py FOLDER --json FILE       # any checkpoint

Each run starts `skyline serve` anew and sends one chat request as soon as the port answers, retrying until the model is
there. torch's own import time is measured apart, in the same run and interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def first_token_seconds(model: list[str]) -> tuple[float, float]:
    """Seconds from the start of the process until /health is 200, and until the first streamed token has arrived."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.perf_counter()
    command = [sys.executable, "-m", "skyline", "serve", *model, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ready = 0.0
    try:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    ready = time.perf_counter() - began
                break
            except (urllib.error.URLError, ConnectionError):
                if process.poll() is not None:
                    raise RuntimeError("the server did not start; run the command by hand to see why") from None
                time.sleep(0.02)
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "stream": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            for line in response:
                if line.startswith(b"data: ") and json.loads(line[6:])["choices"][0]["finish_reason"]:
                    break
        return ready, time.perf_counter() - began
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def import_seconds(module: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint folder; default: the embedded model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = [arguments.model] if arguments.model else []
    first_token_seconds(model)  # fills the page cache
    rows = []
    for _ in range(arguments.runs):
        ready, first = first_token_seconds(model)
        rows.append({"ready_s": ready, "first_token_s": first, "import_torch_s": import_seconds("torch")})
    medians = {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
    record: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/startup.py", *(["<folder>"] if model else [])]),
        "model": Path(arguments.model).name if model else "embedded demo",
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "medians": medians,
        "runs": rows,
    }
    print(f"{record['model']}: " + ", ".join(f"{key} {value:.2f}" for key, value in medians.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
