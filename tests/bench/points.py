"""Points that were never measured, for tests of what is made of results."""

from __future__ import annotations

import datetime
from collections.abc import Mapping

from skyline.bench.estimate import Estimate
from skyline.bench.results import AccuracyResult, ClientHealth, Hardware, PointResult, Provenance
from skyline.bench.suite import parse_suite

WHEN = datetime.datetime(2026, 11, 1, 12, tzinfo=datetime.UTC)


def point(
    engine: str = "skyline",
    concurrency: int = 1,
    metrics: Mapping[str, float | tuple[float, float, float] | Estimate] | None = None,
    *,
    run: str = "r",
    replicate: int = 0,
    status: str = "ok",
    when: datetime.datetime = WHEN,
    hardware: str = "2x test core",
    **fields: object,
) -> PointResult:
    """`metrics`: an exact value, (value, low, high), or the whole estimate."""
    suite = parse_suite(
        f"""
        name: s
        models: [{{name: m, source: demo}}]
        engines: [{{engine: skyline, name: {engine}}}]
        scenarios: [{{name: 1k/1k, input: 1024, output: 1024, load: {{kind: closed, concurrency: [{concurrency}]}}}}]
        """
    )
    spec = next(iter(suite.points())).model_copy(update={"replicate": replicate})
    estimates = {name: _estimate(value) for name, value in (metrics or {}).items()}
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


def _estimate(value: float | tuple[float, float, float] | Estimate) -> Estimate:
    if isinstance(value, Estimate):
        return value
    if isinstance(value, tuple):
        middle, low, high = value
        return Estimate(value=middle, low=low, high=high, n=9)
    return Estimate(value=value)


def limited_client() -> ClientHealth:
    return ClientHealth(
        workers=1,
        loop_lag_mean_s=0.001,
        loop_lag_p99_s=0.01,
        schedule_delay_p99_s=0.01,
        cpu_share=0.98,
        limited=True,
        reason="the workers' CPUs are full",
    )


def gate(engine: str, *, run: str = "r", passed: bool = False) -> AccuracyResult:
    return AccuracyResult(
        run=run, engine=engine, model="m", task="demo", exact_match=0.95 if passed else 0.1, standard_error=0.01,
        total=500, at_least=0.9, passed=passed, reason=None if passed else "10.0% of 500 right, 90.0% asked for",
    )  # fmt: skip
