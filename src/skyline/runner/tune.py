"""`skyline tune`: time the tactics of a model's kernels on its own weights, and keep the fastest for later starts."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

import msgspec
import torch

from skyline.engine.config import EngineConfig
from skyline.engine.scheduler import MAX_LOGIT_ROWS
from skyline.graph import Call, Program
from skyline.kernels import tuning
from skyline.kernels.cpu import native
from skyline.kernels.tuning import Tunings
from skyline.ops.host_memory import use_huge_pages
from skyline.runner.loader import load_model

_REPETITIONS = 5
# Weights that a repetition goes through, so that it finds them in the caches no more than a step of the model does.
_WEIGHT_BYTES = 64 << 20


def tune(config: EngineConfig, budget: float, most_rows: int) -> dict[str, Any]:
    """Plain JSON data: each place with its choice, and its median seconds beside the default's.

    budget: seconds, after which what is left keeps its default. most_rows: of a step, at most.
    Raises CheckpointError, OutOfMemoryError or ValueError, also where there are no CPU kernels.
    """
    if config.device != "cpu" or native.available() == "none":
        raise ValueError("tune chooses among the CPU kernels' tactics, and there are no such kernels here")
    head_rows = tuning.bucket(min(config.max_num_seqs, config.max_num_batched_tokens) + MAX_LOGIT_ROWS)
    config = msgspec.structs.replace(config, max_num_seqs=1, num_kv_blocks=64, max_model_len=64)
    loaded = load_model(config)
    use_huge_pages(share=1.0)  # as an engine that has served for a while
    file, tunings = tuning.kept(config.threads)
    try:
        rows = [size for size in tuning.ROWS if size <= tuning.bucket(most_rows)]
        results, left = loaded.runner.between_steps(lambda: _measure(loaded.program, tunings, rows, head_rows, budget))
    finally:
        loaded.runner.close()
    try:
        if results:
            tuning.save(file, tunings)
    except OSError as error:
        raise ValueError(f"the measurements cannot be kept in {file}: {error.strerror}") from error
    return {
        "model": config.model,
        "measured_on": tunings.measured_on,
        "file": str(file),
        "left": left,
        "places": results,
    }


def _measure(
    program: Program, tunings: Tunings, rows: list[int], head_rows: int, budget: float
) -> tuple[list[dict[str, Any]], int]:
    """rows: those to measure; head_rows: the most that the output layer sees, which computes only the logits wanted."""
    alike: dict[str, list[Call]] = defaultdict(list)
    for call in program.calls:
        if call.kernel.tactics is not None and call.kernel.into is not None:
            alike[tuning.place(call.kernel, 1, program.constant(call.arguments[1]))].append(call)
    places = [
        (size, calls)
        for size in rows
        for calls in alike.values()
        if len(_tactics(calls[0], size)) > 1 and not (size > head_rows and program.output in calls[0].results)
    ]
    until = time.perf_counter() + budget
    results: list[dict[str, Any]] = []
    for done, (size, calls) in enumerate(places):
        if time.perf_counter() > until:
            return results, len(places) - done
        results.append(_fastest(program, tunings, size, calls))
    return results, 0


def _tactics(call: Call, rows: int) -> tuple[Any, ...]:
    return call.kernel.tactics(rows) if call.kernel.tactics is not None else ()


def _fastest(program: Program, tunings: Tunings, rows: int, calls: list[Call]) -> dict[str, Any]:
    kernel, weight = calls[0].kernel, program.constant(calls[0].arguments[1])
    tactics = _tactics(calls[0], rows)
    n, k = weight.shape
    x = torch.randn(rows, k).to(program.dtype)
    out = torch.empty(rows, n // 2 if weight.layout.gated else n, dtype=program.dtype)
    others = [tuple(program.constant(slot) for slot in call.arguments[1:]) for call in calls]
    others = others[: max(1, _WEIGHT_BYTES // weight.nbytes)]
    times: dict[Any, list[float]] = {tactic: [] for tactic in tactics}
    with native.step():
        for _ in range(_REPETITIONS + 1):
            for tactic in tactics:
                began = time.perf_counter()
                for arguments in others:
                    assert kernel.into is not None
                    kernel.into(out, x, *arguments, tactic=tactic)
                times[tactic].append((time.perf_counter() - began) / len(others))
    for series in times.values():
        del series[0]  # the first one finds the memory of x and out untouched
    best = tuning.fastest(times, tactics)
    place = tuning.place(kernel, rows, weight)
    tunings.tactics[place] = tuple(best)
    default_s, seconds = (statistics.median(times[tactic]) for tactic in (tactics[0], best))
    return {"place": place, "tactic": best._asdict(), "default_s": default_s, "seconds": seconds}
