"""What speaks for or against a measurement: the client's own limits, prefix caches, counts of tokens. Pure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from skyline.bench.analysis import LITTLE_TOLERANCE, Analysis
from skyline.bench.load.generator import LoadPlan
from skyline.bench.load.observed import Observed
from skyline.bench.results import ClientHealth, TokenCheck, Verdict

MIN_HEADROOM = 1.5
MAX_CPU_SHARE = 0.85
# Of the mean TTFT: events are noted late by the mean lag, which cancels in the time between two of them.
MAX_LAG_SHARE = 0.1
MAX_DELAY_SHARE = 0.1  # of the mean TTFT
# Lateness below this is nobody's concern.
_SMALL_S = 0.005
_SMALL_LAG_S = 0.001
_BUNDLED = 1.05
_SHORT = 0.95
# Usage and text may differ by this share.
_MISCOUNTED = 0.05
# Tokens without text take at least this share of the time of those with it.
_TIME_OF_TEXTLESS = 0.8
_MAX_ERRORS = 0.05


def client_health(
    seen: Observed, analysis: Analysis, null_throughput: float | None, null_ttft: float | None
) -> ClientHealth:
    """`null_throughput`: output tok/s of the same load against a server that does nothing."""
    window = analysis.window
    inside = (seen.lag_times > window.begin_s) & (seen.lag_times <= window.end_s)
    lags = seen.lags[inside]
    lag = float(lags.mean()) if lags.size else 0.0
    delays = (seen.start - seen.intended)[(seen.start > window.begin_s) & (seen.start <= window.end_s)]
    delay = max(0.0, _p99(delays))
    cpu = max((_cpu_share(samples, window.begin_s, window.end_s) for samples in seen.cpu), default=0.0)

    found = analysis.metrics.get("ttft_mean")
    ttft = None if found is None else found.value
    measured = analysis.metrics["output_throughput"].value
    headroom = null_throughput / measured if null_throughput is not None and measured else None
    against = []
    if cpu > MAX_CPU_SHARE:
        against.append(f"a worker is busy {cpu:.0%} of the time")
    if ttft is not None and lag > max(_SMALL_LAG_S, MAX_LAG_SHARE * ttft):
        against.append(f"its event loop is {1000 * lag:.1f} ms late on average, TTFT being {1000 * ttft:.1f} ms")
    if ttft is not None and delay > max(_SMALL_S, MAX_DELAY_SHARE * ttft):
        against.append(f"requests start {1000 * delay:.1f} ms late (p99), TTFT being {1000 * ttft:.1f} ms")
    if headroom is not None and headroom < MIN_HEADROOM:
        against.append(f"it reaches only {headroom:.2f} times this throughput against a server that does nothing")
    if against:
        reason = "the client may be the limit: " + "; ".join(against) + ". Give it more workers, or cores of its own"
    elif headroom is not None:
        reason = f"the client reaches {headroom:.1f} times this throughput against a server that does nothing"
    else:
        reason = "the client keeps its pace"
    return ClientHealth(
        workers=seen.workers,
        loop_lag_mean_s=lag,
        loop_lag_p99_s=_p99(lags),
        schedule_delay_p99_s=delay,
        cpu_share=cpu,
        null_output_throughput=null_throughput,
        null_ttft_p50_s=null_ttft,
        headroom=headroom,
        limited=bool(against),
        reason=reason,
    )


def _p99(values: npt.NDArray[np.float64]) -> float:
    return float(np.quantile(values, 0.99)) if values.size else 0.0


def _cpu_share(samples: list[tuple[float, float]], begin: float, end: float) -> float:
    inside = [(at, used) for at, used in samples if begin <= at <= end + 0.5]
    if len(inside) < 2 or inside[-1][0] <= inside[0][0]:
        return 0.0
    return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])


def cache_verdict(
    plan: LoadPlan,
    seen: Observed,
    overhead: int,
    before: tuple[int, int] | None,
    after: tuple[int, int] | None,
) -> Verdict:
    """Whether prompts were computed, not found: from the engine's counters (looked up, found) before and after the
    load, from the usage it reports, or from the prompts' first words. Up to `overhead` tokens, the chat template, are
    everyone's."""
    share, how = None, ""
    if before is not None and after is not None and after[0] > before[0]:
        share = (after[1] - before[1]) / (after[0] - before[0])
        how = "by the engine's counters"
    elif (known := ~np.isnan(seen.cached)).any():
        share = float(seen.cached[known].sum() / max(1, seen.input[known].sum()))
        how = "by the usage it reports"
    if plan.workload.sessions is not None:
        said = "unknown" if share is None else f"{share:.1%}"
        return Verdict(status="valid", reason=f"sessions repeat their turns by design; found in the cache: {said}")
    if seen.repeated_prompts:
        return Verdict(status="invalid", reason=f"{seen.repeated_prompts} prompts began like one before them")
    if share is None:
        reason = "the engine counts no hits; all prompts begin with different words under a salt of this run"
        return Verdict(status="valid", reason=reason)
    allowed = overhead / max(1.0, float(seen.input.mean())) + 0.02
    reason = f"{share:.1%} of prompt tokens came from a prefix cache {how} (allowed: {allowed:.1%})"
    return Verdict(status="valid" if share <= allowed else "invalid", reason=reason)


