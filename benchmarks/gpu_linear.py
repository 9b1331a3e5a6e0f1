"""Time the ways to multiply a weight by few rows (skyline.kernels.triton.linear), beside cuBLAS.

    python benchmarks/gpu_linear.py --json benchmarks/results/gpu-linear.json

For each product of Llama-3.1-8B and number of rows: the share of the copy bandwidth at which each tactic reads the
weight, over as many copies of it as no cache holds, replayed from one CUDA graph. Prints the best beside the one that
is chosen. Quantizing rows counts where a tactic needs it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT), str(ROOT / "benchmarks")]
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])

# name -> N, K, gated, normed, with residual
PRODUCTS = {
    "qkv": (6144, 4096, False, True, False),
    "o": (4096, 4096, False, False, True),
    "gate_up": (28672, 4096, True, True, False),
    "down": (4096, 14336, False, False, True),
}


def tactics(rows: int) -> list[Any]:
    from skyline.kernels.triton.linear import Tactic

    if rows == 1:
        shapes = itertools.product((1, 2, 4, 8), (512, 1024, 2048, 4096), (1, 2, 4, 8))
        vectors = [Tactic(*shape) for shape in shapes if 16 <= shape[0] * shape[1] // (32 * shape[2]) <= 128]
        return [*vectors, *(t for t in tactics(16) if t.warps == 4 and t.columns > 128)]
    shapes = itertools.product((64, 128), (128, 256, 512), (4, 8), (3, 4, 5))
    return [Tactic(*shape) for shape in shapes if (2 * shape[0] + rows) * shape[1] * shape[3] <= 220_000]


def weights(fp8: bool, n: int, k: int, device: str) -> list[Any]:
    from skyline.ops.fp8 import FP8, Fp8Weight

    copies = max(2, -(-(300 << 20) // (n * k * (1 if fp8 else 2)))) if device == "cuda" else 1
    if fp8:
        made = [torch.randint(0, 120, (n, k), dtype=torch.uint8, device=device).view(FP8) for _ in range(copies)]
        return [Fp8Weight(values, torch.ones(n, device=device)) for values in made]
    return [torch.randn((n, k), dtype=torch.bfloat16, device=device) for _ in range(copies)]


def multiply(x: torch.Tensor, product: tuple[Any, ...], chosen: Any) -> Callable[[Any], torch.Tensor]:
    """What a product does to a weight, with a tactic, or with the one it chooses."""
    from skyline.kernels.triton import linear

    n, k, gated, normed, residual = product
    norm = torch.ones(k, dtype=x.dtype, device=x.device) if normed else None
    rest = torch.ones((x.shape[0], n), dtype=x.dtype, device=x.device) if residual else None

    def run(weight: Any) -> torch.Tensor:
        fp8 = not isinstance(weight, torch.Tensor)
        if x.shape[0] == 1 and (chosen is None or chosen.stages == 1):
            vector = linear._fp8_vector if fp8 else linear._vector
            return vector(x, weight, None, gated, norm, 1e-6, rest, chosen)
        if not fp8:
            return linear.fused_linear(x, weight, None, gated, norm, 1e-6, rest)
        values, scales = linear.quantize_rows(x, False, norm, 1e-6)
        return linear._bands(values, scales, weight, x.dtype, None, gated, rest, chosen)

    return run


def compile_some(job: tuple[int, bool, list[Any], str]) -> int:
    """In a process without a GPU: fills Triton's cache."""
    from tests.kernels.triton.offline import install

    rows, fp8, chosen, name = job
    install(90)
    product = (512, 4096, *PRODUCTS[name][2:])
    failed = 0
    for tactic in chosen:
        if tactic.stages > 1 and not fp8:
            continue
        try:
            x = torch.empty(rows, 4096, dtype=torch.bfloat16)
            multiply(x, product, tactic)(weights(fp8, 1024, 4096, "cpu")[0])
        except Exception:
            failed += 1
    return failed


def time_graph(run: Callable[[], Any], repeats: int = 7) -> float:
    """Median seconds of a replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--products", nargs="*", default=list(PRODUCTS), choices=PRODUCTS)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 16, 64])
    arguments = parser.parse_args()
    jobs = [
        (rows, fp8, tactics(rows)[part::4], name)
        for rows in arguments.rows
        for fp8 in (False, True)
        for name in ("qkv", "o", "gate_up")
        for part in range(4)
        if fp8 or rows == 1
    ]
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
        print("did not compile:", sum(pool.map(compile_some, jobs, chunksize=1)))

    from gpu import ceilings

    copy = ceilings.measure()["copy_bytes_per_s"]
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s")
    record: dict[str, Any] = {"device": torch.cuda.get_device_name(), "copy_bytes_per_s": copy, "rows": []}
    for name in arguments.products:
        product = PRODUCTS[name]
        for fp8 in (False, True):
            copies = weights(fp8, product[0], product[1], "cuda")
            for rows in arguments.rows:
                row = {"product": name, "fp8": fp8, "rows": rows, **_measure(product, copies, rows, fp8, copy)}
                record["rows"].append(row)
                best = " ".join(f"{share:.2f}:{'/'.join(map(str, t))}" for share, t in row["best"][:4])
                print(
                    f"{name:8} fp8={fp8:d} rows={rows:3} cuBLAS {row['cublas']:.2f} chosen {row['chosen']:.2f}",
                    f"best {best}",
                    flush=True,
                )
            del copies
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def _measure(product: tuple[Any, ...], copies: list[Any], rows: int, fp8: bool, copy: float) -> dict[str, Any]:
    import torch.nn.functional as F

    n, k, gated = product[:3]
    x = torch.randn((rows, k), dtype=torch.bfloat16, device="cuda")
    inner = (n // 2 if gated else n, *product[1:])
    nbytes = n * k * (1 if fp8 else 2) * len(copies)

    def share(run: Callable[[Any], Any]) -> float:
        return nbytes / time_graph(lambda: [run(weight) for weight in copies]) / copy

    if fp8:
        values, ones = x.to(torch.float8_e4m3fn), torch.ones((rows, 1), device="cuda")

        def blas(weight: Any) -> torch.Tensor:
            return torch._scaled_mm(
                values, weight.values.t(), ones, weight.scales.view(1, -1), out_dtype=x.dtype, use_fast_accum=True
            )
    else:

        def blas(weight: Any) -> torch.Tensor:
            return F.linear(x, weight)

    seen = []
    for chosen in tactics(rows):
        if not fp8 and (rows > 1 or chosen.stages > 1):
            continue
        try:
            seen.append((share(multiply(x, inner, chosen)), tuple(chosen)))
        except Exception:
            continue
    found: dict[str, Any] = {"chosen": share(multiply(x, inner, None)), "best": sorted(seen, reverse=True)[:8]}
    try:
        found["cublas"] = share(blas)
    except RuntimeError:
        found["cublas"] = 0.0
    return found


if __name__ == "__main__":
    main()
