"""Prometheus metrics of one server: https://prometheus.io/docs/concepts/metric_types/.

Gauges and totals of the engine are read when they are asked for. Histograms are our own: they are updated for every
token, and the client library's take a lock for each bucket.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from skyline.engine.messages import EngineStats
from skyline.ipc.client import EngineClient

_TTFT = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 5)
_E2E = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Histogram(Collector):
    """For one thread (the event loop)."""

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]) -> None:
        self._name, self._help = name, help_text
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterator[Metric]:
        buckets, total = [], 0
        for bound, count in zip([*map(str, map(float, self._bounds)), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family = HistogramMetricFamily(self._name, self._help)
        family.add_metric([], buckets, self._sum)
        yield family


class _EngineCollector(Collector):
    def __init__(self) -> None:
        self.engine: EngineClient | None = None

    def collect(self) -> Iterator[Metric]:
        engine = self.engine
        stats = EngineStats() if engine is None else engine.stats
        up = engine is not None and engine.health() is None
        yield GaugeMetricFamily("skyline_engine_up", "1 while the engine makes progress", value=float(up))
        yield GaugeMetricFamily("skyline_requests_running", "Sequences that take part in steps", value=stats.running)
        yield GaugeMetricFamily("skyline_requests_waiting", "Queue depth: sequences that wait", value=stats.waiting)
        unfinished = 0 if engine is None else engine.num_unfinished
        yield GaugeMetricFamily("skyline_requests_unfinished", "Sequences under way, all states", value=unfinished)
        blocks = GaugeMetricFamily("skyline_kv_blocks", "KV blocks by state", labels=["state"])
        blocks.add_metric(["held"], stats.blocks_held)
        blocks.add_metric(["cached"], stats.blocks_cached)
        blocks.add_metric(["free"], stats.blocks_total - stats.blocks_held - stats.blocks_cached)
        yield blocks
        yield GaugeMetricFamily("skyline_kv_blocks_capacity", "KV blocks in all", value=stats.blocks_total)
        yield GaugeMetricFamily(
            "skyline_decode_sizes_recorded",
            "Numbers of requests whose decode steps are recorded",
            value=stats.decode_recorded,
        )
        decode = CounterMetricFamily("skyline_decode_steps", "Decode steps, by how they ran", labels=["mode"])
        decode.add_metric(["replayed"], stats.decode_replayed)
        decode.add_metric(["call by call"], stats.decode_eager)
        yield decode
        yield GaugeMetricFamily(
            "skyline_prompt_sizes_recorded",
            "Numbers of tokens for which all other steps are recorded, in pieces",
            value=stats.prompts_recorded,
        )
        prompts = CounterMetricFamily("skyline_prompt_steps", "All other steps, by how they ran", labels=["mode"])
        prompts.add_metric(["replayed"], stats.prompts_replayed)
        prompts.add_metric(["call by call"], stats.prompts_eager)
        yield prompts
        for name, help_text, value in (
            ("prefix_cache_queried_tokens", "Prompt tokens looked up in the prefix cache", stats.prefix_queried_tokens),
            ("prefix_cache_hit_tokens", "Prompt tokens taken from the prefix cache", stats.prefix_hit_tokens),
            ("preemptions", "Sequences that had to be recomputed", stats.preemptions),
            ("aborts", "Sequences that were aborted", stats.aborted),
            ("prompt_tokens", "Prompt tokens taken in", stats.prompt_tokens),
            ("generated_tokens", "Tokens generated", stats.generated_tokens),
            ("engine_steps", "Steps of the engine", stats.steps),
            ("engine_step_seconds", "Time of all steps", stats.step_seconds),
            ("engine_schedule_seconds", "Time that planning and bookkeeping took of it", stats.schedule_seconds),
        ):
            yield CounterMetricFamily(f"skyline_{name}", help_text, value=value)


class Metrics:
    """All metrics of one app, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector()
        self.finished = Counter(
            "skyline_requests_finished", "Choices that ended, by reason", ["finish_reason"], registry=self._registry
        )
        self.errors = Counter(
            "skyline_request_errors", "Error responses, by HTTP status", ["code"], registry=self._registry
        )
        self.ttft = Histogram("skyline_time_to_first_token_seconds", "Arrival to first token, by choice", _TTFT)
        self.itl = Histogram("skyline_inter_token_latency_seconds", "Time between tokens of a choice", _ITL)
        self.e2e = Histogram("skyline_request_latency_seconds", "Arrival to last token, by request", _E2E)
        for collector in (self._engine, self.ttft, self.itl, self.e2e):
            self._registry.register(collector)

    def watch(self, engine: EngineClient) -> None:
        self._engine.engine = engine

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)