def token_check(seen: Observed, analysis: Analysis, text_tokens: dict[int, int]) -> TokenCheck:
    """`text_tokens`: tokens that the tokenizer finds in the texts of some requests."""
    ended, output = analysis.ended, analysis.output
    sample = np.array([i for i in text_tokens if ended[i]], dtype=np.int64)
    reported = bool((~np.isnan(seen.usage[ended])).any())
    if reported:
        sample = sample[~np.isnan(seen.usage[sample])]
    text = np.array([text_tokens[i] for i in sample.tolist()], dtype=np.float64)
    usage = seen.usage[sample if sample.size else ended]
    events = int(seen.events[ended].sum())
    # By usage tokens without text would look bundled.
    tokens, of_events = (text.sum(), int(seen.events[sample].sum())) if sample.size else (output[ended].sum(), events)
    per_event = float(tokens) / of_events if of_events else None
    errors = (seen.input - seen.planned_input)[ended & ~np.isnan(seen.planned_input)]
    counted_twice = reported and sample.size > 0
    return TokenCheck(
        usage=int(np.nansum(usage)) if reported else None,
        text=int(text.sum()) if sample.size else None,
        events=events,
        tokens_per_event=per_event,
        bundled=per_event is not None and per_event > _BUNDLED,
        without_text=max(0.0, 1 - float(text.sum() / usage.sum())) if counted_twice and usage.sum() else None,
        mismatch=_mismatch(seen, analysis, sample, text) if counted_twice else None,
        input_error=float(errors.mean()) if reported and errors.size else None,
        wrong_length=int((output[ended] != seen.target[ended]).sum()),
    )


def _mismatch(
    seen: Observed, analysis: Analysis, sample: npt.NDArray[np.int64], text: npt.NDArray[np.float64]
) -> str | None:
    """Why usage and text cannot both be right, which differ a little where text is cut into other tokens than those it
    was generated by. Tokens without text explain more of usage if they had the time that the others took."""
    usage, held = float(seen.usage[sample].sum()), float(text.sum())
    said = f"usage counts {usage:.0f} output tokens where {held:.0f} are in the text"
    if held > (1 + _MISCOUNTED) * usage:
        return said
    if usage <= (1 + _MISCOUNTED) * held:
        return None
    took = needed = 0.0
    for i, tokens in zip(sample.tolist(), text.tolist(), strict=True):
        times = seen.event_times[seen.offsets[i] : seen.offsets[i + 1]]
        if len(times) > 2 and tokens > 0:
            took += float(analysis.last[i] - analysis.first[i])
            needed += float(np.median(np.diff(times)) * len(times) / tokens * (seen.usage[i] - 1))
    if took < _TIME_OF_TEXTLESS * needed:
        return f"{said}, and the others would have come in {took / needed:.0%} of the time that they take"
    return None


def objections(plan: LoadPlan, seen: Observed, analysis: Analysis, cache: Verdict, tokens: TokenCheck) -> list[str]:
    """Why the point is not valid; empty where it is."""
    found = []
    if cache.status == "invalid":
        found.append(f"a prefix cache was hit: {cache.reason}")
    errors = analysis.metrics["error_rate"].value
    if errors is not None and errors > _MAX_ERRORS:
        last = next((error for error in reversed(seen.error) if error is not None), "")
        found.append(f"{errors:.0%} of requests failed, the last with: {last}")
    ended = analysis.ended
    generated, asked = float(analysis.output[ended].sum()), float(seen.target[ended].sum())
    if asked and generated < _SHORT * asked:
        found.append(f"answers were {generated / asked:.0%} as long as asked for: the engine stops at its end token")
    if tokens.mismatch is not None:
        found.append(tokens.mismatch)
    if plan.level.kind == "trace" and seen.stopped is not None:
        found.append(seen.stopped)
    little = analysis.window.little
    if not analysis.window.steady and plan.level.kind not in ("ramp", "trace"):
        found.append(analysis.window.reason or f"no steady state ({little}, tolerance {LITTLE_TOLERANCE})")
    return found
