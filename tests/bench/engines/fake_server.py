"""A server for tests of starting and stopping, run as a program: python -I fake_server.py [--OPTION VALUE]... --port N

It answers the few requests that readiness takes, and misbehaves as it is told to.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GRANDCHILD = "import time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="fake-model")
    parser.add_argument("--say", default="", help="printed first; escapes are interpreted")
    parser.add_argument("--exit", type=int, help="end at once with this status")
    parser.add_argument("--deaf", action="store_true", help="ignore SIGTERM")
    parser.add_argument("--hang", choices=["start", "completion"])
    parser.add_argument("--loading", type=float, default=0.0, help="seconds of HTTP 503")
    parser.add_argument("--family", help="start a child and a daemon that ignore SIGTERM; their ids go to this file")
    parser.add_argument("--allocate", type=int, default=0, help="MiB of memory to touch")
    parser.add_argument("--chat-only", action="store_true")
    parser.add_argument("--strict", default="", help="refuse these fields")
    parser.add_argument("--key", help="refuse requests without it")
    parser.add_argument("--garbage", action="store_true", help="answer everything with something that is not HTTP")
    options = parser.parse_args()

    sys.stdout.buffer.write(options.say.encode().decode("unicode_escape").encode("latin-1"))
    sys.stdout.buffer.flush()
    if options.exit is not None:
        sys.exit(options.exit)
    if options.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.family:
        _start_family(options.family)
    if options.hang == "start":
        time.sleep(600)
    kept = bytearray(os.urandom(2**20)) * options.allocate
    ready = time.monotonic() + options.loading
    hits = {"prompts": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self._refused():
                return
            if self.path == "/health":
                self._answer({"status": "ok"})
            elif self.path == "/v1/models":
                self._answer({"data": [{"id": options.model}, {"id": "other"}]})
            elif self.path == "/metrics":
                text = f'vllm:prefix_cache_queries_total{{engine="0"}} {hits["prompts"] * 10}.0\n'
                self._send(200, (text + 'vllm:prefix_cache_hits_total{engine="0"} 4.0\n').encode())
            elif self.path == "/version":
                self._answer({"version": "1.2.3"})
            else:
                self._send(404, b"{}")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self._refused():
                return
            if options.hang == "completion":
                time.sleep(600)
            if options.chat_only and self.path == "/v1/completions":
                self._send(404, b"{}")
            elif refused := set(options.strict.split(",")) & set(body):
                self._send(422, json.dumps({"detail": f"Unexpected fields: {refused}"}).encode())
            elif body["model"] not in (options.model, "other"):
                self._send(404, b'{"error": {"message": "no such model"}}')
            else:
                hits["prompts"] += 1
                self._answer({"choices": [{"text": "x"}], "usage": {"completion_tokens": 1}})

        def _refused(self) -> bool:
            if options.garbage:
                self.wfile.write(b"\x00\x01SSH-2.0-nonsense\r\n")
                self.close_connection = True
            elif options.key and self.headers.get("Authorization") != f"Bearer {options.key}":
                self._send(401, b'{"error": {"message": "wrong key"}}')
            elif time.monotonic() < ready:
                self._send(503, b'{"error": "loading"}')
            else:
                return False
            return True

        def _answer(self, data: Any) -> None:
            self._send(200, json.dumps(data).encode())

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    if not options.deaf:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server.serve_forever()
    del kept


def _start_family(path: str) -> None:
    """A child in a session of its own, and a grandchild whose parent has ended, as a daemon's has."""
    child = subprocess.Popen([sys.executable, "-I", "-c", GRANDCHILD], start_new_session=True)
    fork = (
        "import subprocess, sys; "
        f"print(subprocess.Popen([sys.executable, '-I', '-c', {GRANDCHILD!r}], start_new_session=True,"
        " stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
    )
    daemon = subprocess.run([sys.executable, "-I", "-c", fork], capture_output=True, text=True, check=True)
    with open(path + ".partial", "w") as file:
        file.write(f"{os.getpid()} {child.pid} {int(daemon.stdout)}")
    os.rename(path + ".partial", path)


if __name__ == "__main__":
    main()
