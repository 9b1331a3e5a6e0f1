"""GuideLLM's benchmarks.json: metadata.version 2 of GuideLLM 0.7 and later, read at 0.8.1, and 1 of 0.5 and 0.6.

Its names mean other things than ours (guidellm/schemas/base/request_stats.py):

    inter_token_latency_ms     (last − first) / (n − 1) of a request: our TPOT. Its distribution weighs each request by
                               its tokens, so it is taken where all requests generated equally many, and else computed
                               from the requests.
    time_per_output_token_ms   (last − start) / n, with the first token's wait in it: not taken.
    request_latency            until the response was closed, after its last token: not taken; E2E is computed from the
                               requests.
    requests_per_second        the mean of a density over time; taken as requests that ended / window, which it is in
                               format 2.
    output_tokens_per_second   the same of tokens, by when they arrived. `total` has those of requests that the end cut
                               off, as ours has. Format 1 divides by the time from the first token to the last: there
                               it is computed as tokens / window, and left out if a warm-up or cool-down was cut off.

Gaps between events are not recorded, so there is no ITL. If the file keeps only a sample of the requests
(sample_size, sample_requests), nothing is computed from them.
"""

from __future__ import annotations

from collections.abc import Iterator

from skyline.bench.importers.draft import UNKNOWN, Draft, Row, last_line, model_name, table_of
from skyline.bench.importers.fields import Fields, ResultFileError, at
from skyline.bench.loads import Level
from skyline.bench.metrics import QUANTILES
from skyline.bench.results import Window
from skyline.bench.wording import number_of

_RATES = {
    "output_throughput": ("output_tokens_per_second", "output_token_count"),
    "input_throughput": ("prompt_tokens_per_second", "prompt_token_count"),
    "total_throughput": ("tokens_per_second", "total_token_count"),
}


def recognizes(data: Fields) -> bool:
    metadata = data.data.get("metadata")
    return isinstance(metadata, dict) and "guidellm_version" in metadata and "benchmarks" in data.data


def read(data: Fields) -> Iterator[Draft]:
    metadata = data.part("metadata")
    version = metadata.maybe_whole("version")
    if version not in (1, 2):
        raise ResultFileError(
            f"{data.where}, of GuideLLM {metadata.maybe_text('guidellm_version')}, is in its format {version}; only"
            " formats 1 and 2 can be imported"
        )
    chat = _is_chat(data)
    for benchmark in data.parts("benchmarks"):
        draft = _benchmark(benchmark, version)
        draft.chat = chat
        yield draft


def _is_chat(data: Fields) -> bool:
    """The request format, which stands in `config` in format 2 and in `args` in format 1."""
    config = data.maybe_part("config") or Fields({}, data.where)
    spec, args = config.maybe_part("spec"), data.maybe_part("args")
    places = [spec and spec.maybe_part("backend"), args, args and args.maybe_part("backend_kwargs")]
    formats = [place.maybe_text("request_format") or "" for place in places if place]
    return any(text.removeprefix("/v1/") in ("chat/completions", "chat_completions") for text in formats)


def _benchmark(data: Fields, version: int) -> Draft:
    config, metrics, clock = data.part("config"), data.part("metrics"), data.part("scheduler_metrics")
    backend = config.part("backend")
    totals = metrics.part("request_totals")
    ended, failed = totals.whole("successful"), totals.whole("errored")
    origin = clock.number("start_time")
    begin, end = clock.number("measure_start_time"), clock.number("measure_end_time")
    counts = {what: _of(metrics, f"{what}_token_count", "successful") for what in ("prompt", "output")}
    draft = Draft(
        model=model_name(backend.maybe_text("model") or UNKNOWN),
        level=_level(config.part("strategy"), totals.whole("total")),
        input=max(1, round(counts["prompt"].number("mean"))),
        output=max(1, round(counts["output"].number("mean"))),
        chat=False,
        started=at(origin),
        finished=at(clock.number("end_time")),
        sent=clock.part("requests_made").whole("total"),
    )
    if ended == 0 or end <= begin:
        draft.nothing = f"none of its {number_of(totals.whole('total'), 'request')} ended well"
        return draft
    reason = "the tool's own window" if begin > origin else "the tool measures from its first request to the end"
    draft.window = Window(
        begin_s=max(0.0, begin - origin), end_s=end - origin, truncated_s=0.0, little=None, steady=False, reason=reason
    )
    draft.put("request_throughput", ended / (end - begin), ended)
    whole = begin == clock.number("request_start_time") and end == clock.number("request_end_time")
    for name, (rate, count) in _RATES.items():
        if version == 2:
            draft.put(name, _of(metrics, rate, "total").number("mean"), ended)
        elif whole:
            draft.put(name, _of(metrics, count, "total").number("total_sum") / (end - begin), ended)
    draft.put("error_rate", failed / (ended + failed), ended + failed)
    # Without streaming the first token's time is noted as 0.
    first = _of(metrics, "time_to_first_token_ms", "successful")
    if first.number("max") > 0:
        draft.put_distribution("ttft", _statistics(first), 1e-3, first.whole("count"))
    tokens = counts["output"]
    if tokens.number("min") == tokens.number("max") > 1:
        gap = _of(metrics, "inter_token_latency_ms", "successful")
        draft.put_distribution("tpot", _statistics(gap), 1e-3, ended)
    rows = _rows(data, open_loop=draft.level.kind != "closed")
    if "sample_size" not in config and "sample_requests" not in config:
        draft.table = table_of(rows, origin)
    return draft


def _of(metrics: Fields, name: str, status: str) -> Fields:
    return metrics.part(name).part(status)


def _statistics(summary: Fields) -> dict[str, float | None]:
    percentiles = summary.part("percentiles")
    return {label: percentiles.maybe_number(label) for label in QUANTILES} | {"mean": summary.maybe_number("mean")}


def _level(strategy: Fields, requests: int) -> Level:
    kind = strategy.text("type_")
    limit = strategy.maybe_whole("max_concurrency")
    match kind:
        case "synchronous":
            return Level(kind="closed", concurrency=1)
        case "concurrent":
            return Level(kind="closed", concurrency=strategy.whole("streams"))
        case "throughput":
            # All at once, or as many as it was allowed.
            return Level(kind="closed", concurrency=limit or requests)
        case "constant" | "poisson":
            return Level(kind=kind, rate=strategy.number("rate"), concurrency=limit)
    raise ResultFileError(f"{strategy.where}: a load of the kind {kind} cannot be described here")


def _rows(data: Fields, open_loop: bool) -> list[Row]:
    rows = []
    for status in ("successful", "errored", "incomplete"):
        for request in data.part("requests").parts(status):
            info = request.part("info")
            times = info.part("timings")
            start = times.maybe_number("request_start") or times.maybe_number("resolve_start")
            if start is None:
                continue
            ended = status == "successful"
            error = None if ended else "under way at the end" if status == "incomplete" else info.maybe_text("error")
            rows.append(
                Row(
                    start,
                    times.maybe_number("first_token_iteration"),
                    times.maybe_number("last_token_iteration"),
                    times.maybe_number("request_end"),
                    request.maybe_whole("prompt_tokens") or 0,
                    request.maybe_whole("output_tokens") or 0,
                    None if ended else last_line(error or ""),
                    times.maybe_number("targeted_start") if open_loop else None,
                )
            )
    return rows
