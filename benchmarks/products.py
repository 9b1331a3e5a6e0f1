"""Products with packed weights on the CPU: time, bytes and floating point operations a second, formats taking turns.

    python benchmarks/products.py [--formats bfloat16 compressed] [--rows 1 8 32] [--json rows.json]

The weights are the linear layers of Qwen3-0.6B, random numbers of the size that training begins with, gone through in
the order of the model: 0.9 GB in bfloat16, which no cache holds. Times are of all layers, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from skyline.kernels.cpu import native
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


def pass_through(
    weights: list[PackedWeight], inputs: dict[int, torch.Tensor], outputs: dict[int, torch.Tensor]
) -> float:
    library, began = native.library(), time.perf_counter()
    for weight in weights:
        n, k = weight.shape
        library.linear(outputs[n // 2 if weight.layout.gated else n], inputs[k], None, 0, 512, 4, *weight.arguments)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=None)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 12, 16, 32, 144, 1024])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args()
    some = [name for name in FORMATS if name != "compressed" or native.available() != "avx2"]
    torch.manual_seed(0)
    every = {name: weights_of(name, arguments.layers) for name in arguments.formats or some}
    use_huge_pages(share=1.0)
    native.start_threads(arguments.threads)
    found = []
    with native.step():
        for rows in arguments.rows:
            inputs = {k: torch.randn(rows, k).bfloat16() for _, k, _ in SHAPES}
            outputs = {
                (n // 2 if gated else n): torch.empty(rows, n // 2 if gated else n).bfloat16() for n, _, gated in SHAPES
            }
            seconds: dict[str, list[float]] = {name: [] for name in every}
            for _ in range(arguments.rounds):
                for name, weights in every.items():
                    seconds[name].append(pass_through(weights, inputs, outputs))
            for name, weights in every.items():
                median = statistics.median(seconds[name])
                size = sum(weight.nbytes for weight in weights)
                flops = 2 * rows * sum(n * k for n, k in (weight.shape for weight in weights))
                row = {"rows": rows, "format": name, "ms": median * 1e3, "gb_per_s": size / median / 1e9}
                found.append({**row, "gflop_per_s": flops / median / 1e9})
                print(
                    f"{rows:5} rows  {name:<17}{median * 1e3:9.2f} ms {size / median / 1e9:7.1f} GB/s "
                    f"{flops / median / 1e9:7.0f} GFLOP/s",
                    flush=True,
                )
    native.stop_threads()
    if arguments.json:
        arguments.json.write_text(json.dumps({"isa": native.available(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
