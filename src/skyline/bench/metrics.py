"""The vocabulary: every number that the benchmark reports, with its unit and formula, once.

Of a request: `intended` is when it should have started, `start` when it was sent, `first` and `last` when its first and
last tokens arrived, `n` how many tokens it generated. All times are seconds on one monotonic clock.

A metric of requests ("distribution") is reported as NAME_mean and NAME_p50, _p90, _p95, _p99, the others under their
name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
STATISTICS = ("mean", *QUANTILES)


@dataclass(frozen=True)
class Metric:
    """`kind`: a number for each request, a rate over the measured window, or derived from other metrics."""

    name: str
    title: str
    unit: str
    formula: str
    better: Literal["higher", "lower"]
    kind: Literal["distribution", "rate", "derived"]


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("ttft", "Time to first token", "s", "first − start", "lower", "distribution"),
        Metric("ttft_intended", "TTFT from intended start", "s", "first − intended", "lower", "distribution"),
        Metric("tpot", "Time per output token", "s", "(last − first) / (n − 1)", "lower", "distribution"),
        Metric(
            "itl", "Inter-token latency", "s", "time between one event with text and the next", "lower", "distribution"
        ),
        Metric("e2e", "End-to-end latency", "s", "last − start", "lower", "distribution"),
        Metric("e2e_intended", "E2E from intended start", "s", "last − intended", "lower", "distribution"),
        Metric("interactivity", "Interactivity", "tok/s/user", "1 / (median TPOT)", "higher", "derived"),
        Metric("request_throughput", "Requests", "req/s", "requests that ended / window", "higher", "rate"),
        Metric(
            "output_throughput", "Output throughput", "tok/s", "output tokens that arrived / window", "higher", "rate"
        ),
        Metric(
            "input_throughput", "Input throughput", "tok/s", "input tokens of ended requests / window", "higher", "rate"
        ),
        Metric("total_throughput", "Total throughput", "tok/s", "input + output throughput", "higher", "rate"),
        Metric(
            "output_per_device",
            "Output throughput per device",
            "tok/s/device",
            "output throughput / devices",
            "higher",
            "derived",
        ),
        Metric(
            "input_per_device",
            "Input throughput per device",
            "tok/s/device",
            "input throughput / devices",
            "higher",
            "derived",
        ),
        Metric(
            "total_per_device",
            "Total throughput per device",
            "tok/s/device",
            "total throughput / devices",
            "higher",
            "derived",
        ),
        Metric("goodput", "Goodput", "req/s", "ended requests that kept every objective / window", "higher", "rate"),
        Metric(
            "goodput_share",
            "Requests within the objective",
            "1",
            "those that kept every objective / all that ended or failed",
            "higher",
            "rate",
        ),
        Metric("error_rate", "Failed requests", "1", "failed / (ended + failed)", "lower", "rate"),
        Metric("power", "Power", "W", "energy over the window / window", "lower", "rate"),
        Metric(
            "energy_per_token",
            "Energy per output token",
            "J/tok",
            "energy over the window / output tokens in it",
            "lower",
            "derived",
        ),
        Metric(
            "tokens_per_mw",
            "Output tokens per second per MW",
            "tok/s/MW",
            "output throughput / (power / 10⁶)",
            "higher",
            "derived",
        ),
        Metric(
            "cost_per_mtok",
            "Cost per million output tokens",
            "$/Mtok",
            "price per device-hour · devices / 3600 / output throughput · 10⁶",
            "lower",
            "derived",
        ),
    )
}

# Percentiles of these are summarized; the axes of the frontier are the first two of AXES.
DISTRIBUTIONS = tuple(name for name, metric in METRICS.items() if metric.kind == "distribution")
AXES = ("interactivity", "output_per_device")


def metric_of(key: str) -> Metric:
    """The metric of a reported key: `ttft_p99` belongs to `ttft`. Raises KeyError with the known names."""
    name, _, statistic = key.rpartition("_")
    if statistic in STATISTICS and name in DISTRIBUTIONS:
        return METRICS[name]
    if key in METRICS and key not in DISTRIBUTIONS:
        return METRICS[key]
    raise KeyError(f"no metric {key!r}; there are {', '.join(keys())}")


def title_of(key: str) -> str:
    """For people: `ttft_p99` is "Time to first token, p99"."""
    metric = metric_of(key)
    return metric.title if key == metric.name else f"{metric.title}, {key.removeprefix(metric.name + '_')}"


def keys() -> list[str]:
    """Every key that a result may hold."""
    found: list[str] = []
    for metric in METRICS.values():
        if metric.kind == "distribution":
            found += [f"{metric.name}_{statistic}" for statistic in STATISTICS]
        else:
            found.append(metric.name)
    return found


def tpot(first: float, last: float, tokens: int) -> float | None:
    """Seconds a token after the first; None below two tokens, for which it means nothing."""
    return (last - first) / (tokens - 1) if tokens > 1 else None


def cost_per_mtok(output_throughput: float, price_per_device_hour: float, devices: int) -> float:
    """$ per million output tokens. `output_throughput` of all devices, in tok/s."""
    return price_per_device_hour * devices / 3600 / output_throughput * 1e6


def tokens_per_mw(output_throughput: float, watts: float) -> float:
    """Output tokens per second for each megawatt drawn."""
    return output_throughput / (watts / 1e6)
