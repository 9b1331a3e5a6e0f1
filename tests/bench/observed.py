"""Loads that were never sent: what the workers would have seen, for tests of what is made of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skyline.bench.load.generator import LoadPlan
from skyline.bench.load.observed import Observed
from skyline.bench.loads import Level
from skyline.bench.suite import Measure, Workload


def observed(
    start: Sequence[float],
    ttft: Sequence[float] | float,
    gap: float,
    tokens: int = 10,
    *,
    late: float = 0.0,
    input_tokens: int = 100,
    usage: bool = True,
    error: dict[int, str] | None = None,
    warm_s: float = 1.0,
    stop_s: float = 11.0,
    tokens_per_event: int = 1,
    without_text: int = 0,
) -> Observed:
    """Requests that start then, have their first token after `ttft`, and one event each `gap` seconds; the last
    `without_text` events have no text, and are no events to the load generator. Those that would end after `stop_s` are
    under way at the end."""
    begin = np.array(start, dtype=float)
    count = len(begin)
    first = begin + np.broadcast_to(np.array(ttft, dtype=float), (count,))
    times: list[np.ndarray] = []
    end = np.full(count, np.nan)
    errors: list[str | None] = [(error or {}).get(i) for i in range(count)]
    for i in range(count):
        events = first[i] + gap * np.arange(tokens // tokens_per_event)
        if errors[i] is not None:
            events, end[i] = events[:0], first[i]
        elif events[-1] <= stop_s:
            end[i] = events[-1]
        events = events[: len(events) - without_text]
        times.append(events[events <= stop_s])
    done = ~np.isnan(end) & np.array([e is None for e in errors])
    return Observed(
        index=np.arange(count),
        intended=begin - late,
        start=begin,
        end=end,
        finished=np.where(done, end, np.nan),
        input=np.full(count, input_tokens),
        target=np.full(count, tokens),
        usage=np.where(done & usage, float(tokens), np.nan),
        cached=np.full(count, np.nan),
        error=errors,
        event_times=np.concatenate(times) if times else np.empty(0),
        offsets=np.concatenate([[0], np.cumsum([len(events) for events in times])]).astype(np.int64),
        texts={},
        planned_input=np.full(count, float(input_tokens)),
        lags=np.full(100, 0.0005),
        lag_times=np.linspace(0, stop_s, 100),
        cpu=[[(t, 0.1 * t) for t in np.arange(0, stop_s, 0.25).tolist()]],
        repeated_prompts=0,
        workers=1,
        warm_s=warm_s,
        stop_s=stop_s,
        stopped=None,
        began=0.0,
    )


def load_plan(level: Level | None = None, **fields: object) -> LoadPlan:
    workload = {"name": "w", "input": 100, "output": 10, "ratio": 1.0, "chat": True, "sessions": None, **fields}
    level = level or Level(kind="closed", concurrency=2)
    return LoadPlan("http://127.0.0.1:1", "m", Workload.model_validate(workload), level, Measure(), seed=0, salt=0)
