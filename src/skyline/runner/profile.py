"""Where the time of real steps goes: each op against the machine's limits, and what is around the ops."""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from skyline.engine.config import EngineConfig
from skyline.engine.core import EngineCore
from skyline.engine.messages import EngineRequest, StepPlan
from skyline.engine.sampling_params import SamplingParams
from skyline.graph import Call, Program
from skyline.kernels.cpu.machine import Machine
from skyline.ops import Cost
from skyline.ops.host_memory import use_huge_pages
from skyline.runner.loader import LoadedModel, load_model

_WARM_UP = 2
_PARTS = ("kernels", "python", "sampling", "preparation", "idle")
# Ops that do arithmetic in the format of the activations, and in integers; all others compute in float32.
_IN_ACTIVATIONS = (
    "linear",
    "linear_fp4",
    "linear_fp8",
    "linear_int8_weight_only",
    "moe_experts",
    "moe_experts_clamped",
    "moe_experts_clamped_fp4",
    "moe_experts_fp4",
    "moe_experts_fp8",
    "moe_experts_int8_weight_only",
    "paged_attention",
)
# Whose costs are told from plain parameters, not from how kernels keep them: 16 bits of experts that are kept in 12.
_OF_PARAMETERS = (
    "linear_fp4",
    "linear_fp8",
    "moe_experts",
    "moe_experts_clamped",
    "moe_experts_clamped_fp4",
    "moe_experts_fp4",
    "moe_experts_fp8",
)
_IN_INTEGERS = {"linear_int8": "int8", "moe_experts_int8": "int8", "linear_int4": "int4", "moe_experts_int4": "int4"}


@dataclass(slots=True)
class _Record:
    """One step on the runner's thread. Times are of perf_counter_ns."""

    plan: StepPlan
    began: int
    ended: int = 0
    program: int = 0  # duration
    sampling: int = 0  # duration
    calls: list[tuple[Call, tuple[Any, ...], int, int]] = field(default_factory=list)  # values, began, ended
    recording: int = 0  # what taking the times took, after each call


