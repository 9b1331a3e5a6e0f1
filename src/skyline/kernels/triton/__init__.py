"""Kernels in Triton: every op on NVIDIA GPUs from Ampere on.

Importing this package registers them and imports no Triton: what is chosen is imported when it first runs. They are
tested on the CPU in Triton's interpreter, and compiled there for every generation of GPU (tests/kernels/triton).
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

import torch

from skyline.kernels.fp8_layout import fp8_layout
from skyline.kernels.gpu import OLDEST
from skyline.kernels.registry import Kernel, Layout, Request, register
from skyline.kernels.triton.launches import LAUNCHES
from skyline.kernels.triton.layouts import (
    INT8,
    Fp4Words,
    Int4Weight,
    fp4_words_layout,
    int4_layout,
    unpack_fp4,
    unpack_int4,
)
from skyline.ops import OPS, AttentionBatch

PROVIDER = "triton"
FALLS_BACK = True  # False where an error of the compiler is to be seen: in tests

_LOG = logging.getLogger(__name__)
_warned: set[str] = set()
fallbacks = 0  # calls that a reference took the place of

# Ops that read or write what is cached for attention.
_CACHED = frozenset(
    {
        "attention_linear_fp8",
        "index_topk",
        "kv_write",
        "latent_attention",
        "latent_rope_write",
        "paged_attention",
        "rope_attention",
        "rope_kv_write",
    }
)

T = TypeVar("T")
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
    return None if "triton" in request.gpu.libraries else "Triton is not installed, or cannot compile here"


def supports_fp8(request: Request) -> str | None:
    if (why_not := supports(request)) is not None:
        return why_not
    assert request.gpu is not None
    return None if request.gpu.fp8 else f"{request.gpu.name} does not know FP8, which takes compute capability 8.9"


def supports_fp4(request: Request) -> str | None:
    if (why_not := supports(request)) is not None:
        return why_not
    assert request.gpu is not None
    return None if request.gpu.fp4 else f"the matrix units of {request.gpu.name} do not multiply FP4, as Blackwell's do"


class DeviceOnlyError(RuntimeError):
    """A kernel does not compile in a step of which only the device knows the numbers: no reference can replace it."""


def does_not_compile(what: str, error: Exception) -> bool:
    """Whether torch should do what a kernel was to do, as it does not compile, or does not fit. Warns once of each."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    # Launchers are compiled by a compiler of C, which may be missing.
    of_c = isinstance(error, subprocess.CalledProcessError) or "Failed to find C compiler" in str(error)
    if not FALLS_BACK or not (of_c or isinstance(error, (CompilationError, OutOfResources, PTXASError))):
        return False
    if what not in _warned:
        _warned.add(what)
        _LOG.warning("%s does not compile for this GPU in one of its cases, torch computes those: %s", what, error)
    return True


def or_in_torch(what: str, kernel: Callable[[], T], in_torch: Callable[[], T]) -> T:
    """What `kernel` gives, or, if it does not compile, what `in_torch` does: for what is no op of a Program."""
    try:
        return kernel()
    except Exception as error:
        if not does_not_compile(what, error):
            raise
    return in_torch()


def by_reference(op: str, arguments: tuple[Any, ...], error: Exception) -> Any:
    """Raises DeviceOnlyError where the reference would go by numbers of the host that are not those of the step."""
    global fallbacks
    if any(isinstance(argument, AttentionBatch) and argument.device_only for argument in arguments):
        raise DeviceOnlyError(f"{op} does not compile for this GPU: {error}") from error
    fallbacks += 1
    return OPS[op].reference(*map(_unpacked, arguments))


def _unpacked(argument: Any) -> Any:
    """As references take it."""
    if isinstance(argument, Int4Weight):
        return unpack_int4(argument)
    return unpack_fp4(argument) if isinstance(argument, Fp4Words) else argument


def provide(
    op: str,
    module: str,
    layouts: Mapping[int, LayoutOf] | None = None,
    check: Callable[[Request], str | None] = supports,
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
            if not does_not_compile(op, error):
                raise
            return by_reference(op, arguments, error)

    register(Kernel(op, PROVIDER, run, check, layouts=layouts or {}, launches=LAUNCHES.get(op)))


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
    "router": ("router", "norm_router", "topk_router"),
    "moe": (
        "moe_experts",
        "fused_experts",
        "moe_experts_clamped",
        "moe_sort",
        "moe_combine",
        "moe_experts_ragged",
        "moe_experts_padded",
    ),
    "attention": ("paged_attention", "rope_attention"),
    "latent": ("latent_rope_write", "latent_attention"),
    "indexer": ("index_topk",),
}

for _module, _ops in _MODULES.items():
    for _op in _ops:
        provide(_op, _module)

for _op in ("linear_fp8", "fused_linear_fp8"):
    provide(_op, "linear", {1: fp8_layout(1)}, supports_fp8)
provide("gated_mlp_fp8", "fused_fp8", {1: fp8_layout(1), 2: fp8_layout(2)}, supports_fp8)
provide("attention_linear_fp8", "fused_fp8", {1: fp8_layout(1)}, supports_fp8)
provide("moe_experts_fp8", "moe_bytes", {1: fp8_layout(1), 2: fp8_layout(2)}, supports_fp8)

provide("linear_int8", "quantized", {1: INT8})
provide("linear_int8_weight_only", "quantized", {1: INT8})
for _op in ("linear_int4_weight_only", "fused_linear_int4"):
    provide(_op, "quantized", {1: int4_layout(1)})
for _op in ("linear_fp4", "fused_linear_fp4"):
    provide(_op, "quantized", {1: fp4_words_layout(1)})
for _op in ("linear_nvfp4", "fused_linear_nvfp4"):
    provide(_op, "nvfp4", {1: fp4_words_layout(1)}, supports_fp4)
provide("moe_experts_nvfp4", "nvfp4", {1: fp4_words_layout(1), 2: fp4_words_layout(2)}, supports_fp4)
provide("moe_experts_fp4", "moe", {1: fp4_words_layout(1), 2: fp4_words_layout(2)})
provide("moe_experts_clamped_fp4", "moe", {1: fp4_words_layout(1), 3: fp4_words_layout(3)})
provide("moe_experts_int8", "moe_bytes", {1: INT8, 2: INT8})
provide("moe_experts_int8_weight_only", "moe_bytes", {1: INT8, 2: INT8})
provide("moe_experts_int4_weight_only", "moe", {1: int4_layout(1), 2: int4_layout(2)})
