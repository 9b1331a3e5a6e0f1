"""Runs one engine and leaves nothing of it behind. A program of its own, because it must outlive the benchmark.

    python -I supervisor.py PARENT GRACE COMMAND...

It ends with the engine's exit status (128 + N if signal N ended it). The engine is stopped when this process gets
SIGTERM, SIGINT or SIGHUP, and when PARENT (a process id) is no longer its parent: SIGTERM to the engine, GRACE seconds,
SIGKILL to it and to whatever it started. As a "child subreaper" (man 2 prctl) it inherits processes that the engine
leaves behind, also those that made themselves daemons, so all of them are found below it.

Standard library only; nothing is imported from the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
POLL_S = 0.25
# What the engine left behind may clean up for so long after the engine itself has ended, as a multiprocessing resource
# tracker does that removes shared memory.
LEFTOVERS_S = 2.0


def main() -> int:
    parent, grace, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Blocked signals wait until sigtimedwait takes them, so none is missed between two looks.
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    engine = _start(command, libc)
    status = _reap(engine)
    while status is None and os.getppid() == parent:
        taken = signal.sigtimedwait(WATCHED, POLL_S)
        status = _reap(engine)
        if taken is not None and taken.si_signo != signal.SIGCHLD:
            break
    if status is None:
        _kill(engine, signal.SIGTERM)
        status = _wait(engine, grace)
    if status is not None:
        _wait_for_leftovers(LEFTOVERS_S)
    while below := _descendants():
        for process in below:
            _kill(process, signal.SIGKILL)
        signal.sigtimedwait({signal.SIGCHLD}, 0.05)
        found = _reap(engine)
        status = found if status is None else status
    return 0 if status is None else _exit_code(status)


def _start(command: list[str], libc: ctypes.CDLL) -> int:
    engine = os.fork()
    if engine:
        return engine
    try:
        # If this supervisor is killed itself, at least the engine's main process goes with it.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"cannot start {command[0]}: {error.strerror}\n".encode(errors="replace"))
    os._exit(127)


def _reap(engine: int) -> int | None:
    """Takes in every child that has ended; the wait status of the engine if it is among them."""
    status = None
    try:
        while True:
            process, code = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                return status
            if process == engine:
                status = code
    except ChildProcessError:
        return status


def _wait(engine: int, seconds: float) -> int | None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        signal.sigtimedwait({signal.SIGCHLD}, min(left, POLL_S))
        if (status := _reap(engine)) is not None:
            return status
    return None


def _wait_for_leftovers(seconds: float) -> None:
    until = time.monotonic() + seconds
    while _descendants() and (left := until - time.monotonic()) > 0:
        signal.sigtimedwait({signal.SIGCHLD}, min(left, 0.05))
        _reap(0)


def _descendants() -> list[int]:
    """All that runs below this process; zombies are left out, who are only waiting to be taken in."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except (OSError, ValueError):
                continue
            if state != b"Z":
                children.setdefault(int(parent), []).append(int(entry))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _kill(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
