"""Skyline against vLLM's CPU build, llama.cpp, OpenVINO GenAI and transformers, on this machine, taking turns.

    python -m benchmarks.peers                         # everything; writes benchmarks/results/<date>-cpu-peers.*
    python -m benchmarks.peers setup                   # only make the environments
    python -m benchmarks.peers convert --models qwen3-0.6b
    python -m benchmarks.peers run --formats bf16 --cells prefill b1 --rounds 1

Run it from the repository's root with the interpreter that has Skyline. README.md says what is measured.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.peers import report
from benchmarks.peers.convert import Failures, convert
from benchmarks.peers.engines import FORMATS, MODELS, PEERS, ROOT
from benchmarks.peers.environments import installed_mib, set_up
from benchmarks.peers.offline import Plan, measure_batches, measure_first_token
from benchmarks.peers.online import measure_online
from benchmarks.peers.results import Results

BATCH_CELLS = ("prefill", "b1", "b8", "b32")
FIRST_CELLS = ("first_token_warm", "first_token_cold")
ONLINE_CELLS = ("online_c1", "online_c4", "online_c16")
CELLS = (*BATCH_CELLS, "peak_memory", *FIRST_CELLS, *ONLINE_CELLS, "installed_size")


def main() -> None:
    arguments = _arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):  # unwind, so that no stopped contender is left behind
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    arguments.work.mkdir(parents=True, exist_ok=True)
    missing = set_up(arguments.work, arguments.engines) if arguments.step in ("all", "setup") else {}
    if arguments.step == "setup":
        sys.exit(1 if missing else 0)
    names = [name for name in arguments.engines if name not in missing]
    converted: dict[str, Failures] = {}
    results = Results()
    for model in arguments.models:
        if arguments.step == "run" and not (arguments.work / "models" / model / "hf").exists():
            sys.exit(f"{model} has not been converted: run the convert step first")
        if arguments.step != "run":
            converted[model] = convert(arguments.work, model, arguments.formats, names)
            for (name, kind), reason in converted[model].items():
                print(f"convert: {model} {kind} {name}: {reason}", file=sys.stderr)
    if arguments.step == "convert":
        sys.exit(1 if any(converted.values()) else 0)
    for name, reason in missing.items():
        results.fail("all", "all", "setup", name, reason)
    for model in arguments.models:
        for kind in arguments.formats:
            _measure(arguments, results, model, kind, names, converted.get(model, {}))
            _write(arguments, results)
    if "installed_size" in arguments.cells:
        for name in names:
            size = installed_mib(arguments.work, name)
            results.add("all", "all", "installed_size", name, [] if size is None else [size], "MiB")
    for path in _write(arguments, results):
        print(f"wrote {os.path.relpath(path)}")


def _measure(
    arguments: argparse.Namespace, results: Results, model: str, kind: str, names: list[str], failed: Failures
) -> None:
    plan = _plan(arguments)
    able = []
    for name in names:
        if kind not in PEERS[name].files:
            results.fail(model, kind, "all", name, f"{kind} is not measured for this engine")
        elif (name, kind) in failed:
            results.fail(model, kind, "all", name, failed[name, kind])
        elif not plan.files(model, kind, name).exists():
            results.fail(model, kind, "all", name, "has not been converted")
        else:
            able.append(name)
    print(f"run: {model} {kind}: {', '.join(able)}", flush=True)
    batches = [cell for cell in arguments.cells if cell in BATCH_CELLS]
    if batches or "peak_memory" in arguments.cells:
        measure_batches(plan, results, model, kind, able, batches, "peak_memory" in arguments.cells)
    firsts = [cell for cell in arguments.cells if cell in FIRST_CELLS]
    if firsts:
        measure_first_token(plan, results, model, kind, able, firsts)
    concurrencies = [int(cell.removeprefix("online_c")) for cell in arguments.cells if cell in ONLINE_CELLS]
    if concurrencies:
        measure_online(plan, results, model, kind, able, concurrencies, arguments.requests)


def _plan(arguments: argparse.Namespace) -> Plan:
    a = arguments
    return Plan(a.work, a.threads, a.rounds, a.prompt, a.new, a.prefill, a.anew)


def _write(arguments: argparse.Namespace, results: Results) -> tuple[Path, Path]:
    given = [a.replace(str(arguments.work), "WORK").replace(str(arguments.out), "OUT") for a in sys.argv[1:]]
    command = " ".join(["python", "-m", "benchmarks.peers", *given])
    lengths = {"prompt_tokens": arguments.prompt, "new_tokens": arguments.new, "prefill_tokens": arguments.prefill}
    about = report.provenance(command, arguments.threads, lengths, results)
    return report.write(arguments.out, f"{time.strftime('%Y-%m-%d')}-cpu-peers", about, results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", nargs="?", choices=("all", "setup", "convert", "run"), default="all")
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skyline" / "peers"
    parser.add_argument("--work", type=Path, default=default, help="environments, models, logs: tens of GB, kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, metavar="FORMAT")
    parser.add_argument("--engines", nargs="+", choices=PEERS, default=list(PEERS), metavar="ENGINE")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS, metavar="CELL", help=", ".join(CELLS))
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of each measurement, after a warm-up")
    parser.add_argument(
        "--anew",
        action="store_true",
        help="start contenders in each round even if all fit into memory, as how fast a process reads may depend on "
        "which memory it was given",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt, but for prefill")
    parser.add_argument("--new", type=int, default=128, help="tokens generated for it")
    parser.add_argument("--prefill", type=int, default=1024, help="tokens of the prefill cell's prompt")
    parser.add_argument("--requests", type=int, default=3, help="requests of each online client a round")
    arguments = parser.parse_args()
    if arguments.new < 2 or arguments.rounds < 1:
        parser.error("--new must be at least 2 and --rounds at least 1")
    arguments.work = arguments.work.expanduser().resolve()
    return arguments


if __name__ == "__main__":
    main()
