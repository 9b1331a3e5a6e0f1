"""Paged attention on the CPU: time, KV bytes and floating point operations a second, next to the torch reference.

    OMP_NUM_THREADS=2 python benchmarks/attention.py [--isa avx512] [--kv int8] [--dtype float32] [--quick]
    OMP_NUM_THREADS=2 python benchmarks/attention.py --heads 32x4 --kv int8 --quick --json rows.json

The shape is Qwen3-0.6B's: 16 query heads, 8 KV heads of 128, blocks of 16 tokens, in no order. Calls rotate over
28 layers' caches, as a model's do, as far as --cache-gib allows. Times are of the fastest call.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch

from skyline.kernels import candidates
from skyline.kernels.cpu import native
from skyline.ops import OPS, AttentionBatch, KVCache

HEAD_DIM, BLOCK = 128, 16
OP = OPS["paged_attention"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}


def best(run: Callable[[int], object], calls: int) -> float:
    """Seconds of the fastest call."""
    fastest = float("inf")
    for call in range(calls):
        began = time.perf_counter()
        run(call)
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def measure(queries: int, context: int, requests: int, arguments: argparse.Namespace) -> dict[str, float]:
    heads, kv_heads = map(int, arguments.heads.split("x"))
    dtype, kv_dtype = DTYPES[arguments.dtype], DTYPES[arguments.kv or arguments.dtype]
    blocks = -(-context // BLOCK)
    order = list(range(requests * blocks))
    random.Random(0).shuffle(order)
    tables = [order[row * blocks : (row + 1) * blocks] for row in range(requests)]
    batch = AttentionBatch.build(
        tables, [context - queries] * requests, [queries] * requests, BLOCK, torch.device("cpu")
    )
    read = requests * context * KVCache(kv_heads, HEAD_DIM, kv_dtype).bytes_per_token()
    layers = max(1, min(28, int(arguments.cache_gib * 2**30 / read)))
    caches = []
    for _ in range(layers):
        cache = KVCache(kv_heads, HEAD_DIM, kv_dtype, by_head=not arguments.by_token)
        cache.allocate(requests * blocks, BLOCK, torch.device("cpu"))
        for part in cache.tensors:
            part.copy_(torch.randint(-99, 99, part.shape) if kv_dtype == torch.int8 else torch.randn(part.shape))
        for scale in cache.scales or ():
            scale.fill_(0.02)
        caches.append(cache)
    q = torch.randn((requests * queries, heads * HEAD_DIM)).to(dtype)
    out = torch.empty_like(q)
    into = next(kernel.into for kernel in candidates(OP.name) if kernel.provider == native.PROVIDER)
    assert into is not None
    scale = HEAD_DIM**-0.5
    flops = OP.cost(q, caches[0], batch, scale).flops
    library = native.library()
    native.start_threads(arguments.threads)
    library.begin_step()
    try:
        seconds = best(lambda i: into(out, q, caches[i % layers], batch, scale, None, None, None), arguments.calls)
    finally:
        library.end_step()
        native.stop_threads()
    torch.set_num_threads(arguments.threads)
    found = {"us": seconds * 1e6, "gb_per_s": read / seconds / 1e9, "gflop_per_s": flops / seconds / 1e9}
    if not arguments.quick:
        found["torch_us"] = best(lambda i: OP.reference(q, caches[i % layers], batch, scale), 4) * 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--isa", default=None)
    parser.add_argument("--heads", default="16x8", help="query heads x KV heads")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--kv", default=None, choices=("int8",))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--cache-gib", type=float, default=1.0)
    parser.add_argument("--by-token", action="store_true", help="all heads of a token together, as on GPUs")
    parser.add_argument("--quick", action="store_true", help="without the torch reference and the largest cases")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args()
    cases = [(1, length, requests) for requests in (1, 8, 32) for length in (128, 200, 1024, 8192)]
    most = 40_000 if arguments.quick else 300_000
    cases = [(queries, length, requests) for queries, length, requests in cases if requests * length <= most]
    cases += [(length, length, 1) for length in (128, 1024, 8192) if length < 2000 or not arguments.quick]
    rows = []
    with native.using(arguments.isa or native.available()):
        print(f"{native.available()}, {arguments.threads} threads, {arguments.dtype}, KV {arguments.kv or 'the same'}")
        print(f"{'case':<28}{'us a call':>12} {'GB/s':>8} {'GFLOP/s':>9} {'torch us':>12}")
        for queries, length, requests in cases:
            name = f"decode B={requests} L={length}" if queries == 1 else f"prefill T={length}"
            found = measure(queries, length, requests, arguments)
            rows.append({"heads": arguments.heads, "kv": arguments.kv or arguments.dtype, "case": name, **found})
            slow = f"{found['torch_us']:12,.0f}" if "torch_us" in found else ""
            print(
                f"{name:<28}{found['us']:12,.1f} {found['gb_per_s']:8.1f} {found['gflop_per_s']:9.0f} {slow}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
