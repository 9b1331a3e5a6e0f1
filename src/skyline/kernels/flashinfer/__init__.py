"""Kernels of FlashInfer (arXiv:2501.01005), where it is installed: `pip install skyline-llm[cuda]`.

On an H200 all of them that Hopper has gave our results, and were timed beside Triton's
(benchmarks/results/2026-11-27-gpu-h200-flashinfer.json). Attention of long prompts took two thirds of Triton's time and
goes first there. Products with FP8 weights in blocks took half of it, but the library compiles one for each shape when
it comes, so they wait to be asked for, by `--prefer-kernels flashinfer`; norms, activations and decode steps took as
long or longer. On other GPUs none has run: what is asked for there is tried out (trials.py), as everywhere. Every
call's signature is checked in CI (tests/kernels/test_flashinfer.py), against version 0.7.2.

Most kernels are compiled, for minutes, when they are first called. So what goes first by itself is only used if it is
there already: `skyline tune` sees to that, and so does a wheel of the library with compiled kernels.

Attention splits a step into a plan, made once, and a run a layer. A plan needs the contexts' lengths on the host, which
a recorded decode step does not know. So steps that compute prompts are planned (BatchPrefillWithPagedKVCacheWrapper),
while decode steps, on Blackwell, take the kernels that read lengths and block tables on the device and need no plan.

Not taken: fused_add_rmsnorm writes over both of its inputs, which are still needed here, so that it would take two
copies where Triton takes one launch. Sampling draws its numbers by the place in the batch, so that a request's seed
would not fix its tokens. mm_fp4 quantizes activations to FP4, which no op here allows. CUTLASS's and TensorRT-LLM's
mixtures want experts' rows in another order than checkpoints have. Importing this package imports no FlashInfer.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from skyline.kernels.fp8_layout import fp8_layout
from skyline.kernels.registry import Kernel, Request, register
from skyline.kernels.triton import LayoutOf, supports_fp8
from skyline.kernels.triton.launches import LAUNCHES

PROVIDER = "flashinfer"
# Of a step with prompts: for 1,024 tokens the kernels of an H200 took as long as Triton's, and a plan takes time.
LEAST_TOKENS = 2048


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


def _asked_for(request: Request) -> str | None:
    if (why_not := supports(request)) is not None or request.prefer == PROVIDER:
        return why_not
    return "by itself only its attention of prompts goes first, on Hopper, where it was the faster"


def _supports_attention(request: Request) -> str | None:
    if (why_not := supports(request)) is not None:
        return why_not
    assert request.gpu is not None
    if request.gpu.capability[0] != 9 and (why_not := _asked_for(request)) is not None:
        return why_not
    if request.kv_dtype not in (None, request.dtype):
        return "cached keys and values have a scale for each head, it takes one for all"
    return None


def _supports_latent(request: Request) -> str | None:
    if (why_not := _supports_attention(request) or _asked_for(request)) is not None:
        return why_not
    assert request.gpu is not None
    if request.gpu.capability[0] != 10:
        return f"without a plan it takes compute capability 10, {request.gpu.name} has {request.gpu.capability[0]}.x"
    return None


def _supports_fp8(request: Request) -> str | None:
    if (why_not := _asked_for(request) or supports_fp8(request)) is not None:
        return why_not
    assert request.gpu is not None
    if request.gpu.capability[0] not in (9, 10, 12):
        return f"its products of FP8 are made for Hopper and Blackwell, {request.gpu.name} is neither"
    return None


def _supports_attention_linear(request: Request) -> str | None:
    return _supports_attention(request) or supports_fp8(request)  # the product may be Triton's


def _provide(op: str, module: str, check: Any = _asked_for, layouts: Mapping[int, LayoutOf] | None = None) -> None:
    def run(*arguments: Any) -> Any:
        return getattr(import_module(f"{__name__}.{module}"), op)(*arguments)

    scope = (
        f"of prompts from {LEAST_TOKENS:,} tokens on, once compiled: triton computes the rest"
        if module == "attention"
        else ""
    )
    # Few rows, decode steps, and what surrounds a product or attention, are Triton's.
    launches = LAUNCHES.get(op) if module != "latent" else None
    kernel = Kernel(op, PROVIDER, run, check, layouts=layouts or {}, launches=launches, scope=scope)
    register(kernel, first=module == "attention")


_provide("rms_norm", "dense")
_provide("silu_mul", "dense")
_provide("paged_attention", "attention", _supports_attention)
_provide("rope_attention", "attention", _supports_attention)
_provide("linear_fp8", "linear", _supports_fp8, {1: fp8_layout(1)})
_provide("fused_linear_fp8", "linear", _supports_fp8, {1: fp8_layout(1)})
_provide("gated_mlp_fp8", "linear", _supports_fp8, {1: fp8_layout(1), 2: fp8_layout(2)})
_provide("attention_linear_fp8", "attention", _supports_attention_linear, {1: fp8_layout(1)})
_provide("latent_attention", "latent", _supports_latent)
