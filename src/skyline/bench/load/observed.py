"""What the workers saw of a load, put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from skyline.bench.load import messages

Array = npt.NDArray[np.float64]


@dataclass
class Observed:
    """What the workers saw, merged in order of sending; `index` is the request's number in the load. Times are
    seconds since the load's begin; `end` is NaN where a request was under way when the load ended, `finished` (when the
    server said that it had generated the last token) where it did not say so. `texts` are those of every k-th request.
    `event_times[offsets[i]:offsets[i + 1]]` are request i's events."""

    index: npt.NDArray[np.int64]
    intended: Array
    start: Array
    end: Array
    finished: Array
    input: npt.NDArray[np.int64]
    target: npt.NDArray[np.int64]
    usage: Array  # output tokens as usage reports them, NaN where it does not
    cached: Array  # prompt tokens from a prefix cache as usage reports them, NaN where it does not
    error: list[str | None]
    event_times: Array
    offsets: npt.NDArray[np.int64]
    texts: dict[int, str]
    planned_input: Array  # tokens meant to be sent, NaN for what follows a session's first turn
    lags: Array
    lag_times: Array
    cpu: list[list[tuple[float, float]]]  # (time, CPU seconds) of each worker
    repeated_prompts: int
    workers: int
    warm_s: float
    stop_s: float
    stopped: str | None  # why before there was enough, or None
    began: float  # on perf_counter's clock

    @property
    def events(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)


def merge(
    reports: list[messages.Report],
    begin: float,
    warm_s: float,
    stop_s: float,
    stopped: str | None,
) -> Observed:
    """Of all workers; `begin` is the load's on perf_counter's clock, the other times are seconds since then."""

    def column(name: str, dtype: type = np.float64) -> Any:
        return np.concatenate([np.array(getattr(report, name), dtype=dtype) for report in reports])

    start = column("start")
    order = np.argsort(start, kind="stable")
    counts = column("events", np.int64)
    events = np.frombuffer(b"".join(report.event_times for report in reports))
    ends = np.cumsum(counts)
    first = ends - counts
    pieces = [events[first[i] : ends[i]] for i in order]
    texts: dict[int, str] = {}
    base = 0
    for report in reports:
        texts |= {base + position: text for position, text in report.texts.items()}
        base += len(report.start)
    place = np.argsort(order)
    end, finished = column("end")[order], column("finished")[order]
    errors = [error for report in reports for error in report.error]
    return Observed(
        index=column("index", np.int64)[order],
        intended=column("intended")[order] - begin,
        start=start[order] - begin,
        end=np.where(end > 0, end - begin, np.nan),
        finished=np.where(finished > 0, finished - begin, np.nan),
        input=column("input", np.int64)[order],
        target=column("target", np.int64)[order],
        usage=column("output")[order],
        cached=column("cached")[order],
        error=[errors[i] for i in order],
        event_times=(np.concatenate(pieces) if pieces else np.empty(0)) - begin,
        offsets=np.concatenate([[0], np.cumsum(counts[order])]),
        texts={int(place[position]): text for position, text in texts.items()},
        planned_input=column("planned")[order],
        lags=np.frombuffer(b"".join(report.lags for report in reports)),
        lag_times=np.frombuffer(b"".join(report.lag_times for report in reports)) - begin,
        cpu=[[(at - begin, used) for at, used in report.cpu_times] for report in reports],
        repeated_prompts=sum(report.repeated_prompts for report in reports),
        workers=len(reports),
        warm_s=warm_s,
        stop_s=stop_s,
        stopped=stopped,
        began=begin,
    )
