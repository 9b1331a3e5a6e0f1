"""Every op a model may use. See `contract.py` for what an op is, and docs/architecture.md for how to add one."""

from skyline.ops.attention import kv_write, paged_attention, rope
from skyline.ops.batch import AttentionBatch, KVCache
from skyline.ops.contract import OPS, Case, Cost, Op
from skyline.ops.dense import add, embedding, head_rms_norm, linear, rms_norm, select_rows, silu_mul, split
from skyline.ops.fused import add_rms_norm, rope_kv_write
from skyline.ops.moe import moe_experts, topk_router
from skyline.ops.quantized import QuantizedWeight, linear_int4, linear_int8, linear_int8_weight_only
from skyline.ops.quantized_moe import moe_experts_int4, moe_experts_int8, moe_experts_int8_weight_only

__all__ = [
    "OPS",
    "AttentionBatch",
    "Case",
    "Cost",
    "KVCache",
    "Op",
    "QuantizedWeight",
    "add",
    "add_rms_norm",
    "embedding",
    "head_rms_norm",
    "kv_write",
    "linear",
    "linear_int4",
    "linear_int8",
    "linear_int8_weight_only",
    "moe_experts",
    "moe_experts_int4",
    "moe_experts_int8",
    "moe_experts_int8_weight_only",
    "paged_attention",
    "rms_norm",
    "rope",
    "rope_kv_write",
    "select_rows",
    "silu_mul",
    "split",
    "topk_router",
]
