"""A `skyline serve` of our own, for as long as something needs one."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from skyline.cli import console

START_TIMEOUT_S = 300.0


@contextlib.contextmanager
def temporary_server(arguments: list[str]) -> Iterator[str]:
    """A server of the embedded model on a free port of this machine, until the end of the block."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "skyline", "serve", "--host", "127.0.0.1", "--port", str(port), *arguments]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            if not _wait_until_healthy(process, url):
                log.seek(0)
                console.fail(f"the server did not start. Its log:\n{log.read()[-4000:].rstrip()}")
            yield url
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):  # not listening yet, or 503 while the model loads
            time.sleep(0.1)
    return False
