"""The provider that is always there: each op's own reference, in plain torch, on any device."""

from __future__ import annotations

from skyline.kernels.registry import Kernel, Request, candidates, register
from skyline.ops import OPS

# Row by row, these give the same bits whatever other rows are in the batch: they never reduce across a shape that the
# batch decides. `linear` and `moe_experts` go to BLAS, which blocks the reduction by the number of rows;
# `paged_attention` reduces over the context of the chunk at hand.
_BATCH_DEPENDENT = {"fused_experts", "fused_linear", "linear", "moe_experts", "paged_attention", "rope_attention"}


def _supports(request: Request) -> str | None:
    if request.batch_invariant and request.op.name in _BATCH_DEPENDENT:
        return "its reduction order depends on the number of rows"
    return None


for _op in OPS.values():
    # Ops whose weights have no plain form are registered with their layouts, in torch_quantized.
    if not any(kernel.provider == "torch" for kernel in candidates(_op.name)):
        register(Kernel(_op.name, "torch", _op.reference, _supports))
