"""Every op a model may use. See `contract.py` for what an op is, and docs/architecture.md for how to add one."""

from skyline.ops.attention import kv_write, paged_attention, rope
from skyline.ops.batch import AttentionBatch
from skyline.ops.caches import IndexCache, KVCache, LatentCache, LayerCache, StateCache
from skyline.ops.contract import OPS, Case, Cost, Op
from skyline.ops.delta import causal_conv, gated_delta_rule
from skyline.ops.dense import add, embedding, head_rms_norm, linear, rms_norm, select_rows, silu_mul, split
from skyline.ops.fp4 import Fp4Weight, linear_fp4
from skyline.ops.fp4_moe import moe_experts_clamped_fp4, moe_experts_fp4
from skyline.ops.fp8 import Fp8Weight, linear_fp8
from skyline.ops.fp8_moe import moe_experts_fp8
from skyline.ops.fused import add_rms_norm, rope_attention, rope_kv_write
from skyline.ops.fused_fp8 import attention_linear_fp8, gated_mlp_fp8
from skyline.ops.fused_linear import (
    fused_linear,
    fused_linear_fp4,
    fused_linear_fp8,
    fused_linear_int4,
    fused_linear_nvfp4,
)
from skyline.ops.gates import (
    gated_rms_norm,
    gelu_mul,
    layer_norm,
    offset_head_rms_norm,
    offset_rms_norm,
    scale,
    sigmoid_mul,
)
from skyline.ops.latent import index_topk, latent_attention, latent_rope_write
from skyline.ops.moe import fused_experts, moe_experts, moe_experts_clamped, topk_router
from skyline.ops.moe_layouts import moe_combine, moe_experts_padded, moe_experts_ragged, moe_sort
from skyline.ops.nvfp4 import linear_nvfp4, moe_experts_nvfp4
from skyline.ops.quantized import (
    QuantizedWeight,
    linear_int4,
    linear_int4_weight_only,
    linear_int8,
    linear_int8_weight_only,
)
from skyline.ops.quantized_moe import (
    moe_experts_int4,
    moe_experts_int4_weight_only,
    moe_experts_int8,
    moe_experts_int8_weight_only,
)
from skyline.ops.router import norm_router, router

__all__ = [
    "OPS",
    "AttentionBatch",
    "Case",
    "Cost",
    "Fp4Weight",
    "Fp8Weight",
    "IndexCache",
    "KVCache",
    "LatentCache",
    "LayerCache",
    "Op",
    "QuantizedWeight",
    "StateCache",
    "add",
    "add_rms_norm",
    "attention_linear_fp8",
    "causal_conv",
    "embedding",
    "fused_experts",
    "fused_linear",
    "fused_linear_fp4",
    "fused_linear_fp8",
    "fused_linear_int4",
    "fused_linear_nvfp4",
    "gated_delta_rule",
    "gated_mlp_fp8",
    "gated_rms_norm",
    "gelu_mul",
    "head_rms_norm",
    "index_topk",
    "kv_write",
    "latent_attention",
    "latent_rope_write",
    "layer_norm",
    "linear",
    "linear_fp4",
    "linear_fp8",
    "linear_int4",
    "linear_int4_weight_only",
    "linear_int8",
    "linear_int8_weight_only",
    "linear_nvfp4",
    "moe_combine",
    "moe_experts",
    "moe_experts_clamped",
    "moe_experts_clamped_fp4",
    "moe_experts_fp4",
    "moe_experts_fp8",
    "moe_experts_int4",
    "moe_experts_int4_weight_only",
    "moe_experts_int8",
    "moe_experts_int8_weight_only",
    "moe_experts_nvfp4",
    "moe_experts_padded",
    "moe_experts_ragged",
    "moe_sort",
    "norm_router",
    "offset_head_rms_norm",
    "offset_rms_norm",
    "paged_attention",
    "rms_norm",
    "rope",
    "rope_attention",
    "rope_kv_write",
    "router",
    "scale",
    "select_rows",
    "sigmoid_mul",
    "silu_mul",
    "split",
    "topk_router",
]
