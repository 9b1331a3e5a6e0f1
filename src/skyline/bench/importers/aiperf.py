"""AIPerf's profile_export_aiperf.json, with the requests of profile_export.jsonl where that lies beside it.

Read at versions 0.3 to 0.13 (schema up to 1.4). Times are milliseconds. Its names mean other things than ours
(aiperf/metrics/types):

    inter_token_latency   (request latency − TTFT) / (n − 1): our TPOT. With --per-chunk-usage n − 1 is less by what a
                          first event bundled.
    inter_chunk_latency   between one event with text and the next: our ITL.
    request_latency       until the last event with text: our E2E.

Rates are over the time from the first request to the end of the last, or, in later versions, over the measured phase.
Tokens are counted by AIPerf's tokenizer from the text, without the chat template, unless --use-server-token-count was
given. Goodput is not taken: its objective is not in our terms.
"""

from __future__ import annotations

import json
from pathlib import Path

from skyline.bench.importers.draft import UNKNOWN, Draft, Row, last_line, model_name, table_of, whole_run
from skyline.bench.importers.fields import Fields, ResultFileError, read_time
from skyline.bench.loads import Level
from skyline.bench.metrics import QUANTILES
from skyline.bench.results import RequestTable
from skyline.bench.wording import number_of

_NAMES = {
    "ttft": "time_to_first_token",
    "tpot": "inter_token_latency",
    "itl": "inter_chunk_latency",
    "e2e": "request_latency",
}
_SECONDS = {"sec": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_RATES = {
    "request_throughput": "request_throughput",
    "output_throughput": "output_token_throughput",
    "total_throughput": "total_token_throughput",
}


def recognizes(data: Fields) -> bool:
    return "input_config" in data.data and ("aiperf_version" in data.data or "request_throughput" in data.data)


def is_record(data: Fields) -> bool:
    """Whether this is a line of profile_export.jsonl."""
    return isinstance(data.data.get("metadata"), dict) and "request_start_ns" in data.data["metadata"]


def read(data: Fields, records: list[Fields]) -> Draft:
    config = data.part("input_config")
    ended, failed = round(_average(data, "request_count") or 0), round(_average(data, "error_request_count") or 0)
    level, sent = _level(config, ended + failed)
    input_, output = _average(data, "input_sequence_length"), _average(data, "output_sequence_length")
    draft = Draft(
        model=model_name(_model(config)),
        level=level,
        input=max(1, round(input_ or 1)),
        output=max(1, round(output or 1)),
        chat=config.part("endpoint").maybe_text("type") == "chat",
        started=read_time(data.text("start_time")),
        finished=read_time(data.text("end_time")),
        sent=sent,
        table=_table(records),
    )
    if not ended:
        draft.nothing = f"none of its {number_of(failed, 'request')} ended well"
        return draft
    if data.flag("was_cancelled") or data.data.get("is_complete") is False:
        draft.wrong = data.maybe_text("incomplete_reason") or "AIPerf was cancelled before its end"
    for ours, theirs in _RATES.items():
        draft.put(ours, _average(data, theirs), ended)
    total, produced = draft.value("total_throughput"), draft.value("output_throughput")
    if total is not None and produced is not None:
        draft.put("input_throughput", total - produced, ended)
    per_second = draft.value("request_throughput")
    if per_second:
        draft.window = whole_run(ended / per_second)
    draft.put("error_rate", failed / (ended + failed), ended + failed)
    for ours, theirs in _NAMES.items():
        summary = data.maybe_part(theirs)
        if summary is not None:
            count = summary.maybe_whole("count") or (0 if ours == "itl" else ended)
            values = {label: summary.maybe_number(label) for label in QUANTILES} | {"mean": summary.maybe_number("avg")}
            draft.put_distribution(ours, values, _scale(summary), count)
    return draft


def records_beside(path: Path) -> list[Fields]:
    """The requests that AIPerf wrote beside its summary: PREFIX_aiperf.json and PREFIX.jsonl."""
    beside = path.with_name(path.stem.removesuffix("_aiperf") + ".jsonl")
    if not path.stem.endswith("_aiperf") or not beside.is_file():
        return []
    try:
        lines = beside.read_text("utf-8").splitlines()
        return [
            Fields(json.loads(line), f"{beside.name} line {number}") for number, line in enumerate(lines, 1) if line
        ]
    except (OSError, ValueError, RecursionError) as error:
        raise ResultFileError(f"cannot read {beside} ({error}); move it away to import the summary alone") from None


def _average(data: Fields, name: str) -> float | None:
    summary = data.maybe_part(name)
    return None if summary is None else summary.maybe_number("avg")


def _scale(summary: Fields) -> float:
    unit = summary.text("unit")
    if unit not in _SECONDS:
        raise ResultFileError(f"{summary.where}: {unit} is no unit of time that is known here")
    return _SECONDS[unit]


def _model(config: Fields) -> str:
    models = config.maybe_part("models")
    if models is not None:
        return next((model.text("name") for model in models.parts("items")), UNKNOWN)
    # Before 0.9.
    names = config.part("endpoint").column("model_names")
    return str(names[0]) if names else UNKNOWN


def _level(config: Fields, requests: int) -> tuple[Level, int | None]:
    """The load, and how many requests it has if that is given."""
    phases = [phase for phase in config.parts("phases") if not phase.flag("exclude_from_results")]
    if len(phases) > 1:
        raise ResultFileError(f"{config.where} has {len(phases)} measured phases in one summary; import runs of one")
    load = phases[0] if phases else config.maybe_part("loadgen") or Fields({}, config.where)
    limit, rate = load.maybe_whole("concurrency"), load.maybe_number("rate") or load.maybe_number("request_rate")
    kind = load.maybe_text("type") or _before_phases(load)
    sent = load.maybe_whole("requests") or load.maybe_whole("request_count") or requests
    match kind:
        case "concurrency":
            return Level(kind="closed", concurrency=limit or 1), sent
        case "constant" | "poisson" if rate is not None:
            return Level(kind=kind, rate=rate, concurrency=limit), sent
        case "gamma" if rate is not None:
            # The smoothness is the gamma distribution's shape, whose coefficient of variation is 1/√shape.
            shape = load.maybe_number("smoothness") or load.maybe_number("arrival_smoothness") or 1.0
            return Level(kind="gamma", rate=rate, cv=shape**-0.5, concurrency=limit), sent
    raise ResultFileError(f"{load.where}: a load of the kind {kind} cannot be described here")


def _before_phases(load: Fields) -> str:
    if "request_rate" not in load:
        return "concurrency"
    return load.maybe_text("arrival_pattern") or load.maybe_text("request_rate_mode") or "poisson"


def _table(records: list[Fields]) -> RequestTable | None:
    rows = []
    for record in records:
        about, metrics = record.part("metadata"), record.part("metrics")
        if about.maybe_text("benchmark_phase") == "warmup":
            continue
        start = about.number("request_start_ns") * 1e-9
        first, last = (_after(start, metrics, name) for name in ("time_to_first_token", "request_latency"))
        error = record.maybe_part("error")
        rows.append(
            Row(
                start,
                first,
                last,
                about.number("request_end_ns") * 1e-9,
                _tokens(metrics, "input_sequence_length"),
                _tokens(metrics, "output_sequence_length"),
                None if error is None else last_line(error.maybe_text("message") or error.maybe_text("type") or ""),
            )
        )
    return table_of(rows, min((row.start for row in rows), default=0.0))


def _after(start: float, metrics: Fields, name: str) -> float | None:
    metric = metrics.maybe_part(name)
    return None if metric is None else start + metric.number("value") * _scale(metric)


def _tokens(metrics: Fields, name: str) -> int:
    metric = metrics.maybe_part(name)
    return 0 if metric is None else metric.whole("value")
