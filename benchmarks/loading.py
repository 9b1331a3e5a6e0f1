"""How long weights take from the page cache to where the kernels read them, and what that takes at its peak.

python benchmarks/loading.py MODEL [--quantization int8] [--rounds 5] [--out benchmarks/results]

Contenders, in turns, each in a process of its own:

    safetensors   safetensors.safe_open, every tensor copied into memory of its own, in one thread
    skyline       the engine's loader: packed as the CPU's kernels want it, quantized on the way if asked to; capturing
                  the model, which tells what they want, comes before and is not counted

A figure is the median of the rounds. Peak memory is the process's resident set (VmHWM) beyond what it was before, so
that interpreter and libraries do not count; pages of the mapped file do, while they are in.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from skyline.kernels.cpu.isa import cpu_model

_PLAIN = """
import sys, time
from pathlib import Path
import torch
from safetensors import safe_open
before = resident()
began = time.perf_counter()
kept = {}
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            kept[name] = file.get_tensor(name).clone()
report(time.perf_counter() - began, before, sum(t.nbytes for t in kept.values()))
"""
_OURS = """
import sys, time
from pathlib import Path
import torch
from skyline.checkpoint.config import load_config
from skyline.engine.config import EngineConfig
from skyline.kernels.cpu import native
from skyline.models import create_model
from skyline.runner.checkpoint import Checkpoint
from skyline.runner.loader import build_program, choose_dtype
from skyline.runner.weight_store import WeightStore
config = EngineConfig(model=sys.argv[1], quantization=sys.argv[2] or None)
folder = Path(config.model)
model_config = load_config(folder)
dtype = choose_dtype(config, model_config)
model = create_model(model_config, dtype, "cpu", allocate=False)
native.available()
with Checkpoint(folder, model_config) as checkpoint:
    program = build_program(config, model, dtype, stored=checkpoint.integers(model))
before = resident()
began = time.perf_counter()
with Checkpoint(folder, model_config) as checkpoint:
    store = WeightStore(model, program, torch.device("cpu"))
    checkpoint.load(model, store.write)
    store.finish()
report(time.perf_counter() - began, before, store.nbytes)
"""
_COMMON = """
import json, re
def resident(key="VmRSS"):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
def report(seconds, before, nbytes):
    print(json.dumps({"seconds": seconds, "peak_bytes": resident("VmHWM") - before, "weight_bytes": nbytes}))
"""


def run(script: str, *arguments: str) -> dict[str, float]:
    command = [sys.executable, "-c", _COMMON + script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantization", default="")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    contenders = {
        "safetensors": (_PLAIN, str(arguments.model)),
        "skyline": (_OURS, str(arguments.model), arguments.quantization),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for turn in range(arguments.rounds + 1):
        for name, call in contenders.items():
            figures = run(*call)
            if turn:  # the first fills the page cache
                found[name].append(figures)
    rows = [
        {"engine": name, **{key: statistics.median(entry[key] for entry in entries) for key in entries[0]}}
        for name, entries in found.items()
    ]
    ratio = rows[1]["seconds"] / rows[0]["seconds"]
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/loading.py MODEL --rounds {arguments.rounds}"
        + (f" --quantization {arguments.quantization}" if arguments.quantization else ""),
        "model": arguments.model.parent.name if arguments.model.name == "hf" else arguments.model.name,
        "cpu": cpu_model(),
        "rows": rows,
        "skyline_over_safetensors": round(ratio, 3),
        "peak_beyond_weights_bytes": int(rows[1]["peak_bytes"] - rows[1]["weight_bytes"]),
    }
    print(json.dumps(record, indent=2))
    name = f"{record['date']}-loading-{record['model']}{'-' + arguments.quantization if arguments.quantization else ''}"
    (arguments.out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
