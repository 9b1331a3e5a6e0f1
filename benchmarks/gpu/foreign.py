"""FlashInfer's kernels beside Triton's, call by call at real shapes: do they pass their trial, and which is faster."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu.ceilings import CUDA, median_seconds

_HEADS, _KV_HEADS, _HEAD_DIM, _HIDDEN, _BLOCK = 32, 8, 128, 4096, 16  # Llama-3.1-8B's
_SCALE = _HEAD_DIM**-0.5


def compare() -> list[dict[str, Any]]:
    """A row a case: microseconds of both, of whole calls as a step makes them, and why FlashInfer refused, if so.

    Decode steps and norms are replayed from a graph, as they are recorded where they are used.
    """
    from skyline.kernels.flashinfer import trials
    from skyline.kernels.registry import candidates

    rows = []
    for name, op, arguments, recorded in _cases():
        kernels = {kernel.provider: kernel for kernel in candidates(op)}
        row: dict[str, Any] = {"case": name, "op": op}
        before = set(trials.refused())
        try:
            for provider in ("triton", "flashinfer", "triton", "flashinfer"):
                given = tuple(each[provider] if isinstance(each, _Laid) else each for each in arguments)

                def run(kernel: Any = kernels[provider], given: Any = given) -> Any:
                    return kernel.run(*given)

                seconds = _recorded_seconds(run) if recorded else median_seconds(run)
                row.setdefault(f"{provider}_us", []).append(round(seconds * 1e6, 2))
            new = [why for kind, why in trials.refused().items() if kind not in before]
            row |= {"refused": new[0]} if new else {}
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        rows.append(row)
    return rows


class _Laid(dict[str, Any]):
    """One weight as each provider has it."""


def _cases() -> Iterator[tuple[str, str, tuple[Any, ...], bool]]:
    """Name, op, arguments, and whether decode steps record it."""
    from skyline.kernels.gpu import detect
    from skyline.ops.fp8 import BLOCK, FP8, Fp8Weight

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=CUDA)

    norm = random(_HIDDEN)
    for count in (64, 8192):
        yield f"rms_norm {count} x {_HIDDEN}", "rms_norm", (random(count, _HIDDEN), norm, 1e-5), True
        yield f"silu_mul {count} x 14336", "silu_mul", (random(count, 2 * 14336),), True
    for requests, context in ((1, 1024), (16, 1024), (64, 1024), (256, 1024), (1, 8192), (16, 8192)):
        q, cache, batch = _attention(requests, context, 1)
        yield f"decode {requests} x {context}", "paged_attention", (q, cache, batch, _SCALE), True
    for requests, context, queries in ((1, 1024, 1024), (1, 8192, 8192), (8, 1024, 1024), (1, 8192, 2048)):
        q, cache, batch = _attention(requests, context, queries)
        label = f"prompt {requests} x {queries} of {context}"
        yield label, "paged_attention", (q, cache, batch, _SCALE), False
    for n, k in ((6144, 4096), (4096, 14336), (2112, 7168)):
        values = torch.randint(0, 120, (n, k), dtype=torch.uint8, device=CUDA).view(FP8)
        scales = torch.rand((-(-n // BLOCK), -(-k // BLOCK)), device=CUDA) / 100
        for count in (128, 1024, 8192):
            label = f"FP8 blocks {count} x {n} x {k}"
            yield label, "fused_linear_fp8", (random(count, k), Fp8Weight(values, scales)), False
    yield from _mixtures()
    if detect().fp4:
        yield from _fp4()


def _mixtures() -> Iterator[tuple[str, str, tuple[Any, ...], bool]]:
    """Those of Qwen3-30B-A3B, and in FP8 blocks of DeepSeek-V3 with a quarter of its experts."""
    from skyline.kernels.flashinfer.layouts import UpFirst
    from skyline.ops.fp8 import BLOCK, FP8, Fp8Weight

    def choices(tokens: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.rand((tokens, experts), device=CUDA).topk(8).indices
        return torch.rand((tokens, 8), device=CUDA) / 8, chosen

    experts, inner, hidden = 128, 768, 2048
    gate_up = torch.randn((experts, 2 * inner, hidden), dtype=torch.bfloat16, device=CUDA) * hidden**-0.5
    down = torch.randn((experts, hidden, inner), dtype=torch.bfloat16, device=CUDA) * inner**-0.5
    both = _Laid(triton=gate_up, flashinfer=UpFirst(gate_up.roll(inner, 1)))
    for tokens in (256, 1024, 8192):
        x = torch.randn((tokens, hidden), dtype=torch.bfloat16, device=CUDA)
        yield f"experts {tokens} x 8 of {experts}", "moe_experts", (x, both, down, *choices(tokens, experts)), False
    experts, inner, hidden = 64, 2048, 7168

    def weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.randint(0, 120, (experts, n, k), dtype=torch.uint8, device=CUDA)
        return values, torch.rand((experts, n // BLOCK, k // BLOCK), device=CUDA) / 3000

    (values, scales), (others, other_scales) = weight(2 * inner, hidden), weight(hidden, inner)
    up_first = UpFirst(values.roll(inner, 1).view(FP8), scales.roll(inner // BLOCK, 1))
    both = _Laid(triton=Fp8Weight(values.view(FP8), scales), flashinfer=up_first)
    second = Fp8Weight(others.view(FP8), other_scales)
    for tokens in (128, 1024, 8192):
        x = torch.randn((tokens, hidden), dtype=torch.bfloat16, device=CUDA)
        label = f"experts in FP8 blocks {tokens} x 8 of {experts}"
        yield label, "moe_experts_fp8", (x, both, second, *choices(tokens, experts)), False


def _fp4() -> Iterator[tuple[str, str, tuple[Any, ...], bool]]:
    from skyline.kernels.flashinfer.layouts import SWIZZLED_FP4
    from skyline.ops.fp4 import NVFP4_GROUP, fp4_case_weight

    for n, k in ((6144, 4096), (4096, 14336)):
        laid = SWIZZLED_FP4.allocate((n, k), torch.bfloat16, CUDA)
        SWIZZLED_FP4.write(laid, 0, fp4_case_weight(n, k, NVFP4_GROUP, torch.Generator().manual_seed(0)))
        both = _Laid(triton=laid.words, flashinfer=laid)
        for count in (64, 256, 1024, 8192):
            x = torch.randn((count, k), dtype=torch.bfloat16, device=CUDA)
            yield f"NVFP4 {count} x {n} x {k}", "fused_linear_nvfp4", (x, both), False


def _attention(requests: int, context: int, queries: int) -> tuple[Any, ...]:
    from skyline.ops import AttentionBatch, KVCache

    per_request = -(-context // _BLOCK)
    cache = KVCache(_KV_HEADS, _HEAD_DIM, torch.bfloat16)
    cache.allocate(requests * per_request, _BLOCK, CUDA)
    for part in cache.tensors:
        part.normal_()
    order = torch.randperm(requests * per_request).view(requests, per_request).tolist()
    batch = AttentionBatch.build(order, [context - queries] * requests, [queries] * requests, _BLOCK, CUDA)
    q = torch.randn((requests * queries, _HEADS * _HEAD_DIM), dtype=torch.bfloat16, device=CUDA)
    return q, cache, batch


def _recorded_seconds(run: Callable[[], Any], calls: int = 20) -> float:
    """Median seconds of one of so many calls in a graph."""
    from skyline.runner.recording import record

    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = record(lambda: [run() for _ in range(calls)]).graph
    return statistics.median(median_seconds(graph.replay) for _ in range(3)) / calls
