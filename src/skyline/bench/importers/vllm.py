"""Results of `vllm bench serve`, and of InferenceX's benchmark_serving, which is a fork of its forerunner.

The format is what vllm/benchmarks/serve.py writes with --save-result (read at version 0.32), with --save-detailed also
for each request. Its definitions are ours: TPOT is (last − first) / (n − 1), ITL is the time between events, E2E ends
with the last event, and rates are over the whole run. `total_token_throughput` is input and output together.

Not taken: `request_goodput`, since the file does not say what the objective was, and the peaks `max_...`.
"""

from __future__ import annotations

import datetime

from skyline.bench.importers.draft import Draft, Row, last_line, model_name, table_of, whole_run
from skyline.bench.importers.fields import Fields, ResultFileError, at, read_time
from skyline.bench.loads import Level
from skyline.bench.metrics import STATISTICS
from skyline.bench.results import RequestTable
from skyline.bench.wording import number_of

_NAMES = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2e": "e2el"}


def recognizes(data: Fields) -> bool:
    return all(
        key in data.data for key in ("num_prompts", "duration", "completed", "output_throughput", "mean_ttft_ms")
    )


def read(data: Fields) -> Draft:
    completed, duration = data.whole("completed"), data.number("duration")
    prompts = data.whole("num_prompts")
    failed = data.maybe_whole("failed")
    failed = max(0, prompts - completed) if failed is None else failed
    started, finished = _times(data, duration)
    draft = Draft(
        model=model_name(data.text("model_id")),
        level=_level(data, prompts),
        input=max(1, round(data.number("total_input_tokens") / max(1, completed))),
        output=max(1, round(data.number("total_output_tokens") / max(1, completed))),
        chat=data.maybe_text("backend") == "openai-chat",
        started=started,
        finished=finished,
        sent=prompts,
        window=whole_run(duration),
        table=_table(data),
    )
    if completed == 0 or duration <= 0:
        draft.nothing = f"none of its {number_of(prompts, 'request')} ended well"
        return draft
    input_rate = data.number("total_input_tokens") / duration
    draft.put("request_throughput", data.number("request_throughput"), completed)
    draft.put("output_throughput", data.number("output_throughput"), completed)
    draft.put("input_throughput", input_rate, completed)
    draft.put("total_throughput", data.number("total_token_throughput"), completed)
    draft.put("error_rate", failed / (completed + failed), completed + failed)
    draft.gaps = [gap for row in data.rows("itls") for gap in row]
    # How many gaps there were is only known from their list.
    counts = dict.fromkeys(_NAMES, completed) | {"itl": len(draft.gaps)}
    for name, theirs in _NAMES.items():
        values = {statistic: data.maybe_number(f"{statistic}_{theirs}_ms") for statistic in STATISTICS}
        values["p50"] = data.maybe_number(f"median_{theirs}_ms")
        draft.put_distribution(name, values, 1e-3, counts[name])
    return draft


def _level(data: Fields, prompts: int) -> Level:
    limit = data.maybe_whole("max_concurrency")
    strategy = data.maybe_text("ramp_up_strategy")
    if strategy == "linear":
        start, end = data.number("ramp_up_start_rps"), data.number("ramp_up_end_rps")
        return Level(kind="ramp", rate=start, end_rate=end, concurrency=limit)
    if strategy is not None:
        raise ResultFileError(
            f"{data.where}: a load that grows in another way than linearly ({strategy}) has no place here"
        )
    rate = data.data.get("request_rate")
    if rate in ("inf", None, float("inf")):
        # Without a limit all requests are sent at once.
        return Level(kind="closed", concurrency=limit or prompts)
    burstiness = data.maybe_number("burstiness") or 1.0
    if burstiness == 1.0:
        return Level(kind="poisson", rate=data.number("request_rate"), concurrency=limit)
    # A gamma distribution of this shape has the coefficient of variation 1/√shape.
    return Level(kind="gamma", rate=data.number("request_rate"), cv=burstiness**-0.5, concurrency=limit)


def _times(data: Fields, duration: float) -> tuple[datetime.datetime, datetime.datetime]:
    begin, end = data.maybe_number("benchmark_start_time_unix"), data.maybe_number("benchmark_end_time_unix")
    if begin is not None and end is not None:
        return at(begin), at(end)
    finished = read_time(data.text("date"), "%Y%m%d-%H%M%S")
    return finished - datetime.timedelta(seconds=duration), finished


def _table(data: Fields) -> RequestTable | None:
    starts, firsts = data.numbers("start_times"), data.numbers("ttfts")
    if not starts:
        return None
    gaps, errors = data.rows("itls"), data.column("errors")
    inputs, outputs = data.numbers("input_lens"), data.numbers("output_lens")
    # Older files have no latencies, which are these sums.
    latencies = data.numbers("latencies") or [first + sum(row) for first, row in zip(firsts, gaps, strict=False)]
    columns = (starts, firsts, latencies, inputs, outputs, errors)
    if len({len(column) for column in columns}) > 1:
        raise ResultFileError(f"{data.where}: the lists of requests (start_times, ttfts, itls, ...) differ in length")
    rows = []
    for start, first, latency, input_, output, error in zip(*columns, strict=True):
        if error:
            rows.append(Row(start, None, None, None, round(input_), 0, last_line(str(error))))
        else:
            last = start + latency
            rows.append(Row(start, start + first, last, last, round(input_), round(output)))
    return table_of(rows, min(starts))
