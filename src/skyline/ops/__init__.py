"""Every op a model may use. See `contract.py` for what an op is, and docs/architecture.md for how to add one."""

from skyline.ops.attention import kv_write, paged_attention, rope
from skyline.ops.batch import AttentionBatch, KVCache
from skyline.ops.contract import OPS, Case, Cost, Op
from skyline.ops.dense import add, embedding, head_rms_norm, linear, rms_norm, select_rows, silu_mul, split
from skyline.ops.moe import moe_experts, topk_router

__all__ = [
    "OPS",
    "AttentionBatch",
    "Case",
    "Cost",
    "KVCache",
    "Op",
    "add",
    "embedding",
    "head_rms_norm",
    "kv_write",
    "linear",
    "moe_experts",
    "paged_attention",
    "rms_norm",
    "rope",
    "select_rows",
    "silu_mul",
    "split",
    "topk_router",
]
