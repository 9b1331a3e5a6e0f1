"""Records to store, plain ones and extreme ones."""

from __future__ import annotations

import datetime
from typing import Any

from skyline.bench.estimate import Estimate
from skyline.bench.results import (
    AccuracyResult,
    ClientHealth,
    Energy,
    Hardware,
    PointResult,
    Provenance,
    RequestTable,
    Run,
    ServerFacts,
    Timeline,
    TokenCheck,
    Verdict,
    Window,
)
from skyline.bench.suite import PointSpec, Suite, parse_suite

MONDAY = datetime.datetime(2026, 11, 23, 9, 30, 0, 123456, tzinfo=datetime.UTC)

SUITE = parse_suite("""
name: stored
models: [{name: demo, source: demo}, {name: "größer 模型", source: other}]
engines: [{engine: skyline}, {engine: url, name: "another's", url: "http://127.0.0.1:1"}]
scenarios:
  - {name: 1k/1k, input: 1024, output: 1024, load: {kind: closed, concurrency: [1, 2]}}
  - {name: chat, input: 10, output: 5, load: {kind: gamma, rate: [0.5], cv: 2}}
""")


def specs(suite: Suite = SUITE) -> list[PointSpec]:
    return list(suite.points())


def provenance(**more: Any) -> Provenance:
    hardware = Hardware(name="2 × vCPU", cpu="EPYC", cores=2, memory_bytes=2**70, flags=["avx2"])
    return Provenance(skyline_version="0.1.0", python_version="3.11.7", hardware=hardware, **more)


def make_run(days: float = 0, **more: Any) -> Run:
    return Run(
        suite=SUITE,
        suite_hash=SUITE.hash,
        started=MONDAY + datetime.timedelta(days=days),
        provenance=provenance(),
        **more,
    )


def make_point(run: Run, spec: PointSpec | None = None, minutes: float = 0, **more: Any) -> PointResult:
    spec = spec or specs()[0]
    begun = run.started + datetime.timedelta(minutes=minutes)
    fields: dict[str, Any] = {
        "run": run.id,
        "key": spec.key,
        "spec": spec,
        "status": "ok",
        "started": begun,
        "finished": begun + datetime.timedelta(seconds=20),
        "provenance": provenance(),
        "metrics": {"output_throughput": Estimate(value=100.0, low=90.0, high=110.0, n=7)},
        **more,
    }
    return PointResult(**fields)


def make_table(requests: int = 3) -> RequestTable:
    steps = [float(i) for i in range(requests)]
    return RequestTable(
        intended=[None] * requests,
        start=steps,
        first=[t + 0.1 for t in steps],
        last=[t + 0.3 for t in steps],
        end=[t + 0.31 for t in steps],
        input=[2**40] * requests,
        output=list(range(requests)),
        error=[None, "ended early: \u0000 \u2028 \U0001f680", ""][:requests] + [None] * (requests - 3),
    )


def make_full_point(run: Run, **more: Any) -> PointResult:
    """Every field set, to values that a careless encoding would lose."""
    return make_point(
        run,
        specs()[-1],
        status="invalid",
        reason='a check failed: "quoted", back\\slash, 换行\n, NUL \0, and \'; DROP TABLE bench_points; --',
        provenance=provenance(engine_version="1", engine_packages={"torch": "2.13.0"}, imported_from="tool: file"),
        metrics={
            "ttft_p99": Estimate.refuse("p99 needs 662 requests, there are 12", 12),
            "tpot_p50": Estimate(value=5e-324, low=-0.0, high=1.7976931348623157e308, n=2**53),
            "e2e_mean": Estimate(value=0.1 + 0.2),
        },
        window=Window(begin_s=1.5, end_s=21.5, truncated_s=0.5, little=0.98, steady=False, reason="drift"),
        server=ServerFacts(startup_s=1.25, peak_memory_bytes=2**63, memory_method="PSS"),
        client=ClientHealth(
            workers=2,
            loop_lag_mean_s=0.0,
            loop_lag_p99_s=1e-9,
            schedule_delay_p99_s=0.0,
            cpu_share=0.999,
            limited=True,
            reason="busy",
        ),
        cache=Verdict(status="unknown", reason=""),
        tokens=TokenCheck(usage=None, text=3, events=1, tokens_per_event=3.0, bundled=True),
        energy=Energy(joules=None, source=None, verdict=Verdict(status="invalid", reason="no meter")),
        requests=make_table(),
        timeline=Timeline(bin_s=0.1, tokens=[0.0, 1.5], running=[1.0, 0.25]),
        **more,
    )


def make_accuracy(run: Run, **more: Any) -> AccuracyResult:
    fields: dict[str, Any] = {
        "run": run.id,
        "engine": "skyline",
        "model": "demo",
        "task": "demo",
        "exact_match": 0.96,
        "standard_error": 0.01,
        "total": 200,
        "at_least": 0.9,
        "passed": True,
        "finished": run.started,
        **more,
    }
    return AccuracyResult(**fields)
