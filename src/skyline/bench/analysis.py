"""From what the load generator saw to the numbers that are reported. Pure: no I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from skyline.bench.estimate import Estimate
from skyline.bench.load.observed import Observed
from skyline.bench.loads import Level
from skyline.bench.metrics import QUANTILES
from skyline.bench.results import RequestTable, Timeline, Window
from skyline.bench.stats.goodput import meets
from skyline.bench.stats.means import mean, rate, share
from skyline.bench.stats.quantiles import quantile
from skyline.bench.stats.steady import is_steady, little, truncation
from skyline.bench.suite import Slo

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_BIN_S = 0.1
_MAX_BINS = 6000
LITTLE_TOLERANCE = 0.1


@dataclass
class Analysis:
    """`ended` marks the requests that ended well within the window; `output` is everyone's number of output tokens,
    `first` and `last` when the first and the last of them arrived."""

    metrics: dict[str, Estimate]
    window: Window
    table: RequestTable
    timeline: Timeline
    ended: Mask
    output: Array
    first: Array
    last: Array


def analyse(seen: Observed, output: Array, level: Level, devices: int, slo: Slo | None) -> Analysis:
    """`output`: output tokens of each request, NaN where it is not known because the request did not end."""
    weights = _tokens_per_event(seen, output)
    timeline = _timeline(seen, weights, output)
    window = _window(seen, timeline, level)
    ok = np.array([error is None for error in seen.error]) & ~np.isnan(seen.end)
    inside = (seen.end > window.begin_s) & (seen.end <= window.end_s)
    failed = inside & ~ok
    ended = inside & ok
    first, last = _first_and_last(seen, output)
    metrics = _latencies(seen, first, last, output, ended)
    metrics |= _rates(seen, timeline, window, output, ended, failed)
    if slo is not None:
        metrics |= _goodput(seen, first, last, output, ended, failed, window, timeline.bin_s, slo)
    metrics |= _derived(metrics, devices)
    return Analysis(metrics, window, _table(seen, first, last, output), timeline, ended, output, first, last)


def _first_and_last(seen: Observed, output: Array) -> tuple[Array, Array]:
    """When the first and the last token of each request arrived.

    Where there are more tokens than events with text, the last one may have had none, as those after an end token that
    is ignored have none; the server then says when it was done."""
    events = seen.events
    first = np.full(len(seen.start), np.nan)
    last = np.full(len(seen.start), np.nan)
    some = events > 0
    first[some] = seen.event_times[seen.offsets[:-1][some]]
    last[some] = seen.event_times[seen.offsets[1:][some] - 1]
    more = some & (output > events)
    last[more] = np.fmax(last[more], seen.finished[more])
    return first, last


def _tokens_per_event(seen: Observed, output: Array) -> Array:
    """Of each request; the mean of all where it is not known."""
    events = seen.events
    known = ~np.isnan(output) & (events > 0)
    usual = output[known].sum() / events[known].sum() if known.any() else 1.0
    result = np.full(len(output), usual)
    result[known] = output[known] / events[known]
    return result


def _timeline(seen: Observed, weights: Array, output: Array) -> Timeline:
    bin_s = _BIN_S
    while seen.stop_s / bin_s > _MAX_BINS:
        bin_s *= 2
    bins = max(1, int(np.ceil(seen.stop_s / bin_s)))
    edges = bin_s * np.arange(bins + 1, dtype=np.float64)
    textless = (seen.events == 0) & (output > 0)
    times = np.concatenate([seen.event_times, seen.end[textless]])
    counts = np.concatenate([np.repeat(weights, seen.events), output[textless]])
    tokens, _ = np.histogram(times, edges, weights=counts)
    # The integral of the number under way up to t is the sum of (t − start)⁺ − (t − end)⁺.
    ends = np.where(np.isnan(seen.end), np.inf, seen.end)
    integral = _ramps(np.sort(seen.start), edges) - _ramps(np.sort(ends[np.isfinite(ends)]), edges)
    running = np.diff(integral) / bin_s
    return Timeline(bin_s=bin_s, tokens=_rounded(tokens, 3), running=_rounded(running, 3))


def _ramps(times: Array, at: Array) -> Array:
    before = np.searchsorted(times, at)
    sums = np.concatenate([[0.0], np.cumsum(times)])
    result: Array = before * at - sums[before]
    return result


def _window(seen: Observed, timeline: Timeline, level: Level) -> Window:
    """From the end of the warm-up to the end of the load. In a closed loop, later where MSER finds that the start still
    shows.

    Open loads are not cut: what is left out with the least error of the mean may be a stall, the very thing that
    intended starts are there to show. Where their start still shows, it is seen as drift."""
    first_bin = int(np.ceil(seen.warm_s / timeline.bin_s))
    last_bin = int(seen.stop_s / timeline.bin_s)
    begin = seen.warm_s
    if level.kind == "closed" and last_bin - first_bin >= 20:
        begin = (first_bin + truncation(np.array(timeline.tokens[first_bin:last_bin]))) * timeline.bin_s
    end = seen.stop_s
    ended = (seen.end > begin) & (seen.end <= end)
    ratio: float | None = None
    steady, reason = True, None
    if level.kind in ("ramp", "trace"):
        steady, reason = False, f"a {level.kind} is not meant to be steady"
    elif not ended.any():
        steady, reason = False, "no request ended"
    else:
        edges = np.array([begin, end])
        ends = np.where(np.isnan(seen.end), np.inf, seen.end)
        area = np.diff(_ramps(np.sort(seen.start), edges) - _ramps(np.sort(ends[np.isfinite(ends)]), edges))[0]
        residence = float(np.mean(seen.end[ended] - seen.start[ended]))
        ratio = little(float(area) / (end - begin), float(ended.sum()) / (end - begin), residence)
        # With few requests the ratio is off by those cut at the edges, not by drift: half of a mean request at either.
        allowed = max(LITTLE_TOLERANCE, 2.0 / np.sqrt(ended.sum()))
        inside = np.array(timeline.tokens[round(begin / timeline.bin_s) : last_bin])
        steady, said = is_steady(inside, ratio, tolerance=allowed)
        reason = None if steady else said
    return Window(
        begin_s=round(begin, 6),
        end_s=round(end, 6),
        truncated_s=round(max(0.0, begin - seen.warm_s), 6),
        little=None if ratio is None else round(ratio, 4),
        steady=steady,
        reason=reason,
    )


def _latencies(seen: Observed, first: Array, last: Array, output: Array, ended: Mask) -> dict[str, Estimate]:
    many = ended & (output > 1) & (seen.events > 1)
    samples = {
        "ttft": (first - seen.start)[ended & (seen.events > 0)],
        "ttft_intended": (first - seen.intended)[ended & (seen.events > 0)],
        "tpot": ((last - first) / np.maximum(output - 1, 1))[many],
        "itl": _gaps(seen, many),
        "e2e": (last - seen.start)[ended & (seen.events > 0)],
        "e2e_intended": (last - seen.intended)[ended & (seen.events > 0)],
    }
    metrics = {}
    for name, values in samples.items():
        if not values.size:
            continue
        values = np.round(values, 9)  # what is below a nanosecond is arithmetic
        metrics[f"{name}_mean"] = mean(values)
        for label, q in QUANTILES.items():
            metrics[f"{name}_{label}"] = quantile(values, q)
    return metrics


def _gaps(seen: Observed, chosen: Mask) -> Array:
    """Times between events within one request, of all chosen requests in order."""
    if seen.event_times.size < 2:
        return np.empty(0)
    owner = np.repeat(np.arange(len(seen.start)), seen.events)
    within = (owner[1:] == owner[:-1]) & chosen[owner[1:]]
    gaps: Array = np.diff(seen.event_times)[within]
    return gaps


def _rates(
    seen: Observed, timeline: Timeline, window: Window, output: Array, ended: Mask, failed: Mask
) -> dict[str, Estimate]:
    first_bin = round(window.begin_s / timeline.bin_s)
    last_bin = max(first_bin + 1, int(window.end_s / timeline.bin_s))
    edges = np.arange(first_bin, last_bin + 1) * timeline.bin_s
    out = np.array(timeline.tokens[first_bin:last_bin])
    done, _ = np.histogram(seen.end[ended], edges)
    taken, _ = np.histogram(seen.end[ended], edges, weights=seen.input[ended])
    counted = ended | failed
    return {
        "output_throughput": rate(out, timeline.bin_s),
        "request_throughput": rate(done, timeline.bin_s),
        "input_throughput": rate(taken, timeline.bin_s),
        "total_throughput": rate(out + taken, timeline.bin_s),
        "error_rate": share(failed[counted]) if counted.any() else Estimate.refuse("no request ended"),
    }


def _goodput(
    seen: Observed,
    first: Array,
    last: Array,
    output: Array,
    ended: Mask,
    failed: Mask,
    window: Window,
    bin_s: float,
    slo: Slo,
) -> dict[str, Estimate]:
    tpot = np.where(output > 1, (last - first) / np.maximum(output - 1, 1), np.nan)
    good = ended & meets(first - seen.start, tpot, last - seen.start, slo)
    edges = np.arange(window.begin_s, window.end_s + bin_s / 2, bin_s)
    counts, _ = np.histogram(seen.end[good], edges)
    counted = ended | failed
    return {
        "goodput": rate(counts, bin_s),
        "goodput_share": share(good[counted]) if counted.any() else Estimate.refuse("no request ended"),
    }


def _derived(metrics: dict[str, Estimate], devices: int) -> dict[str, Estimate]:
    derived = {}
    tpot = metrics.get("tpot_p50")
    if tpot is not None:
        derived["interactivity"] = tpot.inverted()
    for name in ("output", "input", "total"):
        derived[f"{name}_per_device"] = metrics[f"{name}_throughput"].scaled(1.0 / devices)
    return derived


def _table(seen: Observed, first: Array, last: Array, output: Array) -> RequestTable:
    errors = [
        "under way at the end" if error is None and np.isnan(end) else error
        for error, end in zip(seen.error, seen.end, strict=True)
    ]
    return RequestTable(
        intended=_optional(seen.intended),
        start=_optional(seen.start),
        first=_optional(first),
        last=_optional(last),
        end=_optional(seen.end),
        input=seen.input.tolist(),
        output=np.nan_to_num(output).astype(int).tolist(),
        error=errors,
    )


def _optional(values: Array) -> list[float | None]:
    return [None if np.isnan(value) else round(value, 6) for value in values.tolist()]


def _rounded(values: Array, digits: int) -> list[float]:
    rounded: list[float] = np.round(values, digits).tolist()
    return rounded
