"""InferenceX's aggregated results (formerly InferenceMAX): agg_*.json, lists of them, and {"benchmarks": [...]}.

What is in them is written by utils/process_result.py of https://github.com/SemiAnalysisAI/InferenceX, later
infx/results: the latencies of benchmark_serving in seconds, `intvty` as 1/TPOT, and throughput per GPU. On one node all
three throughputs are divided by all GPUs. On several, output is divided by the decode GPUs alone and input by the
prefill GPUs alone; here they are multiplied by these again and divided by all, so that they compare.

The files say neither how many requests there were nor when: `n` is 0, and the time is the file's, or `date`. Power is
taken where it was found valid; it is of the GPUs alone.
"""

from __future__ import annotations

import datetime
import math

from skyline.bench.importers.draft import Draft, Facts, model_name
from skyline.bench.importers.fields import Fields, ResultFileError
from skyline.bench.loads import Level
from skyline.bench.metrics import STATISTICS
from skyline.bench.results import Energy, Verdict
from skyline.bench.wording import number_of

_NAMES = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2e": "e2el"}


def recognizes(data: Fields) -> bool:
    return all(key in data.data for key in ("hw", "conc", "framework", "tput_per_gpu"))


def read(data: Fields, when: datetime.datetime, facts: Facts) -> Draft:
    input_, output = facts.input or data.maybe_whole("isl"), facts.output or data.maybe_whole("osl")
    if input_ is None or output is None:
        kind = data.maybe_text("scenario_type")
        problem = f"is of the scenario {kind}, whose requests differ in length" if kind else "does not say the lengths"
        raise ResultFileError(f"{data.where} {problem}; give them as `input` and `output`")
    prefill, decode, total = _gpus(data)
    draft = Draft(
        model=model_name(data.text("model")),
        level=Level(kind="closed", concurrency=data.whole("conc")),
        input=input_,
        output=output,
        chat=False,
        started=when,
        finished=when,
        engine=data.text("framework"),
        engine_version=data.maybe_text("image"),
        hardware=data.text("hw"),
        accelerators=[data.text("hw")] * total,
        devices=total,
        tensor_parallel=_size(data, "tp"),
        expert_parallel=_size(data, "ep"),
        precision=data.text("precision"),
        speculation=data.maybe_text("spec_decoding") or "none",
    )
    outcome = data.maybe_part("benchmark_outcome")
    completed = 0
    if outcome is not None:
        completed, draft.sent = outcome.whole("completed"), outcome.whole("requested")
        draft.put("error_rate", outcome.whole("failed") / max(1, draft.sent), draft.sent)
        if outcome.maybe_text("status") == "failed":
            all_sent = number_of(draft.sent, "request")
            draft.wrong = f"InferenceX marks it as failed: {outcome.whole('failed')} of {all_sent} failed"
    draft.put("output_throughput", _times(data.maybe_number("output_tput_per_gpu"), decode), completed)
    draft.put("input_throughput", _times(data.maybe_number("input_tput_per_gpu"), prefill), completed)
    draft.put("total_throughput", data.number("tput_per_gpu") * total, completed)
    for name, theirs in _NAMES.items():
        values = {statistic: data.maybe_number(f"{statistic}_{theirs}") for statistic in STATISTICS}
        draft.put_distribution(name, values | {"p50": data.maybe_number(f"median_{theirs}")}, n=completed)
    _power(data, draft)
    return draft


def _times(per_gpu: float | None, gpus: int) -> float | None:
    return None if per_gpu is None else per_gpu * gpus


def _size(data: Fields, what: str) -> int:
    """Of a worker; of one that decodes where those that prefill differ from them."""
    return next((size for key in (what, f"decode_{what}", f"prefill_{what}") if (size := data.maybe_whole(key))), 1)


def _gpus(data: Fields) -> tuple[int, int, int]:
    """By how many input, output and all tokens were divided."""
    if data.flag("is_multinode"):
        prefill, decode = data.whole("num_prefill_gpu"), data.maybe_whole("num_decode_gpu") or 0
        total = prefill + decode
        # Without GPUs of its own for decoding, all do both.
        return prefill, decode or total, total
    sizes = [data.maybe_whole(key) or 1 for key in ("tp", "pp", "pcp_size")]
    total = data.maybe_whole("num_gpus") or math.prod(sizes)
    if "tp" not in data and "num_gpus" not in data:
        raise ResultFileError(f"{data.where}: tp is missing, the number of GPUs")
    return total, total, total


def _power(data: Fields, draft: Draft) -> None:
    if "power_valid" not in data:
        return
    valid = data.number("power_valid") == 1
    reasons = ", ".join(str(reason) for reason in data.column("power_invalid_reasons"))
    verdict = Verdict(
        status="valid" if valid else "invalid",
        reason="InferenceX found its samples of the GPUs' power complete" if valid else reasons or "InferenceX says so",
    )
    draft.energy = Energy(
        joules=data.maybe_number("total_gpu_energy_j"), source="power of the GPUs, by InferenceX", verdict=verdict
    )
    if valid:
        draft.put("power", data.maybe_number("avg_total_gpu_power_w"))
        draft.put("energy_per_token", data.maybe_number("joules_per_output_token"))
