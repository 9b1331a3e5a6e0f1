"""Kernels of FlashInfer (arXiv:2501.01005), where it is installed: `pip install skyline-llm[cuda]`.

On an H200 those that Hopper has, mixtures excepted, gave our results, and were timed beside Triton's
(benchmarks/results/2026-11-27-gpu-h200-flashinfer.json): attention of long prompts took two thirds of Triton's time,
products with FP8 weights in blocks half of it; norms, activations and decode steps longer, so those stay Triton's on
Hopper. The library compiles most of its kernels, for seconds to minutes, when they are first used. So they go behind
Triton's and wait to be asked for, by `--prefer-kernels flashinfer`. What a call asks that they do not serve goes on to
Triton's kernel. Every call's signature is checked in CI (tests/kernels/test_flashinfer.py), against
version 0.7.2.

Attention splits a step into a plan, made once, and a run a layer. A plan needs the contexts' lengths on the host, which
a recorded decode step does not know. So steps that compute prompts are planned (BatchPrefillWithPagedKVCacheWrapper),
while decode steps take the kernels that read lengths and block tables on the device and need no plan.

Each call is tried out before it is used: trials.py says how.

Products and mixtures have tactics, which the library's own autotuner compares: tuning.py.

Not taken: fused_add_rmsnorm writes over both of its inputs, which are still needed here, so that it would take two
copies where Triton takes one launch. Sampling draws its numbers by the place in the batch, so that a request's seed
would not fix its tokens. Mixtures in NVFP4 and MXFP4 have one scale for the activations of all rows, which only a
calibration knows. All-reduces have no use before there is tensor parallelism. Importing this package imports no
FlashInfer.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from skyline.kernels.flashinfer.layouts import SWIZZLED_FP4, UP_FIRST, SwizzledFp4, UpFirst, up_first_fp8
from skyline.kernels.fp8_layout import fp8_layout
from skyline.kernels.registry import Kernel, Request, register
from skyline.kernels.triton import LayoutOf, by_reference, does_not_compile, supports_fp4, supports_fp8
from skyline.kernels.triton.launches import LAUNCHES

PROVIDER = "flashinfer"


def supports(request: Request) -> str | None:
    """Why no kernel of this provider can serve the request, or None."""
    if request.device != "cuda" or request.gpu is None:
        return "needs a CUDA device"
    if request.batch_invariant:
        return "its reduction order depends on the other rows"
    if request.gpu.capability < (8, 0):
        return f"needs compute capability 8.0, {request.gpu.name} has {'.'.join(map(str, request.gpu.capability))}"
    if missing := {"flashinfer", "triton"} - request.gpu.libraries:
        return f"{' and '.join(sorted(missing))} cannot be imported: pip install skyline-llm[cuda]"
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {str(request.dtype).removeprefix('torch.')}"
    return None


def _supports_dense(request: Request) -> str | None:
    if (why_not := supports(request)) is not None:
        return why_not
    assert request.gpu is not None
    return "Triton's kernel took less time on Hopper" if request.gpu.capability[0] == 9 else None


def _supports_attention(request: Request) -> str | None:
    if (why_not := supports(request)) is not None:
        return why_not
    if request.kv_dtype not in (None, request.dtype):
        return "cached keys and values have a scale for each head, it takes one for all"
    return None


def _supports_latent(request: Request) -> str | None:
    if (why_not := _supports_attention(request)) is not None:
        return why_not
    assert request.gpu is not None
    if request.gpu.capability[0] != 10:
        return f"without a plan it takes compute capability 10, {request.gpu.name} has {request.gpu.capability[0]}.x"
    return None


def _supports_fp8(request: Request) -> str | None:
    if (why_not := supports(request) or supports_fp8(request)) is not None:
        return why_not
    assert request.gpu is not None
    if request.gpu.capability[0] not in (9, 10, 12):
        return f"its products of FP8 are made for Hopper and Blackwell, {request.gpu.name} is neither"
    return None


def _supports_attention_linear(request: Request) -> str | None:
    return _supports_attention(request) or supports_fp8(request)  # the product may be Triton's


def _supports_mixture(request: Request) -> str | None:
    if (why_not := supports(request)) is not None:
        return why_not
    assert request.gpu is not None
    if request.gpu.capability[0] not in (9, 10, 12):
        return f"its mixtures are made for Hopper and Blackwell, {request.gpu.name} is neither"
    return None


def _supports_mixture_fp8(request: Request) -> str | None:
    if (why_not := _supports_mixture(request) or supports_fp8(request)) is not None:
        return why_not
    assert request.gpu is not None
    if request.gpu.capability[0] != 9:
        return f"its mixtures in FP8 blocks are made for Hopper, which {request.gpu.name} is not"
    return None if request.dtype == torch.bfloat16 else "its mixtures in FP8 blocks take bfloat16"


def _supports_fp4(request: Request) -> str | None:
    return supports(request) or supports_fp4(request)


def _provide(op: str, module: str, check: Any = supports, layouts: Mapping[int, LayoutOf] | None = None) -> None:
    def run(*arguments: Any) -> Any:
        try:
            return getattr(import_module(f"{__name__}.{module}"), op)(*arguments)
        except Exception as error:  # of one of Triton's kernels
            if not does_not_compile(op, error):
                raise
            return by_reference(op, tuple(map(_as_it_was, arguments)), error)

    # Few rows, what is not served, and what surrounds a product or attention, are Triton's.
    launches = LAUNCHES.get(op) if module in ("attention", "fp4", "linear", "moe") else None
    register(Kernel(op, PROVIDER, run, check, layouts=layouts or {}, launches=launches))


def _as_it_was(argument: Any) -> Any:
    """A weight as Triton's provider knows it."""
    if isinstance(argument, UpFirst):
        return argument.turned()
    return argument.words if isinstance(argument, SwizzledFp4) else argument


_provide("rms_norm", "dense", _supports_dense)
_provide("silu_mul", "dense", _supports_dense)
_provide("paged_attention", "attention", _supports_attention)
_provide("rope_attention", "attention", _supports_attention)
_provide("linear_fp8", "linear", _supports_fp8, {1: fp8_layout(1)})
_provide("fused_linear_fp8", "linear", _supports_fp8, {1: fp8_layout(1)})
_provide("gated_mlp_fp8", "linear", _supports_fp8, {1: fp8_layout(1), 2: fp8_layout(2)})
_provide("attention_linear_fp8", "attention", _supports_attention_linear, {1: fp8_layout(1)})
_provide("latent_attention", "latent", _supports_latent)
_provide("linear_nvfp4", "fp4", _supports_fp4, {1: SWIZZLED_FP4})
_provide("fused_linear_nvfp4", "fp4", _supports_fp4, {1: SWIZZLED_FP4})
_provide("moe_experts", "moe", _supports_mixture, {1: UP_FIRST})
_provide("fused_experts", "moe", _supports_mixture, {1: UP_FIRST})
_provide("moe_experts_fp8", "moe", _supports_mixture_fp8, {1: up_first_fp8(1), 2: fp8_layout(2)})
