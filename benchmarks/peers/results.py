"""What a run found out, row by row, with the reason wherever there is no row."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Results:
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)  # engine -> format -> settings, versions
    layout: dict[str, str] = field(default_factory=dict)  # model/format/part -> how contenders took turns
    changed: Callable[[], None] = lambda: None  # called after each part, so that an interrupted run leaves a file

    def add(self, model: str, kind: str, cell: str, engine: str, values: list[float], unit: str) -> None:
        """One row: the median of the values."""
        if not values:
            return
        value = statistics.median(values)
        self.rows.append(
            {"model": model, "format": kind, "cell": cell, "engine": engine, "value": _rounded(value), "unit": unit,
             "reps": len(values), "min": _rounded(min(values)), "max": _rounded(max(values))}
        )  # fmt: skip
        print(f"  {model} {kind} {cell} {engine}: {_rounded(value)} {unit} (median of {len(values)})", flush=True)

    def fail(self, model: str, kind: str, cell: str, engine: str, reason: str) -> None:
        failure = {"model": model, "format": kind, "cell": cell, "engine": engine, "reason": reason}
        if failure not in self.failures:
            self.failures.append(failure)
            print(f"  {model} {kind} {cell} {engine}: no result: {reason}", file=sys.stderr, flush=True)

    def describe(self, engine: str, kind: str, what: dict[str, Any]) -> None:
        self.engines.setdefault(engine, {}).setdefault(kind, {}).update(what)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
