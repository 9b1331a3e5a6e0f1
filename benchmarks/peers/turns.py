"""Who runs when: all contenders are loaded at once and take turns, the others stopped, if they fit into memory.

If they do not fit, or are not to be kept, each is started anew in each round, and the rounds are what interleaves them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from benchmarks.peers.processes import available_mib


class Contender(Protocol):
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def close(self) -> None: ...


C = TypeVar("C", bound=Contender)
Cell = TypeVar("Cell")
SPARE_MIB = 1500


def fits(needs: Iterable[float]) -> bool:
    return sum(needs) + SPARE_MIB < available_mib()


def need_mib(files: Path, kv_bytes: int) -> float:
    """A guess at what a contender takes: its weights and half of them again (repacked), KV, code and temporaries."""
    paths = [path for path in files.rglob("*") if path.is_file()] if files.is_dir() else [files]
    return 1.5 * sum(path.stat().st_size for path in paths) / 2**20 + kv_bytes / 2**20 + 700


class Turns(Generic[C, Cell]):
    """`start` makes a contender ready, `take` is one turn of it (round 0 is a warm-up), `finish` sees it at its end.

    All three may raise; `failed` is told (name, cell or None, error). One that cannot go on is not asked again.
    """

    def __init__(
        self,
        start: Callable[[str], C],
        take: Callable[[C, str, Cell, int], None],
        finish: Callable[[C, str], None],
        failed: Callable[[str, Cell | None, Exception], None],
    ) -> None:
        self.start, self.take, self.finish, self.failed = start, take, finish, failed
        self.broken: set[tuple[str, Cell]] = set()
        self.gone: set[str] = set()

    def run(self, names: Sequence[str], cells: Sequence[Cell], rounds: int, together: bool) -> None:
        if together:
            self._together(names, cells, rounds)
        else:
            for number in range(1, rounds + 1):
                for name in _rotated(names, number):
                    if name not in self.gone:
                        self._alone(name, cells, number, last=number == rounds)

    def _together(self, names: Sequence[str], cells: Sequence[Cell], rounds: int) -> None:
        running: dict[str, C] = {}
        try:
            for name in names:
                contender = self._started(name)
                if contender is not None:
                    contender.pause()
                    running[name] = contender
            for number in range(rounds + 1):
                for cell in cells:
                    for name in _rotated(list(running), number):
                        if name not in self.gone:
                            running[name].resume()
                            self._turn(running[name], name, cell, number)
                            running[name].pause()
            for name, contender in running.items():
                contender.resume()
                if name not in self.gone:
                    self._finished(contender, name)
        finally:
            for contender in running.values():
                contender.resume()
                contender.close()

    def _alone(self, name: str, cells: Sequence[Cell], number: int, last: bool) -> None:
        contender = self._started(name)
        if contender is None:
            return
        try:
            for turn in (0, number):
                for cell in cells:
                    if name not in self.gone:
                        self._turn(contender, name, cell, turn)
            if last and name not in self.gone:
                self._finished(contender, name)
        finally:
            contender.close()

    def _started(self, name: str) -> C | None:
        try:
            return self.start(name)
        except Exception as error:
            self.gone.add(name)
            self.failed(name, None, error)
            return None

    def _turn(self, contender: C, name: str, cell: Cell, number: int) -> None:
        if (name, cell) in self.broken:
            return
        try:
            self.take(contender, name, cell, number)
        except Exception as error:
            self.broken.add((name, cell))
            if getattr(error, "fatal", False):
                self.gone.add(name)
            self.failed(name, cell, error)

    def _finished(self, contender: C, name: str) -> None:
        with contextlib.suppress(Exception):
            self.finish(contender, name)


def _rotated(names: Sequence[str], number: int) -> list[str]:
    """Nobody always follows the same one."""
    if not names:
        return []
    cut = number % len(names)
    return [*names[cut:], *names[:cut]]
