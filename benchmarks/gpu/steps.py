"""Steps of random-weight models of real shapes, through the runner that serves requests."""

from __future__ import annotations

import contextlib
import gc
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from shapes import write_shape

CONTEXT = 1024
# name, requests, tokens before the step, tokens of the step
CELLS = (
    ("decode b1", 1, CONTEXT, 1),
    ("decode b16", 16, CONTEXT, 1),
    ("decode b64", 64, CONTEXT, 1),
    ("decode b256", 256, CONTEXT, 1),
    ("prefill 1k", 1, 0, 1024),
    ("prefill 8k", 1, 0, 8192),
)
_WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaMemcpy")


@contextlib.contextmanager
def loaded(shape: str, quantization: str | None, kv_dtype: str = "auto", **options: Any) -> Iterator[tuple[Any, Any]]:
    """The model with random weights, ready to take plans, and its settings."""
    from skyline.engine.config import EngineConfig
    from skyline.runner.loader import load_model

    gc.collect()
    torch.cuda.empty_cache()  # of the model before
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            model=str(write_shape(shape, Path(folder))),
            device="cuda",
            load_format="dummy",
            quantization=quantization,  # type: ignore[arg-type]
            kv_cache_dtype=kv_dtype,  # type: ignore[arg-type]
            max_model_len=8704,
            max_num_seqs=256,
            max_num_batched_tokens=8192,
            enable_prefix_caching=False,
            **options,
        )
        model = load_model(config)
        try:
            yield model, config
        finally:
            model.runner.close()


