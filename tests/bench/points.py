"""Points that were never measured, for tests of what is made of results."""

from __future__ import annotations

import datetime
from collections.abc import Mapping

from skyline.bench.estimate import Estimate
from skyline.bench.results import Hardware, PointResult, Provenance
from skyline.bench.suite import parse_suite

WHEN = datetime.datetime(2026, 11, 1, 12, tzinfo=datetime.UTC)


def point(
    engine: str = "skyline",
    concurrency: int = 1,
    metrics: Mapping[str, float | tuple[float, float, float]] | None = None,
    *,
    run: str = "r",
    replicate: int = 0,
    status: str = "ok",
    when: datetime.datetime = WHEN,
    hardware: str = "2x test core",
    **fields: object,
) -> PointResult:
    """`metrics`: a value, or (value, low, high)."""
    suite = parse_suite(
        f"""
        name: s
        models: [{{name: m, source: demo}}]
        engines: [{{engine: skyline, name: {engine}}}]
        scenarios: [{{name: 1k/1k, input: 1024, output: 1024, load: {{kind: closed, concurrency: [{concurrency}]}}}}]
        """
    )
    spec = next(iter(suite.points())).model_copy(update={"replicate": replicate})
    estimates = {
        name: Estimate(value=v) if isinstance(v, int | float) else Estimate(value=v[0], low=v[1], high=v[2], n=9)
        for name, v in (metrics or {}).items()
    }
    origin = Provenance(
        skyline_version="0", python_version="3.11", hardware=Hardware(name=hardware), engine_command="skyline serve"
    )
    return PointResult.model_validate(
        {
            "run": run,
            "key": spec.key,
            "spec": spec,
            "status": status,
            "started": when,
            "finished": when,
            "provenance": origin,
            "metrics": estimates,
            **fields,
        }
    )
