"""Fill Triton's cache with the kernels that steps and their tuning ask for, in as many processes as there are cores.

    python -m gpu.precompile --models llama-3.1-8b --weights none fp8 --tune          (in benchmarks/)

Compiling is most of a first run, and one process compiles one kernel at a time. Nothing here touches the GPU: steps of
a model's first layers run on the CPU, with its real sizes and weights that hold nothing, and a driver that only
compiles takes the place of CUDA's (tests/kernels/triton/offline.py). Not for models with recurrent states.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

BLOCK, REQUESTS, LONGEST, TOKENS = 16, 256, 8704, 8192  # as in gpu.steps
_CAPABILITY = 90
SIZES = (1, 16, 64, 256)
PROMPTS = (1024, 8192)


@functools.lru_cache(1)
def _prepare() -> None:
    from tests.kernels.triton.offline import install

    install(_CAPABILITY)
    # What cuBLAS would compute.
    torch.nn.functional.linear = lambda x, w, b=None: x.new_empty((*x.shape[:-1], w.shape[0]))  # type: ignore[assignment]
    torch.addmm = lambda c, a, b, **_: c.new_empty((a.shape[0], b.shape[1]))  # type: ignore[assignment]


@functools.lru_cache(2)
def _loaded(shape: str, weights: str, kv: str) -> tuple[Any, list[Any], set[str]]:
    """The program of a model's first layers, its caches, and its ops."""
    _prepare()
    import shapes

    from skyline.checkpoint.config import load_config
    from skyline.engine.config import EngineConfig
    from skyline.kernels.gpu import GPUS
    from skyline.models import create_model, kv_caches
    from skyline.runner.loader import build_program
    from skyline.runner.memory import group_caches, set_kv_format
    from skyline.runner.weight_store import WeightStore

    fields = shapes.SHAPES[shape]
    layers = min(fields["num_hidden_layers"], 2)
    cut = {"num_hidden_layers": layers}
    if "layer_types" in fields:
        cut["layer_types"] = fields["layer_types"][:layers]
    shapes.SHAPES["cut"] = {**fields, **cut}
    with tempfile.TemporaryDirectory() as folder:
        path = shapes.write_shape("cut", Path(folder))
        config = EngineConfig(
            model=str(path),
            device="cuda",
            quantization=None if weights == "none" else weights,  # type: ignore[arg-type]
            kv_cache_dtype=kv,  # type: ignore[arg-type]
        )
        cpu = torch.device("cpu")
        model = create_model(load_config(path), torch.bfloat16, cpu, LONGEST, allocate=False)
        program = build_program(config, model, torch.bfloat16, gpu=GPUS["h200"].without("flashinfer"))
        WeightStore(model, program, cpu)
        caches = kv_caches(model)
        set_kv_format(config, caches)
        group_caches(caches)
    return program, caches, {call.op.name for call in program.calls}


def run(job: tuple[str, str, str, str, int, dict[str, Any]]) -> int:
    """1 if something does not compile."""
    shape, weights, kv, kind, size, changes = job
    try:
        with torch.inference_mode():
            _step(*_loaded(shape, weights, kv)[:2], kind, size, changes)
    except Exception as error:
        print(f"{job}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        return 1
    return 0


def _step(program: Any, caches: list[Any], kind: str, size: int, changes: dict[str, Any]) -> None:
    import msgspec
    import numpy as np

    from skyline.engine.scheduler import MAX_LOGIT_ROWS
    from skyline.kernels.triton.knobs import Knobs, using
    from skyline.ops import AttentionBatch
    from skyline.runner import decode_graphs, dry_run
    from skyline.runner.prompt_graphs import MOST_TOKENS

    cpu = torch.device("cpu")
    if kind == "dry":
        sizes = {"tokens": TOKENS, "requests": REQUESTS, "rows": REQUESTS + MAX_LOGIT_ROWS, "recorded": MOST_TOKENS}
        dry_run.measure(
            program, caches, cpu, **sizes, max_model_len=LONGEST, block_size=BLOCK, peak=lambda step: int(bool(step()))
        )
        return
    for cache in caches:
        cache.allocate(1 if kind == "prompt" else 2, BLOCK, cpu)
    width = -(-(LONGEST + 1) // BLOCK)
    groups = len({cache.group for cache in caches})
    if kind == "prompt":
        table = np.zeros((1, -(-(size + 1) // BLOCK)), np.int32)
        batch = AttentionBatch.build([table] * groups, [0], [size], BLOCK, cpu)
        ids = torch.zeros(size, dtype=torch.int64)
        program(ids, torch.arange(size), batch, torch.tensor([size - 1]))
        return
    tokens = torch.zeros((REQUESTS + 1, LONGEST + 1), dtype=torch.int32)
    graphs = decode_graphs.DecodeGraphs(
        program, tokens, table_shape=(groups, REQUESTS, width), block_size=BLOCK, record=False
    )
    with using(msgspec.structs.replace(Knobs(), **changes)):
        graphs._run(torch.zeros((decode_graphs._PLACES + groups, size), dtype=torch.int64), False)


def jobs(models: list[str], weights: list[str], kv: list[str], tune: bool) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for shape in models:
        for kind in weights:
            for dtype in kv:
                one = (shape, kind, dtype)
                found += [(*one, "dry", 0, {})]
                found += [(*one, "prompt", size, {}) for size in PROMPTS]
                found += [(*one, "decode", size, {}) for size in SIZES]
                if tune:
                    from skyline.kernels.triton.knobs import CANDIDATES, Knobs
                    from skyline.runner.tune_gpu import _names

                    ops = _loaded(*one)[2]
                    found += [
                        (*one, "decode", size, {name: value})
                        for size in SIZES
                        for name in _names(size, ops)
                        for value in CANDIDATES[name]
                        if value != getattr(Knobs(), name)
                    ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-3.1-8b"])
    parser.add_argument("--weights", nargs="+", default=["none", "fp8"])
    parser.add_argument("--kv", nargs="+", default=["auto"])
    parser.add_argument("--tune", action="store_true", help="also what `--tune` of gpu_check.py tries")
    arguments = parser.parse_args()
    began = time.perf_counter()
    asked = jobs(arguments.models, arguments.weights, arguments.kv, arguments.tune)
    processes = max(1, min(len(asked), (os.cpu_count() or 2) - 1))
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        failed = pool.map(run, asked, chunksize=1)
    seconds = time.perf_counter() - began
    print(f"precompiled {len(failed)} steps in {seconds:.0f} s, {sum(failed)} of them failed", file=sys.stderr)


if __name__ == "__main__":
    main()
