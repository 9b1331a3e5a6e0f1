"""The arguments of every call of FlashInfer, apart from the calls, so that a test can hold them against signatures."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skyline.ops.fp8 import Fp8Weight

Arguments = dict[str, Any]


class Shape(NamedTuple):
    """What a plan is made for, alike in many layers. window: tokens, itself included. group: of caches."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    scale: float
    window: int | None
    softcap: float | None
    group: int


class Pages(NamedTuple):
    """A step's requests: starts of their queries [R + 1], of their blocks [R + 1], blocks, tokens in the last one [R].

    All int32; the blocks are on the device, the others on the host.
    """

    query_starts: Tensor
    block_starts: Tensor
    blocks: Tensor
    last_block: Tensor


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Arguments:
    return {"input": x, "weight": weight, "eps": eps}


def silu_and_mul(x: Tensor) -> Arguments:
    return {"input": x}


def fp8_of_bfloat16(x: Tensor, weight: Fp8Weight, out: Tensor) -> Arguments:
    """x [T, K] in bfloat16, which is quantized inside; the weight's scales are by blocks of 128 x 128."""
    return {"input": x, "weight": weight.values, "weight_scale": weight.scales, "out": out}


def fp8_of_fp8(values: Tensor, scales: Tensor, weight: Fp8Weight, out: Tensor) -> Arguments:
    """values [T, K] in FP8, scales [T, K / 128]; T is a multiple of 4."""
    return {
        "a": values,
        "b": weight.values,
        "a_scale": scales,
        "b_scale": weight.scales,
        "scale_major_mode": "K",
        "out": out,
        "backend": "cutlass",
    }


def fp4_of_fp4(x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, out: Tensor) -> Arguments:
    """x [T, K / 8] and weight [N, K / 8] in words, as bytes of two elements; swizzled scales [.., K / 16] of both."""
    groups = x.shape[1] // 2
    return {
        "a": x.view(torch.uint8),
        "b": weight.view(torch.uint8).t(),
        "a_descale": x_scales.view(-1, groups),
        "b_descale": scales.view(-1, groups).t(),
        "alpha": _one(x.device),
        "out_dtype": out.dtype,
        "out": out,
        "block_size": 16,
    }


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones(1, dtype=torch.float32, device=device)


def mixture(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    matrices: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor] | None,
    out: Tensor,
) -> Arguments:
    """x [T, H]; ids int32 and weights float32 [T, k]; matrices up and gate [E, 2 I, H], and down [E, H, I]; scales of
    blocks of 128 x 128 of each, if they are FP8."""
    return {
        "input": x,
        "token_selected_experts": ids,
        "token_final_scales": weights,
        "fc1_expert_weights": matrices[0],
        "fc2_expert_weights": matrices[1],
        "output_dtype": out.dtype,
        "quant_scales": None if scales is None else list(scales),
        "output": out,
        "use_deepseek_fp8_block_scale": scales is not None,
        "use_fused_finalize": False,
    }


def autotune(file: Path) -> Arguments:
    return {"tune_mode": True, "cache": str(file)}


def prefill_wrapper(workspace: Tensor, backend: str) -> Arguments:
    return {"float_workspace_buffer": workspace, "kv_layout": "NHD", "backend": backend}


def prefill_plan(shape: Shape, pages: Pages) -> Arguments:
    return {
        "qo_indptr": pages.query_starts,
        "paged_kv_indptr": pages.block_starts,
        "paged_kv_indices": pages.blocks,
        "paged_kv_last_page_len": pages.last_block,
        "num_qo_heads": shape.heads,
        "num_kv_heads": shape.kv_heads,
        "head_dim_qk": shape.head_dim,
        "page_size": shape.block_size,
        "causal": True,
        "sm_scale": shape.scale,
        "window_left": -1 if shape.window is None else shape.window - 1,
        "logits_soft_cap": shape.softcap,
        "q_data_type": shape.dtype,
        "kv_data_type": shape.dtype,
    }


def prefill_run(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Arguments:
    return {"q": q, "paged_kv_cache": (k, v), "out": out}


def decode(
    q: Tensor, k: Tensor, v: Tensor, workspace: Tensor, tables: Tensor, lengths: Tensor, shape: Shape
) -> Arguments:
    """For BatchDecode without a plan; it chooses XQA on Hopper, TensorRT-LLM's kernels on Blackwell."""
    return {
        "query": q,
        "kv_cache": (k, v),
        "workspace_buffer": workspace,
        "block_tables": tables,
        "seq_lens": lengths,
        "max_seq_len": tables.shape[1] * shape.block_size,
        "bmm1_scale": shape.scale,
        "bmm2_scale": 1.0,
        "window_left": -1 if shape.window is None else shape.window - 1,
        "kv_layout": "NHD",
    }


def latent_decode(
    query: Tensor, data: Tensor, workspace: Tensor, tables: Tensor, lengths: Tensor, plain: int, rank: int, scale: float
) -> Arguments:
    """query [R, 1, heads, rank + rope]; data [blocks, block size, rank + rope]; plain: unrotated part of a head."""
    return {
        "query": query,
        "kv_cache": data,
        "workspace_buffer": workspace,
        "qk_nope_head_dim": plain,
        "kv_lora_rank": rank,
        "qk_rope_head_dim": query.shape[-1] - rank,
        "block_tables": tables,
        "seq_lens": lengths,
        "max_seq_len": tables.shape[1] * data.shape[1],
        "bmm1_scale": scale,
        "bmm2_scale": 1.0,
        "backend": "trtllm-gen",
    }
