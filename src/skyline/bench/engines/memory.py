"""Memory of a tree of processes: PSS, the proportional set size, which counts shared pages once in all."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path

INTERVAL_S = 1.0
# The kernel walks a process's whole page table for its PSS, which takes milliseconds for each gigabyte; so PSS is read
# only when the resident size, which costs nothing, has grown by that much since.
_GROWTH = 1.01
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PSS = re.compile(rb"^Pss:\s+(\d+) kB", re.MULTILINE)


def below(root: int, proc: Path = Path("/proc")) -> list[int]:
    """Ids of all processes that descend from `root`, without it."""
    children: dict[int, list[int]] = {}
    for process, (parent, _) in _stats(proc).items():
        children.setdefault(parent, []).append(process)
    found: list[int] = []
    waiting = [root]
    while waiting:
        more = children.get(waiting.pop(), [])
        found += more
        waiting += more
    return found


def session(leader: int, proc: Path = Path("/proc")) -> list[int]:
    """Ids of the processes of a session (man 2 setsid)."""
    return [process for process, (_, of) in _stats(proc).items() if of == leader]


def resident(processes: list[int], proc: Path = Path("/proc")) -> int:
    """Sum of their resident set sizes, bytes; one that has ended counts nothing."""
    total = 0
    for process in processes:
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += int((proc / str(process) / "statm").read_text().split()[1]) * _PAGE
    return total


def proportional(processes: list[int], proc: Path = Path("/proc")) -> int | None:
    """Sum of their proportional set sizes, bytes; None if one may not be read."""
    total = 0
    for process in processes:
        try:
            found = _PSS.search((proc / str(process) / "smaps_rollup").read_bytes())
        except ProcessLookupError:
            continue
        except FileNotFoundError:
            if (proc / str(process)).exists():
                return None
            continue
        except OSError:
            return None
        total += int(found.group(1)) * 1024 if found else 0
    return total


class MemoryWatch:
    """Samples the processes below `root` every second, from a thread of its own, until `stop`."""

    def __init__(self, root: int, proc: Path = Path("/proc"), interval_s: float = INTERVAL_S) -> None:
        self._root, self._proc, self._interval_s = root, proc, interval_s
        self._pss: int | None = None
        self._rss = 0
        self._looked_at = 0
        self._readable = True
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory of the engine", daemon=True)
        self._thread.start()

    @property
    def peak(self) -> int | None:
        """Bytes; None before the first sample."""
        self.sample()
        return (self._pss if self._readable else self._rss) or None

    @property
    def method(self) -> str:
        what = "PSS" if self._readable else "RSS (PSS could not be read)"
        return f"{what} summed over the engine's processes, sampled every {self._interval_s:g} s"

    def sample(self) -> None:
        processes = below(self._root, self._proc)
        rss = resident(processes, self._proc)
        self._rss = max(self._rss, rss)
        if self._readable and rss > self._looked_at * _GROWTH:
            pss = proportional(processes, self._proc)
            self._looked_at, self._readable = rss, pss is not None
            self._pss = max(self._pss or 0, pss or 0)

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self._interval_s):
            self.sample()


def _stats(proc: Path) -> dict[int, tuple[int, int]]:
    """(parent, session) of every process that is not a zombie."""
    found = {}
    for entry in os.listdir(proc):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = (proc / entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                if fields[0] != "Z":
                    found[int(entry)] = (int(fields[1]), int(fields[3]))
    return found