def measure(
    shape: str,
    quantization: str | None,
    ceilings: dict[str, float],
    kv_dtype: str = "auto",
    budget: float = 0.0,
    prefer_kernels: str | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Rows of cells; and what `skyline tune` finds in `budget` seconds, if there are any, before they are measured."""
    from skyline.runner.tune_gpu import tune_loaded

    rows, found = [], None
    with loaded(shape, quantization, kv_dtype, prefer_kernels=prefer_kernels) as (model, config):
        _fill_caches(model)
        if budget:
            found = tune_loaded(model, config, budget, (1, 16, 64, 256))
            found = {**{key: found[key] for key in ("measured_on", "sizes")}, "model": shape, "weights": quantization}
            _fill_caches(model)
        memory = _memory(model)
        for name, requests, start, length in CELLS:
            row = {"model": shape, "weights": quantization or "bfloat16", "kv": kv_dtype, "cell": name}
            row |= {"preferred": prefer_kernels} if prefer_kernels else {}
            try:
                rows.append({**row, **_cell(model, requests, start, length, ceilings, quantization)})
            except Exception as error:
                rows.append({**row, "error": f"{type(error).__name__}: {str(error)[:300]}"})
        if rows:
            rows[-1]["memory"] = {**memory, "peak_bytes": torch.cuda.max_memory_allocated()}
    return rows, found


def _memory(model: Any) -> dict[str, int]:
    """Bytes that are taken before the first step, and what was kept for activations: together the predicted peak."""
    torch.cuda.reset_peak_memory_stats()
    kept = re.search(r"([\d,]+) MiB kept for activations", model.report["memory"])
    assert kept is not None
    taken = torch.cuda.memory_allocated()
    return {"taken_bytes": taken, "predicted_bytes": taken + (int(kept[1].replace(",", "")) << 20)}


def _fill_caches(model: Any) -> None:
    """Contexts that are only claimed are read all the same: their memory should hold numbers."""
    for call in model.program.calls:
        for slot in call.arguments:
            value = model.program.constant(slot)
            for part in getattr(value, "tensors", ()) if hasattr(value, "bytes_per_token") else ():
                part.view(torch.uint8).fill_(0x38) if part.dtype.itemsize == 1 else part.fill_(0.01)


def _cell(
    model: Any, requests: int, start: int, length: int, ceilings: dict[str, float], quantization: str | None
) -> dict[str, Any]:
    steps = _Steps(model, requests, start, length)
    steps.run(4)  # compiles, records
    count = max(3, min(60, int(0.4 / steps.run(2))))
    seconds = statistics.median(steps.run(count) for _ in range(3))
    cost = least_cost(model.program, requests, start, length)
    memory_s = cost.bytes / ceilings["copy_bytes_per_s"]
    math_s = cost.flops / ceilings["float8" if quantization == "fp8" else "bfloat16"]
    return {
        "ms": seconds * 1e3,
        "tokens_per_s": requests * length / seconds,
        "share_of_copy_bandwidth": memory_s / seconds,
        "share_of_matrix_peak": math_s / seconds,
        "share_of_larger_floor": max(memory_s, math_s) / seconds,
        "host_ms": steps.host_seconds() * 1e3,
        **(_replayed(model, requests, seconds) if length == 1 else _call_by_call(model, steps, count)),
        **_traced(steps, 8 if length == 1 else 3),
    }


def _replayed(model: Any, requests: int, seconds: float) -> dict[str, float]:
    """What a decode step's recording takes by itself, and the share of `seconds` that is spent between two of them.

    Without a profiler, which slows the launches that `idle_share` looks between.
    """
    graphs = model.runner.graphs
    if graphs is None or requests not in graphs.recorded:
        return {}
    with torch.inference_mode():
        alone = model.runner.between_steps(lambda: graphs.time_replay(requests))
    return {"replay_ms": alone * 1e3, "between_share": 1 - alone / seconds}


def _call_by_call(model: Any, steps: _Steps, count: int) -> dict[str, float]:
    """What a step with prompts takes that is not replayed in pieces, if it was."""
    prompts = model.runner.prompts
    if prompts is None or not prompts.replayed:
        return {}
    model.runner.prompts = None
    try:
        steps.run(2)
        return {"call_by_call_ms": statistics.median(steps.run(count) for _ in range(3)) * 1e3}
    finally:
        model.runner.prompts = prompts


class _Steps:
    """The same step again and again, each planned as the engine does: submitted while the one before it runs.

    A decode step's requests stay at one length, as if each had just come in.
    """

    def __init__(self, model: Any, requests: int, start: int, length: int) -> None:
        from skyline.engine.messages import AdmittedRequest, StepPlan
        from skyline.engine.sampling_params import SamplingParams

        self._runner, self._number = model.runner, 0
        self._host: list[float] = []  # seconds that the runner's thread took for each step
        execute = type(model.runner)._execute

        def timed(plan: StepPlan) -> Any:
            began = time.perf_counter()
            done = execute(model.runner, plan)
            self._host.append(time.perf_counter() - began)
            return done

        model.runner._execute = timed
        blocks = -(-(start + length + 1) // 16)
        if requests * blocks > model.limits.num_blocks:
            raise ValueError(f"{requests * blocks} KV blocks are needed, there are {model.limits.num_blocks}")
        params = SamplingParams(temperature=0, max_tokens=64)
        admitted = [
            AdmittedRequest(
                slot=slot,
                request_id=str(slot),
                token_ids=[slot + 1] * (start + length),
                num_prompt=start + length,
                params=params,
                seed=0,
            )
            for slot in range(requests)
        ]
        self._first = StepPlan(
            step=0,
            freed=list(range(256)),  # of the cell before
            admitted=admitted,
            new_blocks=[(slot, 0, list(range(slot * blocks, (slot + 1) * blocks))) for slot in range(requests)],
        )
        self._lists = {
            "slots": list(range(requests)),
            "starts": [start] * requests,
            "lengths": [length] * requests,
            "samples": [True] * requests,
        }

    def host_seconds(self) -> float:
        return statistics.median(self._host[4:])

    def run(self, count: int) -> float:
        """Seconds a step."""
        from skyline.engine.messages import StepPlan

        under_way: list[Any] = []
        self._runner.between_steps(torch.cuda.synchronize)  # behind the recording of a size, which it would break
        began = time.perf_counter()
        for _ in range(count):
            first = self._first if self._number == 0 else StepPlan(step=self._number)
            for name, value in self._lists.items():
                setattr(first, name, value)
            self._number += 1
            under_way.append(self._runner.submit(first))
            if len(under_way) == 2:
                under_way.pop(0).result()
        for handle in under_way:
            handle.result()  # waits for the step's tokens
        return (time.perf_counter() - began) / count


def _traced(steps: _Steps, count: int) -> dict[str, Any]:
    try:
        return _trace(steps, count)
    except Exception as error:  # a profiler that does not work here takes nothing from the times
        return {"trace_error": f"{type(error).__name__}: {error}"}


def _trace(steps: _Steps, count: int) -> dict[str, Any]:
    """From a profile: launches a step, the share of time that no kernel runs, and calls that wait for the device."""
    from torch.profiler import ProfilerActivity, profile

    steps.run(2)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        steps.run(count)
    events = [event for event in profiler.profiler.kineto_results.events()]
    device = sorted((e.start_ns(), e.end_ns(), e.name()) for e in events if e.device_type().name == "CUDA")
    kernels = [event for event in device if not event[2].startswith(("Memcpy", "Memset"))]
    if not kernels:
        return {}
    busy, end = 0, device[0][0]
    for first, last, _ in device:
        busy += max(0, last - max(first, end))
        end = max(end, last)
    span = end - device[0][0]
    gaps: dict[str, int] = {}
    latest = device[0]
    for event in device[1:]:
        if event[0] > latest[1]:
            pair = f"{latest[2][:40]} -> {event[2][:40]}"
            gaps[pair] = gaps.get(pair, 0) + event[0] - latest[1]
        latest = max(latest, event, key=lambda one: one[1])
    by_name: dict[str, int] = {}
    for first, last, name in kernels:
        by_name[name[:60]] = by_name.get(name[:60], 0) + last - first
    largest = sorted(by_name.items(), key=lambda item: -item[1])[:10]
    return {
        "launches": len(kernels) / count,
        "idle_share": 1 - busy / span,
        "waits": sum(event.name() in _WAITS for event in events) - 2,  # that of `run`, and the profiler's
        "kernels_ms": {name: round(total / count / 1e6, 4) for name, total in largest},
        "gaps_us": {
            pair: round(total / count / 1e3, 2) for pair, total in sorted(gaps.items(), key=lambda item: -item[1])[:6]
        },
    }


def least_cost(program: Any, requests: int, start: int, length: int) -> Any:
    """What a step must move and compute at the least: the sum of its ops' costs."""
    from skyline.graph import Call
    from skyline.ops import AttentionBatch, Cost

    total = Cost(0, 0)

    def visit(call: Call, arguments: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        nonlocal total
        total += call.op.cost(*arguments)

    ids = torch.empty(requests * length, dtype=torch.int64, device="meta")
    one_block = [[0]] * requests  # the tables' content plays no part in the cost
    batch = AttentionBatch.build(
        one_block, [start] * requests, [length] * requests, start + length, torch.device("cpu")
    )
    program.trace(ids, ids, batch, torch.empty(requests, dtype=torch.int64, device="meta"), visit=visit)
    return total
