"""Where other kernels take over, told by shapes alone and without Triton: for launching, and for counting launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skyline.kernels.triton.knobs import current
from skyline.kernels.triton.layouts import Fp4Words
from skyline.ops import AttentionBatch
from skyline.ops.formats import DEFAULT_GROUP, IntegerFormat, integers_of
from skyline.ops.fp4 import MXFP4_GROUP, Fp4Weight
from skyline.ops.fp8 import BLOCK, Fp8Weight

BAND_ROWS = 64  # most rows of x that FP8 products take in bands of the weight
FEW_PAIRS = 128  # most pairs of token and expert that are grouped without a sort
WIDE_ROWS = 32  # most rows of x that are multiplied by words of four bits as they are
LONGEST = 32  # most tokens of a request that the gated delta rule takes one by one
LARGEST_KEY = 128  # for which a chunk's keys and queries fit into the memory of a processor


def widens(x: Tensor, weight: Any) -> bool:
    """Whether a weight of four bits is written in the type of x, for cuBLAS, before rows x are multiplied by it.

    A parameter stands for what was decided that it becomes. On an H200 a step of 64 requests of Llama-3.1-8B took 16.7
    ms in int4 and 6.8 in bfloat16, one of 8,192 tokens 364 and 212 (benchmarks/results/
    2026-11-27-gpu-h200-steps-one-row.json), and its weights are 14 GB in bfloat16, which takes about 5 ms to write. Not
    measured since. bfloat16 would round NVFP4's scales of rows, and float16 has not the range of FP4's.
    """
    if isinstance(weight, Tensor):
        decided = integers_of(weight) or IntegerFormat(4, DEFAULT_GROUP)
        fp4, group = decided.fp4, decided.group or DEFAULT_GROUP
    else:
        fp4, group = isinstance(weight, (Fp4Weight, Fp4Words)), weight.group
    exact = group >= MXFP4_GROUP and x.dtype == torch.bfloat16 if fp4 else x.dtype != torch.float32
    return x.shape[0] > WIDE_ROWS and exact


def has_blocks(weight: Fp8Weight | Tensor) -> bool:
    """Whether a scale belongs to a block. A parameter stands for what was decided that it becomes."""
    if isinstance(weight, Fp8Weight):
        return weight.blocks
    decided = integers_of(weight)
    return decided is not None and decided.group is not None


def in_words(weight: Fp8Weight | Tensor, silu_mul: bool) -> bool:
    """Whether an FP8 weight [N, K] can be read four numbers at a time, with a scale for all rows of a band."""
    n, k = weight.shape
    return k % 4 == 0 and not (has_blocks(weight) and silu_mul and n // 2 % BLOCK)


def turns_heads(batch: AttentionBatch, kv_heads: int, processors: int) -> bool:
    """Whether attention itself rotates heads and writes keys and values: of few requests, each with a single query.

    There it saves a launch. Where a processor has several programs, they hide each other's latency, and what one of
    them takes for the rotation costs more than it saves: on an H200, 2 % less time for 1 request, 10 to 19 % more for
    64 (benchmarks/results/2026-11-27-gpu-h200-steps-turned.json).
    """
    lengths = batch.host_query_lens
    return bool(lengths) and max(lengths) == min(lengths) == 1 and len(lengths) * kv_heads <= processors


def quantizes_attention(rows: int, weight: Fp8Weight | Tensor, head_dim: int) -> bool:
    """Whether attention of so many queries writes FP8 for the weight that multiplies its result.

    It has scales of 128 numbers, which must be of one head. Weights with blocks take those as they are. Of others, few
    rows can, at the price of narrower steps, and many go to cuBLAS, which cannot. One row is not quantized at all.
    """
    if rows <= 1 or head_dim not in (BLOCK, 2 * BLOCK):
        return False
    return has_blocks(weight) or (rows <= BAND_ROWS and current().early_scales)


def experts_in_words(gate_up: Fp8Weight | Tensor, down: Fp8Weight | Tensor) -> bool:
    """The same of experts, [E, 2 I, H] and [E, H, I]."""
    h, i = down.shape[1:]
    return h % 4 == 0 and i % 4 == 0 and not (has_blocks(gate_up) and i % BLOCK)
