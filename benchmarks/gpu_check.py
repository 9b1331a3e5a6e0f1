"""Check and time on a CUDA device everything that exists there, and write one JSON record.

    python benchmarks/gpu_check.py --json benchmarks/results/gpu.json

Self-contained: needs torch, numpy, safetensors, tokenizers, jinja2 and this checkout, not installed; the engine part
also msgspec and llguidance. Without a GPU it says so and exits 0. What fails is recorded, and the rest goes on.

Every op is compared with its reference in float32 on the CPU; the embedded model answers held-out problems through the
engine; then random-weight models of real shapes are stepped through the same Program that serves requests. Times are
medians of CUDA events and include what the host takes to launch; shares are of ceilings measured first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from shapes import SHAPES

from skyline.checkpoint.config import load_config
from skyline.graph import Call, Program, capture, lower, run_passes
from skyline.models import create_model, kv_caches, randomize
from skyline.ops import OPS, AttentionBatch, Cost, KVCache, Op

CUDA = torch.device("cuda")
BLOCK_SIZE = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=SHAPES)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"command": " ".join(sys.argv), "torch": torch.__version__, "host": platform.machine()}
    if torch.cuda.is_available():
        record.update(_measure(arguments.models))
        _print(record)
    else:
        record["skipped"] = "torch finds no CUDA device"
        print("gpu_check: skipped, torch finds no CUDA device")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if any("error" in row or not row.get("ok", True) for row in record.get("ops", [])) else 0


def _measure(models: list[str]) -> dict[str, Any]:
    seed = int(time.time())
    torch.manual_seed(seed)
    properties = torch.cuda.get_device_properties(CUDA)
    ceilings = _ceilings()
    record: dict[str, Any] = {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "seed": seed,
        "ceilings": ceilings,
        "ops": [],
        "engine": _attempt(_answer_problems)[0],
        "steps": [],
    }
    for op in OPS.values():
        for dtype in (torch.float32, torch.bfloat16):
            record["ops"] += _attempt(_check_op, op, dtype, seed)
    for name in models:
        record["steps"] += _attempt(_time_model, name, ceilings)
        torch.cuda.empty_cache()
    return record


def _attempt(run: Callable[..., list[dict[str, Any]]], *arguments: Any) -> list[dict[str, Any]]:
    """The rows of `run`, or one row that says what it raised."""
    try:
        return run(*arguments)
    except Exception as error:
        what = " ".join([run.__name__.strip("_"), *(str(argument) for argument in arguments[:2])])
        return [{"what": what, "error": f"{type(error).__name__}: {error}"}]


def _answer_problems(count: int = 100) -> list[dict[str, Any]]:
    """Exact match of the embedded model, bf16 and greedy, through scheduler, runner and sampler on the device."""
    from skyline.checkpoint import Tokenizer, load_chat_template
    from skyline.demo import DEMO_PATH, HELDOUT_PATH
    from skyline.demo.problems import extract_answer
    from skyline.engine.config import EngineConfig
    from skyline.engine.core import EngineCore
    from skyline.engine.messages import EngineRequest
    from skyline.engine.sampling_params import SamplingParams
    from skyline.runner.loader import load_model

    tokenizer = Tokenizer(DEMO_PATH)
    template = load_chat_template(tokenizer)
    assert template is not None
    loaded = load_model(EngineConfig(model=str(DEMO_PATH), device=str(CUDA), kv_cache_memory=1 << 28))
    core = EngineCore(loaded.limits, loaded.runner, eos_token_ids=loaded.eos_token_ids)
    problems = [json.loads(line) for line in HELDOUT_PATH.read_text().splitlines()[:count]]
    for number, problem in enumerate(problems):
        text = template.render([{"role": "user", "content": problem["question"]}])
        prompt = tokenizer.encode(text, add_special_tokens=False)
        core.add(EngineRequest(str(number), prompt, SamplingParams(temperature=0, max_tokens=256)))
    answers: dict[str, list[int]] = {str(number): [] for number in range(count)}
    began = time.perf_counter()
    while core.has_work:
        for output in core.step():
            answers[output.request_id] += output.token_ids
    seconds = time.perf_counter() - began
    loaded.runner.close()
    right = [
        extract_answer(tokenizer.decode(answers[str(number)])) == problem["answer"]
        for number, problem in enumerate(problems)
    ]
    tokens = sum(map(len, answers.values()))
    return [{"exact_match": sum(right) / count, "problems": count, "tokens_per_s": tokens / seconds}]


def _ceilings() -> dict[str, float]:
    """Bytes read plus written per second by a large copy, and bf16 FLOP/s of a large product, both on random data."""
    source = torch.randn(1 << 30, device=CUDA, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_s = _time(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    product_s = _time(lambda: a @ b)
    return {"copy_bytes_per_s": 2 * 2 * source.numel() / copy_s, "bf16_flops": 2 * 8192**3 / product_s}


def _time(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median seconds of one run, after warm-up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def _check_op(op: Op, dtype: torch.dtype, seed: int) -> list[dict[str, Any]]:
    """Relative error ‖out − ref‖ / ‖ref‖ of every case of an op, on fresh inputs."""
    worst, worst_case, count = 0.0, "", 0
    for case in op.cases(dtype, torch.Generator().manual_seed(seed)):
        expected = _outputs(op.reference, _moved(case.args, torch.device("cpu"), torch.float32))
        actual = _outputs(op, _moved(case.args, CUDA, dtype))
        for want, got in zip(expected, actual, strict=True):
            error = float((got.double().cpu() - want.double()).norm() / want.double().norm().clamp_min(1e-12))
            count += 1
            if not error <= worst:  # NaN counts as worst
                worst, worst_case = error, case.label
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    row = {"op": op.name, "dtype": str(dtype).removeprefix("torch."), "outputs": count, "worst": worst}
    return [{**row, "case": worst_case, "ok": worst <= limit}]


def _outputs(run: Callable[..., Any], arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    result = run(*arguments)
    written = [tensor for value in arguments if isinstance(value, KVCache) for tensor in value.tensors]
    if result is None:
        return written
    return list(result) if isinstance(result, tuple) else [result]


def _moved(arguments: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Copies on another device; floating point ones in another dtype."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            keep = not value.is_floating_point() or value.dtype == torch.float32
            return value.to(device, None if keep else dtype, copy=True)
        if isinstance(value, KVCache):
            k, v = (part.to(device, dtype, copy=True) for part in value.tensors)
            return dataclasses.replace(value, dtype=dtype, k=k, v=v)
        if isinstance(value, AttentionBatch):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return AttentionBatch(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in fields.items()})
        return value

    return tuple(move(value) for value in arguments)


def _time_model(name: str, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[name]))
        config = load_config(Path(folder))
    model = create_model(config, torch.bfloat16, CUDA, 8192)
    randomize(model)
    graph = capture(model)
    run_passes(graph)
    program = lower(graph, model, CUDA, torch.bfloat16)
    caches = kv_caches(model)
    rows = []
    for cell, batch, start, length in (
        ("decode b1", 1, 1024, 1), ("decode b16", 16, 1024, 1), ("decode b64", 64, 1024, 1),
        ("prefill 1k", 1, 0, 1024), ("prefill 8k", 1, 0, 8064),
    ):  # fmt: skip
        blocks = -(-(start + length) // BLOCK_SIZE)
        for cache in caches:
            cache.allocate(batch * blocks, BLOCK_SIZE, CUDA)
            for part in cache.tensors:
                part.normal_()
        seconds = _time(partial(_step, program, batch, start, length, blocks, config.vocab_size), repeats=5)
        tokens = batch * length
        least = _least_cost(program, batch, start, length)
        rows.append(
            {
                "model": name,
                "cell": cell,
                "ms": seconds * 1e3,
                "tokens_per_s": tokens / seconds,
                "share_of_copy_bandwidth": least.bytes / seconds / ceilings["copy_bytes_per_s"],
                "share_of_matrix_peak": least.flops / seconds / ceilings["bf16_flops"],
            }
        )
    return rows


def _least_cost(program: Program, batch: int, start: int, length: int) -> Cost:
    """What a step must move and compute at the least: the sum of its ops' costs."""
    total = Cost(0, 0)

    def visit(call: Call, arguments: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        nonlocal total
        total += call.op.cost(*arguments)

    ids = torch.empty(batch * length, dtype=torch.int64, device="meta")
    one_block = [[0]] * batch  # the tables' content plays no part in the cost
    meta = AttentionBatch.build(one_block, [start] * batch, [length] * batch, start + length, torch.device("cpu"))
    program.trace(ids, ids, meta, torch.empty(batch, dtype=torch.int64, device="meta"), visit=visit)
    return total


@torch.inference_mode()
def _step(program: Program, batch: int, start: int, length: int, blocks: int, vocab: int) -> torch.Tensor:
    tables = [list(range(row * blocks, (row + 1) * blocks)) for row in range(batch)]
    meta = AttentionBatch.build(tables, [start] * batch, [length] * batch, BLOCK_SIZE, CUDA)
    ids = torch.randint(0, vocab, (batch * length,), device=CUDA)
    positions = torch.arange(start, start + length, device=CUDA).repeat(batch)
    rows = torch.arange(batch, device=CUDA) * length + length - 1
    return program(ids, positions, meta, rows).argmax(-1)


def _print(record: dict[str, Any]) -> None:
    ceilings = record["ceilings"]
    print(f"{record['device']}, {record['memory_gib']} GiB, torch {record['torch']}")
    print(f"copy {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 {ceilings['bf16_flops'] / 1e12:.0f} TFLOP/s")
    for row in [*record["ops"], *record["steps"], record["engine"]]:
        if "error" in row:
            print(f"FAILED {row['what']}: {row['error']}")
        elif "op" in row:
            verdict = "ok" if row["ok"] else f"WRONG at {row['case']}"
            print(f"{row['op']:>16} {row['dtype']:>9} {row['worst']:.1e} {verdict}")
        elif "cell" in row:
            print(
                f"{row['model']:>14} {row['cell']:>11} {row['ms']:9.2f} ms {row['tokens_per_s']:10.0f} tok/s "
                f"{row['share_of_copy_bandwidth']:6.1%} of copy {row['share_of_matrix_peak']:6.1%} of bf16 peak"
            )
        else:
            print(f"embedded model through the engine: {row['exact_match']:.1%} of {row['problems']} problems right")


if __name__ == "__main__":
    sys.exit(main())
