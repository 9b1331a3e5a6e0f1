"""A real `skyline serve` in its own process, on a free loopback port."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path


class Server:
    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def post(self, path: str, body: object, timeout: float = 120) -> tuple[int, dict]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                text = response.read()
                if response.headers["content-type"].startswith("text/event-stream"):
                    events = [line[6:] for line in text.splitlines() if line.startswith(b"data: ")]
                    assert events[-1] == b"[DONE]"
                    return response.status, {"events": [json.loads(event) for event in events[:-1]]}
                return response.status, json.loads(text)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def metric(self, name: str) -> float:
        """The value of a metric; without labels, the sum over all label sets."""
        _, text = self.get("/metrics")
        values = [
            float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((name + " ", name + "{"))
        ]
        assert values, f"/metrics has no {name}"
        return sum(values)

    def processes(self) -> list[int]:
        """The server's process id, then its children's."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]

    def rss_bytes(self) -> int:
        return sum(
            int(line.split()[1]) * 1024
            for pid in self.processes()
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("VmRSS:")
        )

    def wait_idle(self, timeout: float = 30) -> None:
        """Until nothing runs or waits and no KV block is held."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            names = ("requests_running", "requests_waiting", 'kv_blocks{state="held"}')
            if all(self.metric(f"skyline_{name}") == 0 for name in names):
                return
            time.sleep(0.2)
        raise AssertionError("requests or KV blocks are left over")


@contextlib.contextmanager
def serve(*arguments: str, environment: dict[str, str] | None = None, ready_timeout: float = 90) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "skyline", "serve", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, text=True, env={**os.environ, **(environment or {})})
    server = Server(process, port)
    try:
        deadline = time.monotonic() + ready_timeout
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                if server.get("/health")[0] == 200:
                    break
            assert process.poll() is None, "the server ended before it was ready"
            assert time.monotonic() < deadline, "the server does not become ready"
            time.sleep(0.1)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
