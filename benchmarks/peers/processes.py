"""Processes of contenders: a worker spoken to in JSON lines, stopped (SIGSTOP) while it is not its turn."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.engines import Peer


class WorkerError(RuntimeError):
    def __init__(self, text: str, fatal: bool = False) -> None:
        super().__init__(text)
        self.fatal = fatal  # the worker is gone, or out of step: it cannot be asked again


def tree(root: int) -> list[int]:
    """This process and its descendants, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        process = waiting.pop(0)
        found.append(process)
        waiting += children.get(process, [])
    return found


def send(root: int, number: signal.Signals) -> None:
    """A signal to all of a tree; twice, because a process may be born in between."""
    for _ in range(2):
        for process in tree(root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)


def end(process: subprocess.Popen[Any], grace: float = 20) -> None:
    """End a process and what it started. Descendants are listed first: they lose their parent when it ends."""
    everyone = tree(process.pid) if process.poll() is None else []
    send(process.pid, signal.SIGCONT)
    if process.poll() is None:
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    for other in everyone:
        with contextlib.suppress(ProcessLookupError):
            os.kill(other, signal.SIGKILL)
    process.wait()


def peak_mib(root: int) -> float:
    """Sum of VmHWM (peak resident set, file-backed pages included) over the process tree."""
    total = 0
    for process in tree(root):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    total += int(line.split()[1])
    return total / 1024


def available_mib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no MemAvailable in /proc/meminfo")


class Worker:
    """A contender's worker process. Started at once; `load` makes it ready."""

    def __init__(self, peer: Peer, work: Path, threads: int, label: str) -> None:
        self.peer, self.threads = peer, threads
        log = work / "logs" / f"run-{label}-{peer.key}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log.name
        self.began = time.perf_counter()
        with log.open("w") as errors:
            try:
                self.process = subprocess.Popen(
                    [peer.python(work), str(peer.worker)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
                    env=peer.variables(work, threads),
                )  # fmt: skip
            except OSError as error:
                raise WorkerError(f"{error.strerror}: is its environment set up?") from None

    def load(self, model: Path, settings: dict[str, Any], timeout: float = 900) -> dict[str, Any]:
        settings = {**settings, "kv_cache_dtype": self.peer.kv_cache_dtype}
        message = {"do": "load", "model": str(model), "threads": self.threads, "settings": settings}
        return self._ask(message, timeout)

    def generate(self, prompts: list[list[int]], new_tokens: int, timeout: float = 1200) -> float:
        """Seconds, as the worker measured them; an error unless each prompt got exactly the tokens asked for."""
        reply = self._ask({"do": "generate", "prompts": prompts, "new_tokens": new_tokens}, timeout)
        if reply["counts"] != [new_tokens] * len(prompts):
            raise WorkerError(f"generated {reply['counts']} tokens where {new_tokens} each were asked for")
        return float(reply["seconds"])

    def pause(self) -> None:
        send(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        send(self.process.pid, signal.SIGCONT)

    def peak_mib(self) -> float:
        return peak_mib(self.process.pid)

    def close(self) -> None:
        self.resume()
        with contextlib.suppress(OSError, ValueError):
            self._write({"do": "quit"})
        everyone = tree(self.process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        end(self.process)
        for other in everyone[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _write(self, message: dict[str, Any]) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def _ask(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        try:
            self._write(message)
        except OSError:
            raise WorkerError(f"the worker ended (logs/{self.log})", fatal=True) from None
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        line = self.process.stdout.readline() if ready else ""
        if not ready:
            raise WorkerError(f"no answer within {timeout:.0f} s (logs/{self.log})", fatal=True)
        if not line:
            raise WorkerError(f"the worker ended with {self.process.wait(30)} (logs/{self.log})", fatal=True)
        reply: dict[str, Any] = json.loads(line)
        if not reply["ok"]:
            raise WorkerError(f"{reply['error']} (logs/{self.log})")
        return reply