def profile(
    config: EngineConfig,
    machine: Machine,
    *,
    batch: int = 1,
    context: int = 256,
    prefill: int = 512,
    steps: int = 5,
    temperature: float = 0.0,
) -> dict[str, Any]:
    """Plain JSON data: for prefill steps of one request, and decode steps of `batch` requests, the median of `steps`.

    The engine plans and the runner computes as they do when they serve. Ops are timed one by one in steps of their own;
    `plain_us` is a step without that, in which recorded calls are replayed, and `outside_us` what it spends outside of
    the model's calls. Raises CheckpointError, OutOfMemoryError or ValueError.
    """
    if config.device != "cpu":
        raise ValueError("profile times kernels on the host's clock, which tells nothing about a GPU: use --device cpu")
    budget = max(config.max_num_batched_tokens, prefill, batch)
    # While the last of the prompts are computed, the first requests decode already.
    length = context + 2 * (steps + _WARM_UP) + 4 + -(-batch * context // budget) * 2
    config = msgspec.structs.replace(
        config,
        max_num_seqs=batch,
        max_num_batched_tokens=budget,
        max_model_len=max(length, prefill + 2),
        enable_prefix_caching=False,
    )
    loaded = load_model(config)
    use_huge_pages(share=1.0)  # as an engine that has served for a while
    watch = _Watch(loaded)
    try:
        engine = EngineCore(loaded.limits, loaded.runner, async_scheduling=config.async_scheduling)
        chosen = {
            "prefill": _measure(engine, watch, loaded, 1, prefill, steps, temperature, decode=False),
            "decode": _measure(engine, watch, loaded, batch, context, steps, temperature, decode=True),
        }
    finally:
        loaded.runner.close()
    sizes = {"prefill": {"requests": 1, "tokens": prefill}, "decode": {"requests": batch, "context": context}}
    return {
        "model": config.model,
        "report": loaded.report,
        "machine": msgspec.to_builtins(machine),
        "steps": {
            name: {**sizes[name], **_summary(loaded.program, machine, plain, timed)}
            for name, (plain, timed) in chosen.items()
        },
    }


_Steps = list[tuple[_Record, int]]  # each with the nanoseconds from the end of the step before to its own begin


def _measure(
    engine: EngineCore,
    watch: _Watch,
    loaded: LoadedModel,
    requests: int,
    tokens: int,
    steps: int,
    temperature: float,
    *,
    decode: bool,
) -> tuple[_Steps, _Steps]:
    """Steps without and with the timing of ops."""
    picked: list[_Steps] = []
    for timed in (False, True):
        loaded.program.observe(watch.around if timed else None)
        watch.records.clear()
        wanted = steps + _WARM_UP
        # A prompt that leaves the context as asked for to the step in the middle.
        prompt = max(1, tokens - wanted) if decode else tokens
        rounds, new = (1, loaded.limits.max_model_len - prompt) if decode else (wanted, 1)
        params = SamplingParams(temperature=temperature, max_tokens=new, ignore_eos=True)
        for number in range(rounds):
            names = [f"{number}-{index}" for index in range(requests)]
            for name in names:
                engine.add(EngineRequest(name, random.choices(range(loaded.vocab_size), k=prompt), params))
            while engine.has_work and (not decode or len(list(_pick(watch.records, requests, decode))) < wanted):
                engine.step()
            engine.abort(names)
            while engine.has_work:
                engine.step()
        picked.append(list(_pick(watch.records, requests, decode))[_WARM_UP:wanted])
    loaded.program.observe(None)
    return picked[0], picked[1]


def _pick(records: list[_Record], requests: int, decode: bool) -> Iterator[tuple[_Record, int]]:
    """Finished steps in which every request does what is to be measured. Between prompts the engine has no work."""
    before = None
    for record in list(records):
        if record.ended and len(record.plan.slots) == requests:
            if not decode and record.plan.starts[0] == 0:
                yield record, 0
            if decode and before is not None and all(length == 1 for length in record.plan.lengths):
                yield record, record.began - before.ended
        before = record


class _Watch:
    """Takes the times of a runner's steps: puts itself around what the runner calls."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.records: list[_Record] = []
        runner: Any = loaded.runner
        compute, program, sample = runner._execute, runner._program, runner._sampler.sample

        def execute(plan: StepPlan) -> Any:
            record = _Record(plan, time.perf_counter_ns())
            self.records.append(record)
            try:
                return compute(plan)
            finally:
                record.ended = time.perf_counter_ns()

        def run(*inputs: Any) -> Any:
            began = time.perf_counter_ns()
            logits = program(*inputs)
            self.records[-1].program = time.perf_counter_ns() - began
            return logits

        def choose(*arguments: Any) -> Any:
            began = time.perf_counter_ns()
            sampled = sample(*arguments)
            self.records[-1].sampling = time.perf_counter_ns() - began
            return sampled

        def replay(plan: StepPlan, greedy: bool) -> Any:
            began = time.perf_counter_ns()
            decoded = replayed(plan, greedy)
            self.records[-1].program = time.perf_counter_ns() - began
            return decoded

        runner._execute, runner._program, runner._sampler.sample = execute, run, choose
        if runner._replay is not None:
            replayed, runner._replay.step = runner._replay.step, replay

    def around(self, call: Call, run: Callable[..., Any]) -> Callable[..., Any]:
        clock, outputs = time.perf_counter_ns, 0 if call.kernel.into is None else len(call.results)

        def timed(*values: Any) -> Any:
            began = clock()
            result = run(*values)
            ended = clock()
            record = self.records[-1]
            record.calls.append((call, values[outputs:], began, ended))
            record.recording += clock() - ended
            return result

        return timed


def _summary(program: Program, machine: Machine, plain: _Steps, timed: _Steps) -> dict[str, Any]:
    walls = [(record.ended - record.began - record.recording) / 1e3 for record, _ in timed]
    parts: defaultdict[str, list[float]] = defaultdict(list)
    ops: dict[tuple[str, str], list[tuple[int, float, float, Cost]]] = {}  # calls, us, least us, cost of a step
    for (record, idle), wall in zip(timed, walls, strict=True):
        sums: dict[tuple[str, str], tuple[int, float, float, Cost]] = {}
        kernels = 0.0
        for call, values, began, ended in record.calls:
            us, cost = (ended - began) / 1e3, _cost(program, call, values)
            kernels += us
            count, total, least, costs = sums.get(key := (call.op.name, _shape(values)), (0, 0.0, 0.0, Cost(0, 0)))
            sums[key] = count + 1, total + us, least + _least_us(machine, call, values, cost), costs + cost
        for key, figures in sums.items():
            ops.setdefault(key, []).append(figures)
        python = (record.program - record.recording) / 1e3 - kernels
        sampling = record.sampling / 1e3
        preparation = wall - kernels - python - sampling
        for name, us in zip(_PARTS, (kernels, python, sampling, preparation, idle / 1e3), strict=True):
            parts[name].append(us)
    step = statistics.median(walls)
    rows = []
    for (name, shape), samples in ops.items():
        calls, us, least, cost = sorted(samples, key=lambda sample: sample[1])[len(samples) // 2]
        rows.append(
            {
                "op": name,
                "shape": shape,
                "provider": program.choices[name].kernel.provider,
                "calls": calls,
                "us": us,
                "us_per_call": us / calls,
                "gb_per_s": cost.bytes / us / 1e3,
                "gflop_per_s": cost.flops / us / 1e3,
                "roofline": least / us,
                "share": us / step,
            }
        )
    return {
        "measured": len(timed),
        "step_us": step,
        "plain_us": statistics.median((record.ended - record.began) / 1e3 for record, _ in plain),
        "outside_us": statistics.median((record.ended - record.began - record.program) / 1e3 for record, _ in plain),
        "parts_us": {name: statistics.median(values) for name, values in parts.items()},
        "ops": sorted(rows, key=lambda row: -float(row["us"])),
    }


def _cost(program: Program, call: Call, values: tuple[Any, ...]) -> Cost:
    """Of the call with these arguments. A weight that another op's layout holds is described by the plain parameter."""
    parameters = {use.slot: use.parameter for use in program.weights}
    flexible = call.kernel.any_layout
    if call.op.name in _OF_PARAMETERS:
        flexible = flexible | set(call.kernel.layouts)
    described = [
        parameters.get(slot, value) if index in flexible else value
        for index, (slot, value) in enumerate(zip(call.arguments, values, strict=True))
    ]
    return call.op.cost(*described)


def _least_us(machine: Machine, call: Call, values: tuple[Any, ...], cost: Cost) -> float:
    activations = next(value.dtype for value in values if isinstance(value, torch.Tensor))
    name = _IN_INTEGERS.get(call.op.name, "float32")
    if call.op.name in _IN_ACTIVATIONS and activations == torch.bfloat16:
        name = "bfloat16"
    peak = machine.peaks[name].highest or machine.peaks["float32"].highest
    return max(cost.bytes / machine.bandwidth, cost.flops / peak) * 1e6


def _shape(values: tuple[Any, ...]) -> str:
    """The first two arguments with a shape: rows of activations, and the weight or what else decides the cost."""
    shapes = [tuple(value.shape) for value in values if hasattr(value, "shape") and hasattr(value, "nbytes")]
    return " ".join("x".join(map(str, shape)) for shape in shapes[:2])
