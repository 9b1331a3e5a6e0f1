"""What a suite would measure, how long that takes, and what stands against it here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from skyline.bench.engines import EngineError, check, get
from skyline.bench.suite import PointSpec, Suite


@dataclass(frozen=True)
class Row:
    """One engine × model × scenario; times in seconds, of all levels and replicates."""

    engine: str
    model: str
    scenario: str
    lengths: str
    levels: str
    points: int
    least_s: float
    most_s: float


@dataclass(frozen=True)
class Plan:
    rows: list[Row]
    points: int
    starts: int
    least_s: float
    most_s: float
    gates: list[str]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def obstacles(suite: Suite) -> list[str]:
    """Why engines of the suite cannot be measured on this machine, as far as that can be seen before anything is
    installed or started. Raises EngineError for a name that no engine has."""
    found = []
    for spec in {point.engine.name: point.engine for point in suite.points()}.values():
        get(spec.engine)
        try:
            check(spec)
        except EngineError as error:
            found.append(str(error))
    return found


def estimate(suite: Suite) -> Plan:
    """Pure. The least is reached by engines that answer quickly; the most is when every point runs into its `max_s`."""
    groups: dict[tuple[str, str, str], list[PointSpec]] = {}
    for spec in suite.points():
        groups.setdefault((spec.engine.name, spec.model.name, spec.workload.name), []).append(spec)
    rows = []
    for (engine, model, scenario), specs in groups.items():
        times = [spec.expected_seconds() for spec in specs]
        work = specs[0].workload
        lengths = f"{work.input}/{work.output}" + (f" × {work.ratio:g}–1" if work.ratio < 1 else "")
        levels = list(dict.fromkeys(_short(spec) for spec in specs))
        rows.append(
            Row(
                engine,
                model,
                scenario,
                lengths,
                f"{specs[0].level.kind} {', '.join(levels)}",
                len(specs),
                sum(least for least, _ in times),
                sum(most for _, most in times),
            )
        )
    gates = []
    if suite.accuracy is not None:
        gate = suite.accuracy
        gates.append(
            f"accuracy gate: {gate.task}, exact match at least {gate.at_least:.1%}, once for each engine and model"
        )
    return Plan(
        rows,
        sum(row.points for row in rows),
        len({(row.engine, row.model) for row in rows}),
        sum(row.least_s for row in rows),
        sum(row.most_s for row in rows),
        gates,
    )


def _short(spec: PointSpec) -> str:
    level = spec.level
    if level.kind == "closed":
        return str(level.concurrency)
    if level.kind == "ramp":
        return f"{level.rate:g}–{level.end_rate:g}/s"
    return f"{level.rate:g}{'x' if level.kind == 'trace' else '/s'}"
