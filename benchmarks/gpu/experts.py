"""Tiles of experts' rows (skyline.kernels.triton.moe_tiles), timed one by one: what its tables should say.

Both products of gpt-oss-20b's experts in MXFP4 and of Qwen3-30B-A3B's in int4, weights of several layers in turns, so
that no cache holds them.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from typing import Any

import torch

# name -> experts, hidden size, intermediate size, experts of a token
SHAPES = {"mxfp4": (32, 2880, 2880, 4), "int4": (128, 2048, 768, 8)}
TOKENS = (16, 64, 256, 1024, 8192)  # one streams its experts without tiles
_LAYERS = 4


def tiles(kind: str, tokens: int) -> list[Any]:
    """Beside the one that is chosen."""
    from skyline.kernels.triton.moe_tiles import Tile

    experts, _, _, top_k = SHAPES[kind]
    rows = tokens * top_k / experts
    if rows <= 8:
        shapes = [(16, 64, 4, 4), (16, 32, 4, 4), (16, 64, 4, 6), (16, 128, 4, 4), (16, 128, 8, 4), (16, 32, 2, 6)]
    elif rows <= 64:
        shapes = [(32, 64, 4, 4), (32, 128, 4, 3), (64, 64, 4, 3), (64, 128, 4, 3), (64, 128, 8, 3)]
    else:
        shapes = [(64, 128, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (128, 256, 8, 3), (64, 256, 8, 3)]
    wide = [64, 128] if rows > 8 else [128]
    return [Tile(rows, band, columns, warps, stages) for columns in wide for rows, band, warps, stages in shapes]


def measure() -> list[dict[str, Any]]:
    """A row a kind and number of tokens: microseconds of both products with each tile, and with the one chosen."""
    jobs = [(kind, tokens, part) for kind in SHAPES for tokens in TOKENS for part in range(2)]
    processes = max(1, (os.cpu_count() or 2) - 1)
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        pool.map(_compile, jobs, chunksize=1)
    rows = []
    for kind in SHAPES:
        layers = [_weights(kind, "cuda") for _ in range(_LAYERS)]
        read = sum(weight.nbytes for weight in layers[0])
        for tokens in TOKENS:
            given = _given(kind, tokens, "cuda")
            row: dict[str, Any] = {"kind": kind, "tokens": tokens, "bytes": read, "us": {}}
            for tile in [None, *tiles(kind, tokens)]:
                try:
                    row["us"]["/".join(map(str, tile or ["chosen"]))] = _microseconds(kind, given, layers, tile)
                except Exception as error:
                    row["us"]["/".join(map(str, tile or ["chosen"]))] = f"{type(error).__name__}: {str(error)[:100]}"
            rows.append(row)
        del layers
    return rows


def _weights(kind: str, device: str) -> tuple[Any, Any]:
    from skyline.kernels.triton.layouts import FP4_WORDS, INT4

    experts, hidden, inner, _ = SHAPES[kind]
    made = []
    for shape in ((experts, 2 * inner, hidden), (experts, hidden, inner)):
        layout: Any = FP4_WORDS[32] if kind == "mxfp4" else INT4[64, False]
        weight = layout.allocate(shape, torch.bfloat16, torch.device(device))
        if device == "cuda":
            weight.values.random_()
            weight.scales.fill_(120 if kind == "mxfp4" else 0.01)
            if kind == "mxfp4":
                weight.row_scales.fill_(1.0)
        made.append(weight)
    return made[0], made[1]


def _given(kind: str, tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, and each one's experts."""
    experts, hidden, _, top_k = SHAPES[kind]
    x = torch.randn((tokens, hidden), dtype=torch.bfloat16, device=device)
    ids = torch.rand((tokens, experts), device=device).topk(top_k).indices
    return x, ids


def _products(kind: str, given: tuple[torch.Tensor, torch.Tensor], weights: tuple[Any, Any], tile: Any) -> torch.Tensor:
    from skyline.kernels.triton.moe import groups_of
    from skyline.kernels.triton.moe_products import product
    from skyline.kernels.triton.moe_tiles import tile_for

    (x, ids), (gate_up, down) = given, weights
    experts, _, _, top_k = SHAPES[kind]
    groups = groups_of(ids, experts, tile or tile_for(ids.numel(), experts, x, "fp4" if kind == "mxfp4" else "int4"))
    hidden = product(x, gate_up, groups, top_k, True, x.dtype)
    return product(hidden, down, groups, 1, False, x.dtype)


def _compile(job: tuple[str, int, int]) -> None:
    """In a process without a GPU: fills Triton's cache."""
    from tests.kernels.triton.offline import install

    install(90)
    kind, tokens, part = job
    given, weights = _given(kind, tokens, "cpu"), _weights(kind, "cpu")
    for tile in [None, *tiles(kind, tokens)][part::2]:
        try:
            _products(kind, given, weights, tile)
        except Exception:  # said again where it is timed
            continue


def _microseconds(kind: str, given: Any, layers: list[Any], tile: Any) -> float:
    """Of a layer, in a graph."""
    from skyline.runner.recording import record

    def run() -> None:
        for weights in layers:
            _products(kind, given, weights, tile)

    run()
    torch.cuda.synchronize()
    graph = record(run).graph
    times = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times[1:]) * 1e3 / len(layers), 1)
