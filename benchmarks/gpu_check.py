"""Check and time on a CUDA device what Skyline does there, print a table and write one JSON record.

    python benchmarks/gpu_check.py --json benchmarks/results/gpu.json
    python benchmarks/gpu_check.py --parts ops steps --models llama-3.1-8b --weights none fp8

Self-contained: needs this checkout, not installed, and torch, triton, numpy, safetensors, tokenizers, jinja2, msgspec
and llguidance; transformers for the peer. Without a GPU it says so and exits 0. What fails is recorded, the rest goes
on.

ops       every op's kernel against its reference in float32 on the CPU
answers   the embedded model on held-out problems through the engine, in several formats
steps     random-weight models of real shapes through the runner that serves requests: time, shares of the ceilings that
          are measured first, launches, idle share of the device between them, calls that wait for it
frontier  1k/1k through the engine at several concurrencies
peer      transformers on the same shape
startup   from the start of a process to the first token of an 8B checkpoint in the page cache
experts   tiles of experts' rows in four bits, one by one
prompts   tiles of prompts' attention, likewise
flashinfer  its kernels beside Triton's, call by call, where it is installed
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT.parent / "src"), str(ROOT)]
# For the processes that check ops.
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])

from gpu import ceilings, experts, foreign, ops, peer, prompts, serving, steps  # noqa: E402
from shapes import SHAPES  # noqa: E402

PARTS = ("ops", "answers", "steps", "frontier", "peer", "startup", "flashinfer", "experts", "prompts")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--models", nargs="*", default=["llama-3.1-8b", "qwen3-0.6b"], choices=SHAPES)
    parser.add_argument("--weights", nargs="*", default=["none", "fp8"], help="none (bfloat16), fp8, mxfp4, int8, int4")
    parser.add_argument("--kv", nargs="*", default=["auto"], help="auto, fp8")
    parser.add_argument("--prefer-kernels", choices=("flashinfer",), help="for the steps, as of `skyline serve`")
    parser.add_argument("--ops", nargs="*", help="of the ops, all by default")
    parser.add_argument("--cases", type=int, default=1000, help="of an op and dtype, at most about")
    parser.add_argument("--seconds", type=float, default=300.0, help="for the ops")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="that check ops")
    parser.add_argument(
        "--tune", type=float, default=0.0, help="seconds for a format's decode steps, before timing them"
    )
    parser.add_argument("--osl", type=int, default=1024, help="tokens of each answer of the frontier")
    parser.add_argument("--checkpoint", type=Path, help="of the first model, already written, for the start-up")
    parser.add_argument("--compiled-peer", action="store_true", help="also transformers' static cache, which compiles")
    arguments = parser.parse_args()
    words = [word for word in sys.argv[1:] if not word.startswith("--json=")]
    if "--json" in words:  # with a path of this machine
        at = words.index("--json")
        del words[at : at + 2]
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/gpu_check.py", *words]),
        "torch": torch.__version__,
        "host": platform.machine(),
    }
    if not torch.cuda.is_available():
        record["skipped"] = "torch finds no CUDA device"
        print("gpu_check: skipped, torch finds no CUDA device")
    else:
        _measure(arguments, record)
    if arguments.json:
        _write(arguments.json, record)
    return 0 if all(row["ok"] is not False for row in record.get("ops", [])) else 1


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _measure(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    import triton

    properties = torch.cuda.get_device_properties(0)
    seed = int(time.time())
    record |= {"device": properties.name, "triton": triton.__version__, "seed": seed, "seconds": {}}
    record["memory_gib"] = round(properties.total_memory / 2**30, 1)
    print(f"{record['device']}, {record['memory_gib']} GiB, torch {record['torch']}, triton {record['triton']}")
    pairs = [(weights, kv) for weights in arguments.weights for kv in arguments.kv]

    def part(name: str, run: Any) -> None:
        if name != "ceilings" and name not in arguments.parts:
            return
        began = time.perf_counter()
        record[name] = run()
        record["seconds"][name] = round(time.perf_counter() - began, 1)
        print(f"-- {name}, {record['seconds'][name]} s")
        if name != "steps":  # printed as they came
            _print_part(name, record[name])
        if arguments.json:
            _write(arguments.json, record)

    def all_steps() -> list[dict[str, Any]]:
        rows = []
        for model in arguments.models:
            for weights, kv in pairs:
                quantization = None if weights == "none" else weights
                try:
                    found, tuned = steps.measure(
                        model, quantization, record["ceilings"], kv, arguments.tune, arguments.prefer_kernels
                    )
                except Exception as error:
                    text = f"{type(error).__name__}: {str(error)[:600]}"
                    found, tuned = [{"model": model, "weights": weights, "error": text}], None
                if tuned is not None:
                    record.setdefault("tuned", []).append(tuned)
                    for row in tuned["sizes"]:
                        times = f"{row['default_s'] * 1e3:.3f} -> {row['seconds'] * 1e3:.3f} ms"
                        print(f"tuned {weights} b{row['requests']}: {times} {row['knobs']}")
                _print_part("steps", found)
                rows += found
                record["steps"] = rows
                if arguments.json:
                    _write(arguments.json, record)
        return rows

    def frontiers() -> list[dict[str, Any]]:
        rows = []
        for weights, kv in pairs:
            with steps.loaded(arguments.models[0], None if weights == "none" else weights, kv) as (model, _):
                found = serving.frontier(model, (1, 16, 64, 256), (1024, arguments.osl))
            rows += [{"model": arguments.models[0], "weights": weights, "kv": kv, **row} for row in found]
        return rows

    def peers() -> list[dict[str, Any]]:
        model = arguments.models[0]
        rows: list[dict[str, Any]] = []
        ways = [lambda: peer.measure(model, (64, 1, 16), compiled=False), lambda: [peer.continuous(model, 64)]]
        if arguments.compiled_peer:
            ways.append(lambda: peer.measure(model, (1, 64), compiled=True))
        for way in ways:
            rows += way()
            record["peer"] = rows
            if arguments.json:
                _write(arguments.json, record)
        return rows

    part("ceilings", ceilings.measure)
    part("ops", lambda: ops.check(arguments.processes, seed, arguments.cases, arguments.seconds, arguments.ops))
    part("answers", serving.answer_problems)
    part("steps", all_steps)
    part("frontier", frontiers)
    part("peer", peers)
    part("experts", experts.measure)
    part("prompts", prompts.measure)
    if find_spec("flashinfer") is not None:
        part("flashinfer", foreign.compare)
    elif "flashinfer" in arguments.parts:
        print("-- flashinfer: not installed")
    part("startup", lambda: serving.first_token(arguments.models[0], arguments.checkpoint))


def _print_part(name: str, found: Any) -> None:
    """As soon as it is known, so that a run that is cut off has said what it knew."""
    if name == "ceilings":
        rates = ", ".join(f"{key} {found[key] / 1e12:.0f} TFLOP/s" for key in ("bfloat16", "float8") if key in found)
        print(f"copy {found['copy_bytes_per_s'] / 1e12:.2f} TB/s, {rates}")
    elif name == "ops":
        for row in found:
            if row["ok"] is False:
                what = row.get("error") or f"off by {row['worst']:.1e} at {row['case']}"
                print(f"WRONG {row['op']} {row['dtype']} ({row.get('provider')}): {what}")
        providers = sorted({str(row.get("provider")) for row in found})
        print(f"ops right: {sum(row['ok'] is True for row in found)} of {len(found)}, by {', '.join(providers)}")
    elif name == "answers":
        for key, value in found.items():
            print(f"answers {key}: {value}")
    elif name in _ROWS:
        for row in found:
            print(_ROWS[name](row) if "error" not in row else f"{name} FAILED {row}")
    else:
        print(f"{name}: {found}")
    sys.stdout.flush()


_ROWS = {
    "steps": lambda row: (
        f"{row['model']:>14} {row['weights']:>8} kv {row['kv']:>4} {row['cell']:>11} {row['ms']:8.3f} ms "
        f"{row['tokens_per_s']:8.0f} tok/s {row['share_of_copy_bandwidth']:6.1%} of copy "
        f"{row['share_of_matrix_peak']:6.1%} of peak, host {row['host_ms']:.2f} ms, "
        f"idle {row.get('idle_share', -1):.1%}, between {row.get('between_share', -1):.1%}, "
        f"{row.get('launches', 0):.0f} launches, {row.get('waits', 0)} waits"
    ),
    "frontier": lambda row: (
        f"{row['isl']}/{row['osl']} {row['model']} {row['weights']} kv {row['kv']} c={row['concurrency']:>3}: "
        f"{row['output_tokens_per_s']:7.0f} tok/s, {row['interactivity']:6.1f} tok/s a user, "
        f"TTFT {row['ttft_ms']:.0f} ms"
    ),
    "experts": lambda row: (
        f"experts {row['kind']} {row['tokens']:>5} tokens: "
        + ", ".join(f"{name} {us} us" for name, us in row["us"].items())
    ),
    "prompts": lambda row: (
        f"attention of {row['tokens']} tokens, {row['heads']} heads of {row['kv_heads']}: "
        + ", ".join(f"{name} {us} us" for name, us in row["us"].items())
    ),
    "flashinfer": lambda row: (
        f"{row['case']:>32}: Triton {min(row['triton_us']):9.1f} us, FlashInfer {min(row['flashinfer_us']):9.1f} us"
        f"{' REFUSED: ' + row['refused'] if 'refused' in row else ''}"
    ),
    "peer": lambda row: (
        f"transformers {row['transformers']} {row['cache']} b{row['requests']}: {row['ms']:.2f} ms a step, "
        f"{row['tokens_per_s']:.0f} tok/s"
    ),
}


if __name__ == "__main__":
    sys.exit(main())
