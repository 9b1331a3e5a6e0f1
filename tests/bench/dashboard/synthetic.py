"""Results as a store would hold them: 3 engines, 2 models, 3 scenarios, a ladder and 6 dates.

In them: one regression (vllm on demo, 1k/1k, from the fifth date), one failed and one invalid point, one limited by the
client, one failed accuracy gate (llama.cpp on big), one whose run was too short for the interval of its interactivity,
all on the last date, and three replicates of one point.
"""

from __future__ import annotations

import datetime
import math
import random

from skyline.bench import metrics
from skyline.bench.estimate import Estimate
from skyline.bench.results import (
    AccuracyResult,
    ClientHealth,
    Energy,
    Hardware,
    PointResult,
    Provenance,
    Run,
    ServerFacts,
    TokenCheck,
    Verdict,
    Window,
)
from skyline.bench.suite import PointSpec, Suite, parse_suite

SUITE = """
name: nightly
models: [{name: demo, source: skyline/demo}, {name: big, source: org/big}]
engines:
  - {engine: skyline, precision: int8, args: ["--quantization", "int8"]}
  - {engine: vllm, version: 0.11.0, precision: bf16, env: {VLLM_CPU_KVCACHE_SPACE: "4", HF_TOKEN: hf_secret}}
  - {engine: llama.cpp, precision: bf16, args: ["--threads", "2"]}
scenarios:
  - {name: 1k/1k, input: 1024, output: 1024, load: {kind: closed, concurrency: [1, 2, 4, 8, 16]}}
  - {name: 1k/8k, input: 1024, output: 8192, ratio: 0.8, load: {kind: closed, concurrency: [1, 2, 4, 8]}}
  - {name: 8k/1k, input: 8192, output: 1024, load: {kind: poisson, rate: [0.5, 1, 2, 4]}}
"""
# One user's tokens/s, and the concurrency at which an engine saturates.
ENGINES = {"skyline": (46.0, 7.0), "vllm": (34.0, 9.0), "llama.cpp": (52.0, 2.6)}
VERSIONS = {"skyline": "0.1.0", "vllm": "0.11.0", "llama.cpp": "b6900"}
MODELS = {"demo": 1.0, "big": 0.31}
SCENARIOS = {"1k/1k": 1.0, "1k/8k": 0.86, "8k/1k": 0.55}
HARDWARE = {"skyline": "EPYC 9454, 2 cores", "vllm": "EPYC 9454, 2 cores", "llama.cpp": "EPYC 9454, 2 cores"}
BEGIN = datetime.datetime(2026, 11, 10, 3, 0, tzinfo=datetime.UTC)
DATES = 6
LAST = f"run{DATES - 1}"
SHORT = ("llama.cpp", "demo", "1k/1k", 2)
TOO_SHORT = "an interval needs about 140 samples as correlated as these 64, which are worth 7 independent ones"


def around(rng: random.Random, value: float, share: float = 0.02, n: int = 64) -> Estimate:
    """A noisy value with the interval that its noise makes honest."""
    measured = value * math.exp(rng.gauss(0, share / 2))
    return Estimate(value=measured, low=measured * (1 - share), high=measured * (1 + share), n=n)


def results(
    dates: int = DATES, hardware: dict[str, str] | None = None, status: str = "finished"
) -> tuple[list[Run], list[PointResult], list[AccuracyResult]]:
    suite = parse_suite(SUITE)
    runs, points, accuracy = [], [], []
    for date in range(dates):
        started = BEGIN + datetime.timedelta(days=date)
        run = run_of(
            suite,
            f"run{date}",
            started,
            "main" if date < dates - 1 else "release",
            status if date == dates - 1 else "finished",
        )
        runs.append(run)
        for step, spec in enumerate(suite.points()):
            points.append(point_of(spec, run, step, date, (hardware or HARDWARE)[spec.engine.name], date == dates - 1))
        if date == dates - 1:
            points += _replicates(points, run, dates)
        accuracy += [
            _accuracy(run, engine.name, model.name, date == dates - 1)
            for engine in suite.engines
            for model in suite.models
        ]
    return runs, points, accuracy


def run_of(suite: Suite, id: str, started: datetime.datetime, label: str | None, status: str) -> Run:
    return Run(
        id=id,
        suite=suite,
        suite_hash=suite.hash,
        label=label,
        status=status,  # type: ignore[arg-type]
        started=started,
        finished=None if status == "running" else started + datetime.timedelta(hours=2),
        provenance=_provenance(None, "EPYC 9454, 2 cores"),
    )


def point_of(spec: PointSpec, run: Run, step: int, date: int, hardware: str, troubles: bool) -> PointResult:
    """One measured point; on the date of `troubles` some of them fail in the ways that the module names."""
    rng = random.Random(f"{date}-{step}")
    where = (spec.engine.name, spec.model.name, spec.workload.name, spec.level.concurrency or spec.level.rate)
    started = run.started + datetime.timedelta(minutes=step)
    fields: dict[str, object] = {"status": "ok", "reason": None, "metrics": numbers(spec, rng, date)}
    client_limited = False
    if troubles and where == SHORT:
        measured = dict(numbers(spec, rng, date))
        measured["interactivity"] = Estimate(value=measured["interactivity"].value, n=64, refused=TOO_SHORT)
        fields["metrics"] = measured
    if troubles and where == ("vllm", "demo", "1k/1k", 16):
        fields = {"status": "failed", "reason": "the engine ended with code 137: out of memory", "metrics": {}}
    if troubles and where == ("llama.cpp", "demo", "1k/1k", 16):
        fields |= {"status": "invalid", "reason": "prefix cache hits: 31 % of the prompt tokens came from it"}
    if troubles and where == ("skyline", "demo", "1k/1k", 16):
        client_limited = True
    failed = fields["status"] == "failed"
    return PointResult(
        id=f"point-{date}-{step}",
        run=run.id,
        key=spec.key,
        spec=spec,
        started=started,
        finished=started + datetime.timedelta(seconds=50),
        provenance=_provenance(spec, hardware),
        window=None if failed else Window(begin_s=6.1, end_s=41.4, truncated_s=1.1, little=1.01, steady=True),
        server=ServerFacts(startup_s=2.31, peak_memory_bytes=3_400_000_000),
        client=None if failed else _client(client_limited),
        cache=None if failed else Verdict(status="valid", reason="no prompt token came from a cache"),
        tokens=None
        if failed
        else TokenCheck(usage=65536, text=65536, events=65536, tokens_per_event=1.0, bundled=False),
        energy=None if failed else _energy(spec),
        **fields,  # type: ignore[arg-type]
    )


