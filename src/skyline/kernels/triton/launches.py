"""How many kernels a call launches, of those ops whose calls may be more than one. Told without Triton.

A count goes by shapes and the host's numbers, as the kernels do: the GPU, and then the op's arguments, of which weights
may be the model's parameters. cuBLAS and its like count as one launch each, so what comes out is the least: a product
whose sum cuBLAS splits is two kernels, and when it does that is for cuBLAS to know. Where an op's kernel does not
compile and torch takes its place, there are more. tests/kernels/triton/test_launches.py counts what is really launched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from skyline.kernels.gpu import Gpu
from skyline.kernels.triton import latent_tactics
from skyline.kernels.triton.sizes import next_power_of_2
from skyline.kernels.triton.thresholds import (
    BAND_ROWS,
    FEW_PAIRS,
    LARGEST_KEY,
    LONGEST,
    experts_in_words,
    in_words,
    quantizes_attention,
    turns_heads,
    widens,
)
from skyline.ops import AttentionBatch, KVCache, LatentCache, StateCache
from skyline.ops.fp8 import Fp8Weight
from skyline.ops.nvfp4 import FEW_ROWS


def _fused_linear(
    gpu: Gpu,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> int:
    if x.shape[0] == 1:
        return 1
    # cuBLAS adds a bias, or a residual that nothing stands before.
    adds = residual is not None and (bias is not None or silu_mul)
    return 1 + (norm is not None) + silu_mul + adds


def _fused_words(
    gpu: Gpu,
    x: Tensor,
    weight: Any,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> int:
    """More rows than one are normed by themselves, and many go to cuBLAS."""
    if widens(x, weight):
        return 1 + _fused_linear(gpu, x, weight, bias, silu_mul, norm, eps, residual)
    return 1 + (norm is not None and x.shape[0] > 1)


def _fused_linear_fp8(
    gpu: Gpu,
    x: Tensor,
    weight: Fp8Weight | Tensor,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> int:
    if x.shape[0] == 1 and in_words(weight, silu_mul):
        return 1
    finishing = 0 if x.shape[0] <= BAND_ROWS else (bias is not None) + silu_mul + (residual is not None)
    return 2 + finishing


def _gated_mlp_fp8(
    gpu: Gpu,
    x: Tensor,
    gate_up: Fp8Weight | Tensor,
    down: Fp8Weight | Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> int:
    """Of many rows, silu_mul is done where its result is quantized."""
    hidden = x.new_empty((x.shape[0], down.shape[1]), device="meta")
    first = _fused_linear_fp8(gpu, x, gate_up, None, x.shape[0] <= BAND_ROWS, norm)
    return first + _fused_linear_fp8(gpu, hidden, down, residual=residual)


def _attention_linear_fp8(
    gpu: Gpu,
    q: Tensor,
    weight: Fp8Weight | Tensor,
    cache: KVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    positions: Tensor | None = None,
    table: Tensor | None = None,
) -> int:
    attended = q.new_empty((q.shape[0], weight.shape[1]), device="meta")
    product = _fused_linear_fp8(gpu, attended, weight, bias, residual=residual)
    turns = table is None or turns_heads(batch, cache.num_kv_heads, gpu.multiprocessors)
    attends = _paged_attention(gpu, q, cache, batch) + (not turns)
    return attends + product - quantizes_attention(q.shape[0], weight, cache.head_dim)


def _fused_nvfp4(
    gpu: Gpu,
    x: Tensor,
    weight: Any,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> int:
    """Many rows are normed where they are quantized."""
    if x.shape[0] > FEW_ROWS:
        return 2
    return _fused_words(gpu, x, weight, bias, silu_mul, norm, eps, residual)


def _two(gpu: Gpu, *arguments: Any) -> int:
    return 2


def _experts(gpu: Gpu, ids: Tensor) -> int:
    """Of one token both products; else both, the sum over choices, and before them a sort, if there are many."""
    return 2 if ids.shape[0] == 1 else 3 + (ids.numel() > FEW_PAIRS)


def _moe_experts(gpu: Gpu, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, *_: Any) -> int:
    return _experts(gpu, ids)


def _moe_experts_clamped(
    gpu: Gpu,
    x: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    weights: Tensor,
    ids: Tensor,
    *_: Any,
) -> int:
    return _experts(gpu, ids)


def _moe_experts_grouped(gpu: Gpu, x: Tensor, gate_up: Any, down: Any, weights: Tensor, ids: Tensor) -> int:
    """Of one token as of many: both products, and the sum over choices."""
    return 3 + (ids.numel() > FEW_PAIRS)


def _moe_experts_fp8(
    gpu: Gpu, x: Tensor, gate_up: Fp8Weight | Tensor, down: Fp8Weight | Tensor, weights: Tensor, ids: Tensor, *_: Any
) -> int:
    """Rows are quantized before each product, but for one token's, if its weights can be read in words of four."""
    return 2 if ids.shape[0] == 1 and experts_in_words(gate_up, down) else 5 + (ids.numel() > FEW_PAIRS)


def _moe_experts_quantized(gpu: Gpu, x: Tensor, gate_up: Any, down: Any, weights: Tensor, ids: Tensor) -> int:
    return 5 + (ids.numel() > FEW_PAIRS)


