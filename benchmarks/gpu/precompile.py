"""Fill Triton's cache with what tuning will ask for, in as many processes as there are cores.

    python -m gpu.precompile          (in benchmarks/; of a Hopper GPU)

Compiling is most of a first tuning, and one process compiles one kernel at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import Any

import torch

ONES = [(True, False, False), (False, True, False), (True, False, True)]  # normed, with residual, gated


def jobs() -> list[tuple[Any, ...]]:
    from skyline.kernels.triton.knobs import CANDIDATES

    found: list[tuple[Any, ...]] = []
    for name in ("vector", "gated"):
        found += [("linear", False, 1, {name: value}) for value in CANDIDATES[name]]
    for name in ("experts_rows", "experts_band", "experts_warps", "experts_stages"):
        for fp8 in (False, True):
            found += [("experts", fp8, rows, {name: value}) for rows in (16, 64, 256) for value in CANDIDATES[name]]
    found += [("experts", False, 1, {"experts_stream": value}) for value in CANDIDATES["experts_stream"]]
    found += [("experts", True, 1, {"experts_fp8": value}) for value in CANDIDATES["experts_fp8"]]
    for name in ("fp8_vector", "fp8_normed", "fp8_gated"):
        found += [("linear", True, 1, {name: value}) for value in CANDIDATES[name]]
    found += [("linear", True, rows, {"bands": value}) for rows in (16, 64) for value in CANDIDATES["bands"]]
    for splits in CANDIDATES["splits"]:
        for requests in (1, 16, 64, 256):
            for changes in (
                {},
                {"stages": 5},
                {"keys": 32},
                {"keys": 128},
                {"stages": 5, "keys": 32},
                {"stages": 5, "keys": 128},
            ):
                found.append(("attention", False, requests, {"splits": splits, **changes}))
    return found


def run(job: tuple[Any, ...]) -> int:
    import msgspec

    from tests.kernels.triton.offline import install

    install(90)
    from skyline.kernels.triton import attention, linear, moe, moe_bytes
    from skyline.kernels.triton.knobs import Knobs, using
    from skyline.ops import AttentionBatch, KVCache
    from skyline.ops.fp8 import FP8, Fp8Weight

    kind, fp8, rows, changes = job
    bf16 = torch.bfloat16
    try:
        with using(msgspec.structs.replace(Knobs(), **changes)):
            if kind == "attention":
                cache = KVCache(8, 128, bf16)
                cache.allocate(4, 16, torch.device("cpu"))
                tables = [[0] * 545] * rows  # as many as 8,704 tokens take
                batch = AttentionBatch.build(tables, [1000] * rows, [1] * rows, 16, torch.device("cpu"))
                turn = (None, None, 0.0, torch.zeros(rows, dtype=torch.int64), torch.empty((8704, 128)))
                attention.rope_attention(torch.empty((rows, 6144), dtype=bf16), *turn, cache, batch, 128**-0.5)
                return 0
            if kind == "experts":  # Qwen3-30B-A3B's
                shapes = ((128, 1536, 2048), (128, 2048, 768))
                x, ids = torch.empty((rows, 2048), dtype=bf16), torch.empty((rows, 8), dtype=torch.int64)
                weights = torch.empty((rows, 8))
                if fp8:
                    each = [Fp8Weight(torch.empty(s, dtype=torch.uint8).view(FP8), torch.empty(s[:2])) for s in shapes]
                    moe_bytes.moe_experts_fp8(x, *each, weights, ids)
                else:
                    moe.moe_experts(x, *(torch.empty(shape, dtype=bf16) for shape in shapes), weights, ids)
                return 0
            for normed, residual, gated in ONES:
                x, norm = torch.empty((rows, 4096), dtype=bf16), torch.empty(4096, dtype=bf16)
                n = 8192 if gated else 4096
                weight: Any = torch.empty((n, 4096), dtype=bf16)
                multiply = linear.fused_linear
                if fp8:
                    weight = Fp8Weight(torch.empty((n, 4096), dtype=torch.uint8).view(FP8), torch.empty(n))
                    multiply = linear.fused_linear_fp8  # type: ignore[assignment]
                rest = torch.empty((rows, n), dtype=bf16) if residual else None
                multiply(x, weight, None, gated, norm if normed else None, 1e-5, rest)
        return 0
    except Exception:
        return 1


def main() -> None:
    with multiprocessing.get_context("spawn").Pool(
        max(1, (os.cpu_count() or 2) - 1), torch.set_num_threads, (1,)
    ) as pool:
        failed = pool.map(run, jobs(), chunksize=2)
    print(f"precompiled {len(failed)} settings, {sum(failed)} of them do not compile", file=sys.stderr)


if __name__ == "__main__":
    main()
