"""A server process under a supervisor: started with its log, watched, stopped with everything that it started."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from skyline.bench.engines.memory import MemoryWatch, below, session

SUPERVISOR = Path(__file__).parent / "scripts" / "supervisor.py"
GRACE_S = 20.0

_TAIL_BYTES = 64 * 1024
_TAIL_LINES = 12
_LINE_LENGTH = 300
# Terminal sequences (ECMA-48: CSI, then OSC), and after them every control character but the line's end.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.?")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


class ServerProcess:
    """Starts at once. `environment` is complete, not added to this process's. Raises OSError if the log cannot be
    written. A context: leaving it stops the process."""

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        log: Path,
        grace_s: float = GRACE_S,
        append: bool = False,
    ) -> None:
        self.log, self._grace_s = log, grace_s
        log.parent.mkdir(parents=True, exist_ok=True)
        supervised = [sys.executable, "-I", str(SUPERVISOR), str(os.getpid()), str(grace_s), *command]
        with log.open("ab" if append else "wb") as out:
            self.started = time.monotonic()
            self._supervisor = subprocess.Popen(
                supervised,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.memory = MemoryWatch(self._supervisor.pid)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def ended(self) -> str | None:
        """None while it runs, else how it ended and the last lines of its log."""
        code = self._supervisor.poll()
        return None if code is None else f"{_how(code)}{self.last_words()}"

    def wait(self) -> int:
        """Until it ends by itself; its exit status."""
        return self._supervisor.wait()

    def last_words(self) -> str:
        """For the end of a message: where the log is, and its last lines."""
        lines = tail(self.log)
        return f"; its log ends ({self.log}):\n{lines}" if lines else f"; its log is empty ({self.log})"

    def processes(self) -> list[int]:
        """Ids of the server's processes that run."""
        return below(self._supervisor.pid)

    def stop(self) -> None:
        """Returns when none of its processes is left. May be called again."""
        self.memory.stop()
        if self._supervisor.poll() is None:
            self._supervisor.terminate()
            # Killing what ignores SIGTERM takes a moment more; it takes for ever only where a process hangs in the
            # kernel.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._supervisor.wait(self._grace_s + 10)
        # The supervisor leaves nothing behind, unless it was killed itself.
        for process in session(self._supervisor.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._supervisor.wait()


def tail(log: Path) -> str:
    """The last lines of a log, whatever was written there: no terminal sequences, no control characters, lines and
    their number limited. Empty if there are none."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            text = file.read(_TAIL_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""
    # A progress bar draws over itself with carriage returns; only what was visible in the end is kept.
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    clean = (_CONTROLS.sub(" ", _ESCAPES.sub("", line)).rstrip() for line in lines)
    kept = [line if len(line) <= _LINE_LENGTH else line[:_LINE_LENGTH] + " …" for line in clean if line]
    return "\n".join(f"  {line}" for line in kept[-_TAIL_LINES:])


def _how(code: int) -> str:
    if code < 0:
        return f"the engine's supervisor was ended by {_signal(-code)}"
    if code > 128:
        hint = ", as the kernel does where memory runs out" if code - 128 == signal.SIGKILL else ""
        return f"the engine was ended by {_signal(code - 128)}{hint}"
    return f"the engine ended with status {code}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
