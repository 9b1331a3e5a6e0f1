"""Measures one point at an endpoint that runs: load, analysis, checks."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from skyline.bench.analysis import Analysis, analyse
from skyline.bench.checks import cache_verdict, client_health, objections, token_check
from skyline.bench.energy import EnergyMeter
from skyline.bench.engines.base import Endpoint
from skyline.bench.estimate import Estimate
from skyline.bench.load.generator import Live, LoadPlan, default_workers, generate
from skyline.bench.load.http import Reply, ask
from skyline.bench.load.null import null_server
from skyline.bench.load.observed import Observed
from skyline.bench.load.processes import LoadError
from skyline.bench.load.prompts import PromptSource, TokenCounter
from skyline.bench.loads import Level
from skyline.bench.metrics import cost_per_mtok, tokens_per_mw
from skyline.bench.results import Energy, PointResult, Provenance, Verdict, now
from skyline.bench.suite import Measure, PointSpec, SuiteError, Workload

Watch = Callable[[Live], None]

_NULL_SECONDS = 1.5
_PROBE_TOKENS = 4
# Seconds for those few tokens, less where requests are given less: an endpoint that hangs is found out by each point.
_PROBE_TIMEOUT_S = 60.0
_ALIVE_TIMEOUT_S = 20.0
_ENERGY_ELSEWHERE = Energy(
    joules=None,
    source=None,
    verdict=Verdict(status="unknown", reason="the endpoint was not started here, and may run on another machine"),
)


@dataclass
class Bench:
    """What points of one run share: tokenizers, and what the client reaches against a server that does nothing."""

    counters: dict[str, TokenCounter] = field(default_factory=dict)
    null: dict[tuple[Any, ...], tuple[float, float] | None] = field(default_factory=dict)

    def counter(self, spec: PointSpec) -> TokenCounter:
        """Raises SuiteError if the model has no tokenizer."""
        name = spec.model.tokenizer or spec.model.source
        if name not in self.counters:
            self.counters[name] = TokenCounter(name)
        return self.counters[name]


def measure_point(
    bench: Bench,
    spec: PointSpec,
    endpoint: Endpoint,
    *,
    run: str,
    provenance: Provenance,
    price: float | None,
    watch: Watch = lambda live: None,
) -> PointResult:
    """Never raises for what the endpoint does: that becomes a failed point with its reason."""
    started = now()
    try:
        return asyncio.run(_measure(bench, spec, endpoint, run, provenance, price, watch, started))
    except (LoadError, SuiteError, OSError) as error:
        return failed_point(spec, run, provenance, str(error), started)


def failed_point(
    spec: PointSpec, run: str, provenance: Provenance, reason: str, started: datetime.datetime | None = None
) -> PointResult:
    return PointResult(
        run=run,
        key=spec.key,
        spec=spec,
        status="failed",
        reason=reason,
        started=started or now(),
        finished=now(),
        provenance=provenance,
    )


async def _measure(
    bench: Bench,
    spec: PointSpec,
    endpoint: Endpoint,
    run: str,
    provenance: Provenance,
    price: float | None,
    watch: Watch,
    started: datetime.datetime,
) -> PointResult:
    counter = bench.counter(spec)
    plan = LoadPlan(
        url=endpoint.url,
        model=endpoint.model,
        workload=spec.workload,
        level=spec.level,
        measure=spec.measure,
        seed=spec.seed,
        # Unlike the seed it is new each time: what was asked in an earlier run may still lie in a prefix cache.
        salt=secrets.randbits(63),
        headers=endpoint.headers,
        extra=endpoint.ignore_eos,
    )
    overhead = PromptSource.calibrate(counter, spec.workload.chat, plan.salt).overhead
    has_usage = await _reports_usage(plan)
    before = endpoint.cache_counters()
    with EnergyMeter() if spec.engine.url is None else contextlib.nullcontext() as meter:
        seen = await generate(plan, counter, watch=watch, alive=endpoint.alive, all_texts=not has_usage)
    after = endpoint.cache_counters()
    text_tokens = {i: counter.text(text) for i, text in seen.texts.items() if _countable(text, seen.usage[i])}
    analysis = analyse(seen, _output_tokens(seen, text_tokens), spec.level, spec.engine.devices, spec.slo)
    energy = _ENERGY_ELSEWHERE
    if meter is not None:
        energy = meter.energy(seen.began + analysis.window.begin_s, seen.began + analysis.window.end_s)
    cache = cache_verdict(plan, seen, overhead, before, after)
    null = await _null(bench, plan, counter, analysis)
    client = client_health(seen, analysis, *(null or (None, None)))
    tokens = token_check(seen, analysis, text_tokens)
    reasons = objections(plan, seen, analysis, cache, tokens)
    notes = [seen.stopped] if seen.stopped and seen.stopped not in reasons else []
    return PointResult(
        run=run,
        key=spec.key,
        spec=spec,
        status="invalid" if reasons else "ok",
        reason="; ".join(reasons + notes) or None,
        started=started,
        finished=now(),
        provenance=provenance,
        metrics=analysis.metrics | _economics(analysis, energy, spec.engine.devices, price),
        window=analysis.window,
        server=endpoint.facts(),
        client=client,
        cache=cache,
        tokens=tokens,
        energy=energy,
        requests=analysis.table,
        timeline=analysis.timeline,
    )


def _countable(text: str, usage: float) -> bool:
    """Cut characters became U+FFFD, of other tokens than they came of: such a text only counts where nothing else
    does."""
    return math.isnan(usage) or "\ufffd" not in text


def _output_tokens(seen: Observed, text_tokens: dict[int, int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """As usage says, else as the tokenizer counts the text."""
    output = seen.usage.copy()
    for i, tokens in text_tokens.items():
        if np.isnan(output[i]):
            output[i] = tokens
    return output


def _economics(analysis: Analysis, energy: Energy, devices: int, price: float | None) -> dict[str, Estimate]:
    found = {}
    throughput = analysis.metrics["output_throughput"].value
    if energy.joules is not None and energy.verdict.status == "valid" and throughput:
        watts = energy.joules / analysis.window.seconds
        found["power"] = Estimate(value=watts, n=1)
        found["energy_per_token"] = Estimate(value=watts / throughput, n=1)
        found["tokens_per_mw"] = Estimate(value=tokens_per_mw(throughput, watts), n=1)
    if price is not None and throughput:
        found["cost_per_mtok"] = Estimate(value=cost_per_mtok(throughput, price, devices), n=1)
    return found


async def _reports_usage(plan: LoadPlan) -> bool:
    """Asks for a few tokens as the load will. Raises LoadError if there is no usable answer."""
    timeout_s = min(_PROBE_TIMEOUT_S, plan.measure.request_timeout_s)
    reply = await _probe(plan.url, plan.path, plan.model, plan.headers, plan.extra, timeout_s)
    if reply.error is not None:
        raise LoadError(f"{plan.url}{plan.path} does not answer a request for {_PROBE_TOKENS} tokens: {reply.error}")
    return reply.output is not None


def answers(endpoint: Endpoint, spec: PointSpec) -> bool:
    """Whether it still generates tokens."""
    path = "/v1/chat/completions" if spec.workload.chat else "/v1/completions"
    timeout_s = min(_ALIVE_TIMEOUT_S, spec.measure.request_timeout_s)
    probe = _probe(endpoint.url, path, endpoint.model, endpoint.headers, endpoint.ignore_eos, timeout_s)
    return asyncio.run(probe).error is None


async def _probe(
    url: str, path: str, model: str, headers: dict[str, str], extra: dict[str, Any], timeout_s: float
) -> Reply:
    content = "Say hello."
    fields: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    fields |= {"temperature": 0, "max_tokens": _PROBE_TOKENS} | extra
    fields |= {"messages": [{"role": "user", "content": content}]} if "/chat/" in path else {"prompt": content}
    return await ask(url, path, headers, fields, timeout_s)


async def _null(bench: Bench, plan: LoadPlan, counter: TokenCounter, analysis: Analysis) -> tuple[float, float] | None:
    """Output tok/s and median TTFT of the same clients against a server that does nothing."""
    running = float(np.mean(analysis.timeline.running)) if analysis.timeline.running else 1.0
    clients = plan.level.concurrency or max(1, round(running))
    workers = plan.measure.workers or default_workers(plan.level)
    key = (clients, workers, plan.workload.input, plan.workload.output, plan.workload.chat)
    if key not in bench.null:
        level = Level(kind="closed", concurrency=clients)
        # Long answers of many clients would not end within the time; their rate is the same.
        workload = Workload(
            name="null",
            input=min(plan.workload.input, 8192),
            output=min(plan.workload.output, 128),
            ratio=1.0,
            chat=plan.workload.chat,
            sessions=None,
        )
        measure = Measure(
            warmup_s=0.3, min_s=_NULL_SECONDS, max_s=10, requests=1, requests_per_client=0, workers=workers
        )
        async with null_server() as url:
            null_plan = LoadPlan(url, "null", workload, level, measure, plan.seed, plan.salt)
            try:
                seen = await generate(null_plan, counter)
            except (LoadError, SuiteError):
                bench.null[key] = None
            else:
                bench.null[key] = _null_figures(seen)
    return bench.null[key]


def _null_figures(seen: Observed) -> tuple[float, float]:
    inside = (seen.event_times > seen.warm_s) & (seen.event_times <= seen.stop_s)
    some = seen.events > 0
    ttft = seen.event_times[seen.offsets[:-1][some]] - seen.start[some]
    return float(inside.sum()) / (seen.stop_s - seen.warm_s), float(np.median(ttft))


def log_path(folder: Path, name: str) -> Path:
    """Where an engine's log goes: a file name of letters, digits and hyphens."""
    safe = "".join(char if char.isalnum() or char in "-_." else "-" for char in name)
    return folder / f"{safe}.log"
