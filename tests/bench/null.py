"""The null server in a process of its own, a token each two milliseconds."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def null_server() -> Iterator[str]:
    """Its address, until the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "skyline.bench.load.null_server", "--step", "0.002"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait()
