"""Products with packed weights on the CPU: time, bytes and floating point operations a second, formats taking turns.

    python benchmarks/products.py [--formats bfloat16 compressed] [--rows 1 8 32] [--json rows.json]
    python benchmarks/products.py --against ../another-checkout     its kernels take turns with these, in one process

The weights are the linear layers of Qwen3-0.6B, random numbers of the size that training begins with, gone through in
the order of the model: 0.9 GB in bfloat16, which no cache holds. Times are of all layers, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm_ffi

from skyline.kernels.cpu import native
from skyline.kernels.cpu.isa import cpu_model
from skyline.kernels.cpu.packed import Format, PackedWeight, pack, packed_layout
from skyline.ops.host_memory import use_huge_pages

SHAPES = ((4096, 1024, False), (1024, 2048, False), (6144, 1024, True), (1024, 3072, False))  # N, K, gated
FORMATS = {
    "bfloat16": (Format.BFLOAT16, 0),
    "compressed": (Format.COMPRESSED, 0),
    "int8": (Format.INT8, 0),
    "int8-weight-only": (Format.INT8_WEIGHT_ONLY, 0),
    "int4": (Format.INT4, 64),
    "fp8": (Format.FP8, 0),
    "mxfp4": (Format.FP4, 32),
}


def weights_of(name: str, layers: int) -> list[PackedWeight]:
    format, group = FORMATS[name]
    found = []
    for _ in range(layers):
        for n, k, gated in SHAPES:
            found.append(pack((torch.randn(n, k) * 0.02).bfloat16(), packed_layout(format, gated, group)))
    return found


def library_of(checkout: Path) -> Any:
    """The kernels of another checkout, built if need be. Its `linear` must take what that of this one takes."""
    build = f"from skyline.kernels.cpu.build import build; print(build({native.available()!r})[0])"
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    found = subprocess.run([sys.executable, "-c", build], env=environment, check=True, capture_output=True, text=True)
    return tvm_ffi.load_module(found.stdout.strip())


def revision(checkout: Path) -> str:
    return subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


def values(rows: int, columns: int) -> torch.Tensor:
    """Rows that are no power of two apart, as a Program's buffers are."""
    return torch.randn(rows, columns + 32).bfloat16()[:, :columns]


def pass_through(
    library: Any, weights: list[PackedWeight], inputs: dict[int, torch.Tensor], outputs: dict[int, torch.Tensor]
) -> float:
    library.begin_step()  # only of the one at work: the threads of others would spin
    began = time.perf_counter()
    for weight in weights:
        n, k = weight.shape
        library.linear(outputs[n // 2 if weight.layout.gated else n], inputs[k], None, 0, 512, 4, *weight.arguments)
    seconds = time.perf_counter() - began
    library.end_step()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=None)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 12, 16, 32, 144, 1024])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args()
    some = [name for name in FORMATS if name != "compressed" or native.available() != "avx2"]
    torch.manual_seed(0)
    every = {name: weights_of(name, arguments.layers) for name in arguments.formats or some}
    use_huge_pages(share=1.0)
    libraries = {"here": native.library()}
    if arguments.against:
        libraries["there"] = library_of(arguments.against)
    for library in libraries.values():
        library.pool_start(np.arange(arguments.threads, dtype=np.int32))
    found = []
    for rows in arguments.rows:
        inputs = {k: values(rows, k) for _, k, _ in SHAPES}
        outputs = {width: values(rows, width) for width in {n // 2 if gated else n for n, _, gated in SHAPES}}
        seconds: dict[tuple[str, str], list[float]] = {(name, where): [] for name in every for where in libraries}
        for number in range(arguments.rounds):
            for name, weights in every.items():
                for where in sorted(libraries, reverse=number % 2 == 1):
                    seconds[name, where].append(pass_through(libraries[where], weights, inputs, outputs))
        for name, weights in every.items():
            median = statistics.median(seconds[name, "here"])
            size = sum(weight.nbytes for weight in weights)
            flops = 2 * rows * sum(n * k for n, k in (weight.shape for weight in weights))
            row = {"rows": rows, "format": name, "ms": median * 1e3, "gb_per_s": size / median / 1e9}
            row["gflop_per_s"] = flops / median / 1e9
            if arguments.against:
                row["there_ms"] = statistics.median(seconds[name, "there"]) * 1e3
                row["faster"] = row["there_ms"] / row["ms"]
            found.append(row)
            line = f"{rows:5} rows  {name:<17}{row['ms']:9.2f} ms {row['gb_per_s']:7.1f} GB/s"
            line += f" {row['gflop_per_s']:7.0f} GFLOP/s"
            if arguments.against:
                line += f"  there {row['there_ms']:9.2f} ms, here {row['faster']:.3f} times as fast"
            print(line, flush=True)
    for library in libraries.values():
        library.pool_stop()
    if arguments.json:
        record: dict[str, Any] = {
            "command": " ".join(["python", "benchmarks/products.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            "cpu": cpu_model(),
            "isa": native.available(),
            "revision": revision(Path(__file__).parent),
        }
        if arguments.against:
            record["against"] = revision(arguments.against)
        arguments.json.write_text(json.dumps({**record, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
