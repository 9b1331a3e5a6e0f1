"""What the engine itself costs: microseconds a decode step, with a runner that computes nothing.

    python benchmarks/engine_overhead.py [--json benchmarks/results/engine_overhead.json]

A step is planning, submitting, taking in the sampled tokens and making the outputs for the clients. Encoding these
outputs for the socket is timed apart. Every request generates in every step, and one in 16 steps takes a new KV block.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from skyline.engine.core import EngineCore
from skyline.engine.messages import EngineRequest, StepOutputs
from skyline.engine.null_runner import NullRunner
from skyline.engine.sampling_params import SamplingParams
from skyline.engine.scheduler import Limits

BATCHES = (1, 16, 64, 128, 256)
BARS_US = {64: 400.0, 256: 1500.0}  # the median step must stay below
PROMPT = 32
BLOCK_SIZE = 16


class Row(msgspec.Struct):
    """Times in microseconds."""

    batch: int
    scheduling: str
    steps: int
    step_median: float
    step_p90: float
    encode_median: float
    encode_p90: float
    outputs_bytes: int
    bar: float | None
    passed: bool | None


def measure(batch: int, asynchronous: bool, steps: int, warmup: int) -> Row:
    max_model_len = PROMPT + warmup + steps + 8
    limits = Limits(
        num_blocks=batch * -(-max_model_len // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_num_seqs=batch,
        max_num_batched_tokens=max(2048, batch),
        max_model_len=max_model_len,
    )
    core = EngineCore(limits, NullRunner(), async_scheduling=asynchronous)
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    for number in range(batch):
        # Ids as long as the server's, prompts that share nothing, and lengths that spread new blocks over the steps.
        prompt = [number * PROMPT + position for position in range(PROMPT - number % BLOCK_SIZE)]
        refused = core.add(EngineRequest(f"{number:032x}-0", prompt, params))
        assert refused is None, refused
    while len(core.scheduler.running) < batch or core.scheduler.waiting:
        core.step()
    for _ in range(warmup):
        core.step()

    encoder = msgspec.msgpack.Encoder()
    step_us, encode_us = [], []
    encoded = b""
    gc.collect()
    for _ in range(steps):
        began = time.perf_counter_ns()
        outputs = core.step()
        stepped = time.perf_counter_ns()
        encoded = encoder.encode(StepOutputs(outputs))
        step_us.append((stepped - began) / 1000)
        encode_us.append((time.perf_counter_ns() - stepped) / 1000)
        assert len(outputs) == batch, "a request did not generate in this step"
    core.scheduler.check()
    bar, median = BARS_US.get(batch), statistics.median(step_us)
    return Row(
        batch=batch,
        scheduling="async" if asynchronous else "sync",
        steps=steps,
        step_median=round(median, 1),
        step_p90=round(_p90(step_us), 1),
        encode_median=round(statistics.median(encode_us), 1),
        encode_p90=round(_p90(encode_us), 1),
        outputs_bytes=len(encoded),
        bar=bar,
        passed=None if bar is None else median < bar,
    )


def _p90(values: list[float]) -> float:
    return sorted(values)[int(0.9 * (len(values) - 1))]


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def table(rows: list[Row]) -> str:
    lines = [f"{'requests':>8} {'mode':>6} {'step µs':>9} {'p90':>8} {'encode µs':>10} {'p90':>8} {'bar µs':>8}"]
    for row in rows:
        bar = "" if row.bar is None else f"{row.bar:.0f} {'ok' if row.passed else 'OVER'}"
        lines.append(
            f"{row.batch:>8} {row.scheduling:>6} {row.step_median:>9.1f} {row.step_p90:>8.1f} "
            f"{row.encode_median:>10.1f} {row.encode_p90:>8.1f} {bar:>8}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="measured steps (default: 1000)")
    parser.add_argument("--warmup", type=int, default=200, help="steps before them (default: 200)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args()
    if options.steps < 1 or options.warmup < 1:
        parser.error("--steps and --warmup must be at least 1")
    rows = [
        measure(batch, asynchronous, options.steps, options.warmup)
        for batch in BATCHES
        for asynchronous in (False, True)
    ]
    if options.json is not None:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
            "python": platform.python_version(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": msgspec.to_builtins(rows),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(table(rows))
    return 0 if all(row.passed is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
