"""What each value of the option `quantization` means."""

from __future__ import annotations

from dataclasses import dataclass

from skyline import ops
from skyline.engine.config import QUANTIZATION_GROUPS as GROUPS
from skyline.ops import Op

__all__ = ["GROUPS", "SCHEMES", "Scheme"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """The ops that take the place of `linear`, of the one for the output head, and of `moe_experts`.

    clamped: and of `moe_experts_clamped`; None leaves those as they are, or as they are stored.
    """

    linear: Op
    head: Op
    experts: Op
    clamped: Op | None = None


SCHEMES: dict[str, Scheme] = {
    "fp8": Scheme(ops.linear_fp8, ops.linear, ops.moe_experts_fp8),
    "mxfp4": Scheme(ops.linear_fp4, ops.linear, ops.moe_experts_fp4, ops.moe_experts_clamped_fp4),
    "int8": Scheme(ops.linear_int8, ops.linear_int8, ops.moe_experts_int8),
    "int8-weight-only": Scheme(
        ops.linear_int8_weight_only, ops.linear_int8_weight_only, ops.moe_experts_int8_weight_only
    ),
    # The head's errors go straight into the logits, and it is one weight of many.
    "int4": Scheme(ops.linear_int4, ops.linear_int8, ops.moe_experts_int4),
}
