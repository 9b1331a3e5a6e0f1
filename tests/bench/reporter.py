"""A Reporter that notes what it hears."""

from __future__ import annotations

from skyline.bench.load.generator import Live
from skyline.bench.results import PointResult
from skyline.bench.suite import PointSpec


class Reporter:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.begun: list[str] = []
        self.points: list[PointResult] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, spec: PointSpec, number: int, total: int) -> None:
        self.begun.append(f"{number}/{total} {spec.level.label}")

    def live(self, live: Live) -> None:
        pass

    def end(self, point: PointResult) -> None:
        self.points.append(point)