def numbers(spec: PointSpec, rng: random.Random, date: int) -> dict[str, Estimate]:
    """Saturating throughput: n users get n · s / (1 + n / k) tokens/s. The regression takes 14 %."""
    speed, knee = ENGINES[spec.engine.name]
    users = float(spec.level.concurrency or (spec.level.rate or 1) * 3)
    factor = MODELS[spec.model.name] * SCENARIOS[spec.workload.name]
    if (spec.engine.name, spec.model.name, spec.workload.name) == ("vllm", "demo", "1k/1k") and date >= 4:
        factor *= 0.86
    one = speed * factor / (1 + users / knee) * (1 + 1 / knee)
    output = around(rng, users * one)
    watts = around(rng, 62 + 4 * math.log2(users + 1), 0.01)
    ttft = 0.08 / factor * (1 + users / knee) * spec.workload.input / 1024
    interactivity = around(rng, one)
    found = {
        "interactivity": interactivity,
        "output_throughput": output,
        "output_per_device": output,
        "total_throughput": output.scaled(1 + spec.workload.input / spec.workload.output),
        "total_per_device": output.scaled(1 + spec.workload.input / spec.workload.output),
        "request_throughput": output.scaled(1 / spec.workload.output),
        "error_rate": Estimate(value=0.0, n=64),
        "power": watts,
        "tokens_per_mw": output.scaled(1e6 / (watts.value or 1)),
        "ttft_p50": around(rng, ttft, 0.05),
        "ttft_p90": around(rng, ttft * 1.6, 0.08),
        "ttft_p99": Estimate.refuse("p99 needs 662 requests, there are 64", n=64),
        "tpot_p50": interactivity.inverted(),
        "e2e_p50": around(rng, ttft + spec.workload.output / one, 0.03),
        "goodput": around(rng, users * one / spec.workload.output * 0.9, 0.04),
    }
    for key in found:
        metrics.metric_of(key)
    return found


def _replicates(points: list[PointResult], run: Run, dates: int) -> list[PointResult]:
    """Two more of the first point of the last run."""
    first = next(point for point in points if point.run == run.id)
    return [
        first.model_copy(
            update={
                "id": f"{first.id}-r{replicate}",
                "spec": (spec := first.spec.model_copy(update={"replicate": replicate, "seed": replicate})),
                "key": spec.key,
                "finished": first.finished + datetime.timedelta(minutes=replicate),
                "metrics": numbers(spec, random.Random(f"replicate-{replicate}"), dates - 1),
            }
        )
        for replicate in (1, 2)
    ]


def _provenance(spec: PointSpec | None, hardware: str) -> Provenance:
    return Provenance(
        skyline_version="0.1.0",
        python_version="3.11.2",
        hardware=Hardware(name=hardware, cpu="AMD EPYC 9454", cores=2, memory_bytes=24 * 2**30, system="Linux 6.1"),
        engine_version=VERSIONS[spec.engine.name] if spec else None,
        engine_command=f"HF_TOKEN=hf_secret {spec.engine.engine} serve {spec.model.source} --port 8001"
        if spec
        else None,
        engine_packages={"torch": "2.13.0"} if spec else {},
    )


def _client(limited: bool) -> ClientHealth:
    return ClientHealth(
        workers=1,
        loop_lag_mean_s=0.0002,
        loop_lag_p99_s=0.0009,
        schedule_delay_p99_s=0.001,
        cpu_share=0.97 if limited else 0.21,
        null_output_throughput=52_000,
        headroom=1.1 if limited else 14.0,
        limited=limited,
        reason="the workers' CPUs are full" if limited else "the null server gets 14 times as much",
    )


def _energy(spec: PointSpec) -> Energy:
    if spec.engine.name == "llama.cpp" and spec.workload.name == "8k/1k":
        return Energy(
            joules=900, source="RAPL package", verdict=Verdict(status="invalid", reason="other processes ran beside it")
        )
    return Energy(
        joules=2300,
        source="RAPL package",
        verdict=Verdict(status="valid", reason="the machine was idle but for the engine"),
    )


def _accuracy(run: Run, engine: str, model: str, troubles: bool) -> AccuracyResult:
    bad = troubles and (engine, model) == ("llama.cpp", "big")
    return AccuracyResult(
        id=f"accuracy-{run.id}-{engine}-{model}",
        run=run.id,
        engine=engine,
        model=model,
        task="demo",
        exact_match=0.61 if bad else 0.97,
        standard_error=0.022,
        total=500,
        at_least=0.9,
        passed=not bad,
        finished=run.started + datetime.timedelta(hours=1),
    )
