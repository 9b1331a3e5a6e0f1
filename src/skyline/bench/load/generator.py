"""A load from its plan to what was seen of it: sets up the workers and decides when there is enough."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from skyline.bench.load import messages
from skyline.bench.load.arrivals import lengths, read_trace, schedule
from skyline.bench.load.observed import Array, Observed, merge
from skyline.bench.load.processes import LoadError, WorkerProcess, started
from skyline.bench.load.prompts import PromptSource, TokenCounter
from skyline.bench.loads import Level
from skyline.bench.suite import Measure, Workload
from skyline.bench.wording import number_of

# Clients that one worker serves before a second one helps, where cores allow it.
_CLIENTS_PER_WORKER = 64
_KEPT_TEXTS = 32
_LENGTHS = 1 << 16
_START_S = 0.2
_TICK_S = 0.1
_SHARED_PREFIX = 1 << 40  # request number of the sessions' common opening


@dataclass(frozen=True)
class LoadPlan:
    """One point's load. `extra` goes into each request's body, as {"ignore_eos": true} does for engines that know
    it."""

    url: str
    model: str
    workload: Workload
    level: Level
    measure: Measure
    seed: int
    salt: int
    headers: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.workload.chat else "/v1/completions"

    @property
    def wanted_requests(self) -> int:
        """Requests that should end within the window."""
        clients = self.level.concurrency or 0
        return max(self.measure.requests, clients * self.measure.requests_per_client)


@dataclass(frozen=True)
class Live:
    """What is known while the load runs; `phase` is warming up or measuring."""

    phase: str
    seconds: float
    ended: int
    failed: int
    tokens: int
    under_way: int
    last_error: str | None


def default_workers(level: Level) -> int:
    """One for every 64 clients, on at most half of the cores: the server may need the others."""
    cores = len(os.sched_getaffinity(0))
    wanted = math.ceil((level.concurrency or _CLIENTS_PER_WORKER) / _CLIENTS_PER_WORKER)
    return max(1, min(wanted, cores // 2))


async def generate(
    plan: LoadPlan,
    counter: TokenCounter,
    *,
    watch: Callable[[Live], None] = lambda live: None,
    alive: Callable[[], str | None] = lambda: None,
    all_texts: bool = False,
) -> Observed:
    """Runs the load until there is enough (Measure says how much). Raises LoadError, and SuiteError for a plan that
    cannot be carried out. `alive` is asked now and then why the server died, if it did."""
    workers = plan.measure.workers or default_workers(plan.level)
    if plan.level.concurrency is not None:
        workers = min(workers, plan.level.concurrency)
    setups = _setups(plan, counter, workers, all_texts)
    arrivals = sum(len(setup.starts or []) for setup in setups)
    async with started(setups) as processes:
        begin = perf_counter() + _START_S
        for process in processes:
            process.write(begin)
        warm_s, stopped = await _wait_until_enough(plan, processes, arrivals, begin, watch, alive)
        stop_s = perf_counter() - begin
        for process in processes:
            process.write(0.0)
        reports = [await process.report() for process in processes]
    return merge(reports, begin, warm_s, stop_s, stopped)


def _setups(plan: LoadPlan, counter: TokenCounter, workers: int, all_texts: bool) -> list[messages.Setup]:
    workload, level, measure = plan.workload, plan.level, plan.measure
    source = PromptSource.calibrate(counter, workload.chat, plan.salt)
    inputs = lengths(workload.input, workload.ratio, _LENGTHS, plan.seed, stream=0)
    outputs = lengths(workload.output, workload.ratio, _LENGTHS, plan.seed, stream=1)
    starts: Array | None = None
    if level.kind == "trace":
        assert level.trace is not None and level.rate is not None
        trace = read_trace(level.trace, level.rate)
        starts, inputs, outputs = trace.times, trace.input, trace.output
    elif level.kind != "closed":
        starts = schedule(level, measure.warmup_s + measure.max_s, plan.seed)
    source.content(0, min(inputs))  # raises if the shortest cannot be made

    fields = {"model": plan.model, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    fields |= plan.extra
    opening, opening_tokens = [], 0
    turns = 1
    if workload.sessions is not None:
        turns = workload.sessions.turns
        if workload.sessions.shared_prefix:
            text = source.content(_SHARED_PREFIX, workload.sessions.shared_prefix + source.overhead)
            opening = [{"role": "system", "content": text}]
            opening_tokens = counter.opening(opening)
    return [
        messages.Setup(
            worker=number,
            workers=workers,
            url=plan.url,
            path=plan.path,
            headers=plan.headers,
            body=_body(fields, workload.chat),
            words=source.words,
            overhead=source.overhead,
            salt=plan.salt,
            inputs=inputs,
            outputs=outputs,
            timeout_s=measure.request_timeout_s,
            keep_texts=None if all_texts or turns > 1 else math.ceil(_KEPT_TEXTS / workers),
            clients=0 if level.concurrency is None else _share(level.concurrency, number, workers),
            think_time_s=level.think_time_s,
            starts=None if starts is None else starts[number::workers].tolist(),
            turns=turns,
            opening=opening,
            opening_tokens=opening_tokens,
            request=fields,
        )
        for number in range(workers)
    ]


def _share(clients: int, number: int, workers: int) -> int:
    return clients // workers + (number < clients % workers)


def _body(fields: dict[str, Any], chat: bool) -> messages.Body:
    content = "\x01content\x01"  # cannot stand in a name: it would be escaped there
    whole = {**fields, **({"messages": [{"role": "user", "content": content}]} if chat else {"prompt": content})}
    text = json.dumps({**whole, "max_tokens": "\x01tokens\x01"})
    head, rest = text.split(json.dumps(content)[1:-1])
    middle, tail = rest.split(json.dumps("\x01tokens\x01"))
    return messages.Body(head.encode(), middle.encode(), tail.encode())


async def _wait_until_enough(
    plan: LoadPlan,
    processes: list[WorkerProcess],
    arrivals: int,
    begin: float,
    watch: Callable[[Live], None],
    alive: Callable[[], str | None],
) -> tuple[float, str | None]:
    """The end of the warm-up in seconds since the begin, and why the load ended early, if it did. `arrivals`: how many
    requests an open load has until `max_s`, or a trace at all."""
    measure, kind = plan.measure, plan.level.kind
    # Every client of a closed loop has had an answer before anything counts.
    warm_requests = plan.level.concurrency or 1
    hopeless = max(20, 3 * warm_requests)
    warm_s: float | None = None
    ended_warm = 0
    while True:
        await asyncio.sleep(_TICK_S)
        now = perf_counter() - begin
        seen = [process.progress for process in processes]
        ended, failed = sum(p.ended for p in seen), sum(p.failed for p in seen)
        last_error = next((p.last_error for p in seen if p.last_error), None)
        phase = "warming up" if warm_s is None else "measuring"
        tokens, under_way = sum(p.tokens for p in seen), sum(p.under_way for p in seen)
        watch(Live(phase, now, ended, failed, tokens, under_way, last_error))

        for process in processes:
            if process.failure is not None:
                raise LoadError(process.failure)
        if (dead := alive()) is not None:
            raise LoadError(f"the engine ended while it was measured: {dead}")
        if failed == ended >= hopeless:
            raise LoadError(f"all of the first {number_of(failed, 'request')} failed, the last with: {last_error}")
        if warm_s is None and now >= measure.warmup_s and ended - failed >= warm_requests:
            warm_s, ended_warm = now, ended
        over = now >= measure.warmup_s + measure.max_s
        replayed = kind == "trace" and ended >= arrivals
        if warm_s is not None:
            in_window = ended - ended_warm
            enough = now - warm_s >= measure.min_s and in_window >= plan.wanted_requests
            if replayed or (kind == "ramp" and over) or (kind not in ("ramp", "trace") and enough):
                return warm_s, None
            if over and kind == "trace":
                of_all = f"{ended} of its {number_of(arrivals, 'request')}"
                return warm_s, f"`max_s` ({measure.max_s:g} s) cut the trace: {of_all} ended"
            if over:
                return (
                    warm_s,
                    f"{in_window} of {number_of(plan.wanted_requests, 'request')} ended within {measure.max_s:g} s",
                )
        elif replayed:
            why = f"; the last error: {last_error}" if last_error else ""
            raise LoadError(
                f"all {number_of(arrivals, 'request')} of the trace ended within the warm-up of {measure.warmup_s:g} s "
                f"({failed} failed{why}); lower `warmup_s`, or take a longer trace"
            )
        elif over:
            why = f"; the last error: {last_error}" if last_error else ""
            raise LoadError(
                f"only {number_of(ended - failed, 'request')} ended well within {now:.0f} s, too few to measure "
                f"({failed} failed{why}); raise `max_s`, or lower the load or the lengths"
            )
