"""Tiny settings of the architectures that are more than a variation of Llama, for tests that go over all of them."""

from __future__ import annotations

from typing import Any

_LATENT: dict[str, Any] = dict(
    num_key_value_heads=4,
    kv_lora_rank=24,
    q_lora_rank=20,
    qk_rope_head_dim=8,
    qk_nope_head_dim=12,
    v_head_dim=10,
    moe_intermediate_size=24,
    n_routed_experts=8,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    n_shared_experts=2,
    routed_scaling_factor=2.5,
    num_mtp_layers=0,
)
_DELTA: dict[str, Any] = dict(
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25),
)
_DELTA_MOE: dict[str, Any] = dict(
    **_DELTA,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=20,
)

# transformers' name of the family -> its settings, for three layers of hidden size 32 (harness.save_tiny).
FAMILIES: dict[str, dict[str, Any]] = {
    "DeepseekV3": _LATENT,
    # Enough heads that no two positions both score 0: which of them is chosen then is not for transformers to say.
    "DeepseekV32": dict(**_LATENT, index_topk=9, index_head_dim=16, index_n_heads=24),
    "Gemma3": dict(head_dim=16, sliding_window=6, query_pre_attn_scalar=20, sliding_window_pattern=3),
    "Glm4Moe": dict(
        head_dim=16,
        moe_intermediate_size=24,
        n_routed_experts=6,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        num_mtp_layers=0,
    ),
    "GptOss": dict(head_dim=16, num_local_experts=6, num_experts_per_tok=2, sliding_window=6, attention_bias=True),
    "MiniMaxM2": dict(
        head_dim=16,
        num_local_experts=6,
        num_experts_per_tok=2,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5),
    ),
    "Mixtral": dict(num_local_experts=6, num_experts_per_tok=2, sliding_window=6),
    "Qwen3Next": _DELTA_MOE,
    "Qwen3_5": _DELTA,
    "Qwen3_5Moe": _DELTA_MOE,
}
