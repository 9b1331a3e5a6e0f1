"""Kernels in Triton: every op on NVIDIA GPUs from Ampere on.

Importing this package registers them and imports no Triton: what is chosen is imported when it first runs. They are
tested on the CPU in Triton's interpreter, and compiled there for every generation of GPU (tests/kernels/triton).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch

from skyline.kernels.fp8_layout import fp8_layout
from skyline.kernels.registry import Kernel, Layout, Request, register
from skyline.kernels.triton.layouts import INT8, int4_layout
from skyline.ops import OPS

PROVIDER = "triton"
BY_EXPERT = "triton, by expert"  # looks at values on the host, so that it cannot be recorded
OLDEST = (8, 0)
FALLS_BACK = True  # False where an error of the compiler is to be seen: in tests

_LOG = logging.getLogger(__name__)
_warned: set[str] = set()

# Ops that read or write keys and values as they are cached.
_CACHED = frozenset({"kv_write", "paged_attention", "rope_kv_write"})

LayoutOf = Layout | Callable[[tuple[Any, ...]], Layout]


def supports(request: Request) -> str | None:
    """Why no kernel of this provider can serve the request, or None."""
    if request.device != "cuda" or request.gpu is None:
        return "needs a CUDA device"
    if request.batch_invariant:
        return "its reduction order depends on the number of rows"
    if request.gpu.capability < OLDEST:
        return f"needs compute capability 8.0, {request.gpu.name} has {'.'.join(map(str, request.gpu.capability))}"
    if request.op.name in _CACHED and request.kv_dtype == torch.float8_e4m3fn and not request.gpu.fp8:
        return f"{request.gpu.name} does not know FP8, which takes compute capability 8.9"
    return None if "triton" in request.gpu.libraries else "Triton is not installed: pip install triton"


def supports_fp8(request: Request) -> str | None:
    if (why_not := supports(request)) is not None:
        return why_not
    assert request.gpu is not None
    return None if request.gpu.fp8 else f"{request.gpu.name} does not know FP8, which takes compute capability 8.9"


def _is_of_the_compiler(error: Exception) -> bool:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return isinstance(error, (CompilationError, OutOfResources, PTXASError))


def _by_reference(op: str, arguments: tuple[Any, ...], error: Exception) -> Any:
    """Raises the compiler's error if the reference does not know a layout that the weight was given for the kernel."""
    try:
        result = OPS[op].reference(*arguments)
    except (AttributeError, TypeError):
        raise error from None
    if op not in _warned:
        _warned.add(op)
        _LOG.warning("%s does not compile for this GPU in one of its cases, torch computes those: %s", op, error)
    return result


def provide(
    op: str,
    module: str,
    layouts: Mapping[int, LayoutOf] | None = None,
    check: Callable[[Request], str | None] = supports,
    provider: str = PROVIDER,
) -> None:
    """Register the function of the op's name in a module of this package, which is imported at the first call.

    A case that Triton cannot compile, or that does not fit the GPU, goes to the op's reference, with one warning.
    """
    found: Callable[..., Any] | None = None

    def run(*arguments: Any) -> Any:
        nonlocal found
        if found is None:
            found = getattr(import_module(f"{__name__}.{module}"), op)
        try:
            return found(*arguments)
        except Exception as error:
            if not (FALLS_BACK and _is_of_the_compiler(error)):
                raise
            return _by_reference(op, arguments, error)

    register(Kernel(op, provider, run, check, layouts=layouts or {}))


_MODULES = {
    "norms": (
        "rms_norm",
        "add_rms_norm",
        "head_rms_norm",
        "offset_rms_norm",
        "offset_head_rms_norm",
        "gated_rms_norm",
        "layer_norm",
    ),
    "activations": ("silu_mul", "gelu_mul", "sigmoid_mul"),
    "rope": ("rope_kv_write", "rope", "kv_write"),
    "causal_conv": ("causal_conv",),
    "delta": ("gated_delta_rule",),
    "linear": ("linear", "fused_linear"),
    "router": ("router", "topk_router"),
    "moe": (
        "moe_experts",
        "moe_experts_clamped",
        "moe_sort",
        "moe_combine",
        "moe_experts_ragged",
        "moe_experts_padded",
    ),
    "attention": ("paged_attention",),
    "latent": ("latent_rope_write", "latent_attention"),
    "indexer": ("index_topk",),
}

for _module, _ops in _MODULES.items():
    for _op in _ops:
        provide(_op, _module)

for _op in ("linear_fp8", "fused_linear_fp8"):
    provide(_op, "linear", {1: fp8_layout}, supports_fp8)

provide("linear_int8", "quantized", {1: INT8})
provide("linear_int8_weight_only", "quantized", {1: INT8})
provide("linear_int4", "quantized", {1: int4_layout(1)})
provide("linear_fp4", "quantized")
provide("moe_experts_int8", "experts", {1: INT8, 2: INT8}, provider=BY_EXPERT)
provide("moe_experts_int8_weight_only", "experts", {1: INT8, 2: INT8}, provider=BY_EXPERT)
provide("moe_experts_int4", "experts", {1: int4_layout(1), 2: int4_layout(2)}, provider=BY_EXPERT)