def _moe_experts_nvfp4(gpu: Gpu, x: Tensor, gate_up: Any, down: Any, weights: Tensor, ids: Tensor, *_: Any) -> int:
    """Of many tokens rows are quantized before each product."""
    return _experts(gpu, ids) + 2 * (x.shape[0] > FEW_ROWS)


def _paged_attention(gpu: Gpu, q: Tensor, cache: Any, batch: AttentionBatch, *_: Any) -> int:
    """Requests of one query and those of more go to different kernels."""
    return len({length > 1 for length in batch.host_query_lens})


def _rope_attention(
    gpu: Gpu,
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    table: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
    *_: Any,
) -> int:
    """Where attention does not turn heads itself, that is a launch of its own."""
    return _paged_attention(gpu, qkv, cache, batch) + (not turns_heads(batch, cache.num_kv_heads, gpu.multiprocessors))


def _latent_attention(
    gpu: Gpu,
    q: Tensor,
    kv_b: Tensor,
    cache: LatentCache,
    batch: AttentionBatch,
    heads: int,
    value_dim: int,
    scale: float,
    chosen: Tensor | None = None,
) -> int:
    """The product before and the one behind the kernel, and a merge of splits; with many queries a product a kernel.

    Contexts may be as long as the longest one is: where a step is recorded, they are cut as if they were the longest
    that there can be.
    """
    item, width = q.element_size(), sum(max(16, next_power_of_2(size)) for size in (cache.rank, cache.rope_dim))

    def absorbed(units: int, rows: int, capacity: int) -> int:
        hopper = gpu.capability[0] == 9
        quantized = cache.quantized is not None
        tactic = latent_tactics.absorbed_tactic(
            rows, width, item, gpu.shared_memory, hopper, chosen is not None, quantized
        )
        programs = units * -(-rows // tactic.rows)
        return 3 + (latent_tactics.num_splits(programs, capacity, gpu.multiprocessors) > 1)

    if chosen is not None:
        at_once, tokens = latent_tactics.TOKENS_AT_ONCE, q.shape[0]
        units = [min(at_once, tokens - first) for first in range(0, tokens, at_once)]
        return sum(absorbed(unit, heads, chosen.shape[1]) for unit in units)
    count = 0
    for requests, _, longest in latent_tactics.parts(batch.host_query_lens):
        if longest <= latent_tactics.ABSORBED_QUERIES:
            count += absorbed(requests.stop - requests.start, heads * longest, max(batch.host_context_lens))
        else:
            context, rows = batch.host_context_lens[requests.start], kv_b.shape[0] // heads
            count += 1 + 2 * -(-heads // latent_tactics.heads_at_once(heads, context, rows, item))
    return count


def _index_topk(
    gpu: Gpu,
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    positions: Tensor,
    table: Tensor,
    cache: Any,
    batch: AttentionBatch,
    *_: Any,
) -> int:
    """The rotation; then scores, a choice and its order, for as many queries at a time as there is room for."""
    tokens = q.shape[0]
    return 1 + 3 * -(-tokens // latent_tactics.queries_at_once(tokens, max(batch.host_context_lens)))


def _gated_delta_rule(
    gpu: Gpu,
    qkv: Tensor,
    b: Tensor,
    a: Tensor,
    decay: Tensor,
    dt_bias: Tensor,
    key_heads: int,
    cache: StateCache,
    batch: AttentionBatch,
) -> int:
    """Requests of a few tokens go to one kernel, those of more to two."""
    chunked = next_power_of_2(cache.shape[1]) <= LARGEST_KEY and qkv.element_size() < 4
    lengths = batch.host_query_lens
    longest = LONGEST if chunked else max(lengths)
    return (min(lengths) <= longest) + 2 * (max(lengths) > longest)


LAUNCHES: dict[str, Callable[..., int]] = {
    "linear": _fused_linear,
    "fused_linear": _fused_linear,
    "linear_fp8": _fused_linear_fp8,
    "fused_linear_fp8": _fused_linear_fp8,
    "gated_mlp_fp8": _gated_mlp_fp8,
    "attention_linear_fp8": _attention_linear_fp8,
    "linear_int8": _two,
    "linear_fp4": _fused_words,
    "linear_int4_weight_only": _fused_words,
    "fused_linear_fp4": _fused_words,
    "fused_linear_int4": _fused_words,
    "linear_nvfp4": _fused_nvfp4,
    "fused_linear_nvfp4": _fused_nvfp4,
    "router": _two,
    "norm_router": _two,
    "moe_sort": _two,
    "moe_experts": _moe_experts,
    "fused_experts": _moe_experts,
    "moe_experts_fp8": _moe_experts_fp8,
    "moe_experts_clamped": _moe_experts_clamped,
    "moe_experts_fp4": _moe_experts,
    "moe_experts_clamped_fp4": _moe_experts_clamped,
    "moe_experts_ragged": _two,
    "moe_experts_padded": _two,
    "moe_experts_int8": _moe_experts_quantized,
    "moe_experts_int8_weight_only": _moe_experts_grouped,
    "moe_experts_int4_weight_only": _moe_experts,
    "moe_experts_nvfp4": _moe_experts_nvfp4,
    "paged_attention": _paged_attention,
    "rope_attention": _rope_attention,
    "latent_attention": _latent_attention,
    "index_topk": _index_topk,
    "gated_delta_rule": _gated_delta_rule,
}
