"""Starts engine processes, ahead of time if asked.

Importing torch is the longest part of a start and needs no settings, so the command line starts the engine's process
before it imports anything itself; the settings follow on the process's standard input once they are known.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

ENGINE_COMMAND = (sys.executable, "-m", "skyline.ipc.engine_process")

_early: subprocess.Popen[bytes] | None = None


def start_early() -> None:
    """Start the process that the next `start_engine` will use. If there is none, it ends with this one."""
    global _early
    if _early is None:
        _early = _popen(ENGINE_COMMAND)


def start_engine(command: Sequence[str] = ENGINE_COMMAND) -> subprocess.Popen[bytes]:
    """A process that waits for its settings on standard input."""
    global _early
    if _early is not None and tuple(command) == ENGINE_COMMAND:
        process, _early = _early, None
        return process
    return _popen(command)


def _popen(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)
