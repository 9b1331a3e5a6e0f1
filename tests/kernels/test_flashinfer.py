"""What can be known of FlashInfer's kernels without a GPU: that calls fit its signatures, and what is served."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from skyline.kernels import Request, candidates, choose
from skyline.kernels.flashinfer import calls, layouts
from skyline.kernels.fp8_layout import FP8_BLOCKS, FP8_ROWS
from skyline.kernels.gpu import GPUS
from skyline.ops import OPS
from skyline.ops.attention import make_batch
from skyline.ops.formats import IntegerFormat, set_integers
from skyline.ops.fp4 import fp4_case_weight
from skyline.ops.fp8 import Fp8Rows, Fp8Weight, fp8_case_weight

SHAPE = calls.Shape(8, 2, 64, 16, torch.bfloat16, 0.125, None, None, 0)
H200 = GPUS["h200"]


def _calls() -> dict[str, dict[str, Any]]:
    """Every call by where it is found in the library."""
    x = torch.empty(2, 64)
    q, cache, tables = torch.empty(2, 8, 64), torch.empty(4, 16, 2, 64), torch.zeros(2, 4, dtype=torch.int32)
    lengths = torch.ones(2, dtype=torch.int32)
    weight = Fp8Weight(x, x)
    pages = calls.Pages(lengths, lengths, lengths, lengths)
    words, scales = torch.zeros((2, 16), dtype=torch.int32), torch.zeros(128 * 8, dtype=torch.uint8)
    ids = torch.zeros((2, 1), dtype=torch.int32)
    wrapper = "BatchPrefillWithPagedKVCacheWrapper"
    return {
        "rmsnorm": calls.rmsnorm(x, x[0], 1e-6),
        "silu_and_mul": calls.silu_and_mul(x),
        "gemm.fp8_blockscale_gemm_sm90": calls.fp8_of_bfloat16(x, weight, x),
        "gemm.gemm_fp8_nt_groupwise": calls.fp8_of_fp8(x, x, weight, x),
        "gemm.mm_fp4": calls.fp4_of_fp4(words, scales, words, scales, x),
        "fused_moe.cutlass_fused_moe": calls.mixture(x, ids, x, (x, x), (x, x), x),
        "autotune": calls.autotune(Path("tactics.json")),
        f"{wrapper}.__init__": calls.prefill_wrapper(x, "auto"),
        f"{wrapper}.plan": calls.prefill_plan(SHAPE, pages),
        f"{wrapper}.run": calls.prefill_run(q, cache, cache, q),
        "decode.trtllm_batch_decode_with_kv_cache": calls.decode(q, cache, cache, x, tables, lengths, SHAPE),
        "mla.trtllm_batch_decode_with_kv_cache_mla": calls.latent_decode(q, cache, x, tables, lengths, 128, 32, 0.1),
    }


@pytest.mark.parametrize("name", _calls())
def test_calls_fit_the_signatures(name: str) -> None:
    pytest.importorskip("flashinfer")
    import flashinfer.decode
    import flashinfer.fused_moe
    import flashinfer.gemm
    import flashinfer.mla

    found: Any = flashinfer
    for part in name.split("."):
        found = getattr(found, part)
    signature = inspect.signature(found)
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    signature.bind(*([None] if "Wrapper" in name else []), **_calls()[name])


def test_the_autotuner_reads_files() -> None:
    pytest.importorskip("flashinfer")
    from flashinfer.autotuner import AutoTuner

    inspect.signature(AutoTuner.get().load_configs).bind("tactics.json")


def test_modules_import_where_the_library_is() -> None:
    pytest.importorskip("flashinfer")
    pytest.importorskip("triton")
    from skyline.kernels.flashinfer import attention, dense, fp4, latent, linear, moe

    for op, module in (
        ("rms_norm", dense),
        ("silu_mul", dense),
        ("paged_attention", attention),
        ("rope_attention", attention),
        ("attention_linear_fp8", attention),
        ("linear_fp8", linear),
        ("fused_linear_fp8", linear),
        ("gated_mlp_fp8", linear),
        ("latent_attention", latent),
        ("linear_nvfp4", fp4),
        ("fused_linear_nvfp4", fp4),
        ("moe_experts", moe),
        ("fused_experts", moe),
        ("moe_experts_fp8", moe),
    ):
        assert list(inspect.signature(getattr(module, op)).parameters) == list(OPS[op].signature.parameters)


@pytest.mark.parametrize(
    "request_, expected",
    [
        (Request(OPS["rms_norm"], "cuda", torch.bfloat16, gpu=H200), "less time on Hopper"),
        (Request(OPS["rms_norm"], "cuda", torch.bfloat16, gpu=GPUS["b200"]), None),
        (Request(OPS["rms_norm"], "cpu", torch.bfloat16), "needs a CUDA device"),
        (Request(OPS["rms_norm"], "cuda", torch.bfloat16, gpu=H200.without("flashinfer")), "flashinfer cannot be imp"),
        (Request(OPS["rms_norm"], "cuda", torch.float32, gpu=H200), "takes bfloat16 and float16, not float32"),
        (Request(OPS["rms_norm"], "cuda", torch.bfloat16, True, gpu=H200), "reduction order"),
        (Request(OPS["rms_norm"], "cuda", torch.bfloat16, gpu=replace(H200, capability=(7, 5))), "has 7.5"),
        (Request(OPS["paged_attention"], "cuda", torch.float16, gpu=GPUS["l4"]), None),
        (Request(OPS["paged_attention"], "cuda", torch.bfloat16, False, torch.float8_e4m3fn, gpu=H200), "scale for"),
        (Request(OPS["linear_fp8"], "cuda", torch.bfloat16, gpu=H200), None),
        (Request(OPS["gated_mlp_fp8"], "cuda", torch.bfloat16, gpu=GPUS["l4"]), "Hopper and Blackwell"),
        (Request(OPS["linear_fp8"], "cuda", torch.bfloat16, gpu=GPUS["a100"]), "does not know FP8"),
        (Request(OPS["latent_attention"], "cuda", torch.bfloat16, gpu=H200), "takes compute capability 10"),
        (Request(OPS["latent_attention"], "cuda", torch.bfloat16, gpu=GPUS["b200"]), None),
        (Request(OPS["fused_linear_nvfp4"], "cuda", torch.bfloat16, gpu=GPUS["b200"]), None),
        (Request(OPS["fused_experts"], "cuda", torch.bfloat16, gpu=H200), None),
        (Request(OPS["moe_experts"], "cuda", torch.float16, gpu=GPUS["rtx-blackwell"]), None),
        (Request(OPS["moe_experts"], "cuda", torch.bfloat16, gpu=GPUS["a100"]), "Hopper and Blackwell"),
        (Request(OPS["moe_experts_fp8"], "cuda", torch.bfloat16, gpu=H200), None),
        (Request(OPS["moe_experts_fp8"], "cuda", torch.float16, gpu=H200), "take bfloat16"),
        (Request(OPS["moe_experts_fp8"], "cuda", torch.bfloat16, gpu=GPUS["gb200"]), "blocks are made for Hopper"),
    ],
)
def test_what_is_served(request_: Request, expected: str | None) -> None:
    """Where it is preferred; where it does not serve, the reason is told. By itself it goes behind Triton."""
    assert choose(replace(request_, batch_invariant=False)).kernel.provider != "flashinfer"
    request_ = replace(request_, prefer="flashinfer")
    choice = choose(request_) if request_.device == "cpu" or not request_.batch_invariant else None
    if choice is None:
        from skyline.kernels.flashinfer import supports

        why_not = supports(request_)
    else:
        assert (choice.kernel.provider == "flashinfer") == (expected is None)
        why_not = dict(choice.rejected).get("flashinfer")
    assert (why_not is None) if expected is None else expected in (why_not or "")


@pytest.mark.parametrize("op", ["linear_fp8", "fused_linear_fp8", "gated_mlp_fp8"])
def test_products_count_more_than_one_launch(op: str) -> None:
    """Rows are quantized before they are multiplied, whoever does it."""
    of = {kernel.provider: kernel.launches for kernel in candidates(op)}
    assert of["flashinfer"] is not None and of["flashinfer"] is of["triton"]


def test_pages_of_a_step() -> None:
    """Contexts of 1, 6 and 8 tokens in blocks of 4."""
    pytest.importorskip("flashinfer")
    from skyline.kernels.flashinfer import step

    batch = make_batch([0, 3, 0], [1, 3, 8])
    tables = torch.tensor([[7, 0, 0], [5, 2, 0], [9, 4, 0]], dtype=torch.int32)
    pages = step.pages(batch, tables, 4)
    assert [part.tolist() for part in pages] == [[0, 1, 4, 12], [0, 1, 3, 5], [7, 5, 2, 9, 4], [1, 2, 4]]
    assert all(part.dtype == torch.int32 for part in pages)


def test_one_plan_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers, and anew in the next step."""
    pytest.importorskip("flashinfer")
    from skyline.kernels.flashinfer import step

    plans: list[dict[str, Any]] = []

    class Wrapper:
        def __init__(self, **arguments: Any) -> None: ...

        def plan(self, **arguments: Any) -> None:
            plans.append(arguments)

    monkeypatch.setattr(step.flashinfer, "BatchPrefillWithPagedKVCacheWrapper", Wrapper)
    monkeypatch.setattr(step, "_wrappers", {})
    monkeypatch.setattr(step, "_WORKSPACE", 16)
    tables = torch.zeros((1, 2), dtype=torch.int32)
    other = SHAPE._replace(window=128)
    for batch in (make_batch([0], [5]), make_batch([5], [3])):
        layers = [step.of(batch).wrapper(shape, tables, "auto") for shape in (SHAPE, other, SHAPE, other)]
        assert layers[0] is layers[2] and layers[1] is layers[3] and layers[0] is not layers[1]
    assert [plan["window_left"] for plan in plans] == [-1, 127, -1, 127]
    assert [plan["qo_indptr"].tolist() for plan in plans] == [[0, 5], [0, 5], [0, 3], [0, 3]]


@pytest.mark.parametrize(
    "changes, decodes, capability, expected",
    [
        ({}, True, (9, 0), False),  # Triton's is the faster
        ({}, True, (8, 0), False),  # XQA begins with Hopper
        ({}, True, (10, 0), True),
        ({}, False, (8, 0), True),
        ({"head_dim": 96}, False, (9, 0), False),
        ({"block_size": 4}, True, (10, 0), False),
        ({"window": 128}, False, (9, 0), False),
        ({"window": 128}, True, (10, 0), False),
        ({"softcap": 30.0}, False, (9, 0), True),
        ({"softcap": 30.0}, False, (10, 0), False),
        ({"softcap": 30.0}, True, (10, 0), False),
        ({"heads": 64}, True, (10, 0), False),
    ],
)
def test_shapes_that_go_on_to_triton(
    changes: dict[str, Any], decodes: bool, capability: tuple[int, int], expected: bool
) -> None:
    pytest.importorskip("flashinfer")
    from skyline.kernels.flashinfer.attention import serves

    assert serves(SHAPE._replace(**changes), decodes, capability) == expected


@pytest.mark.parametrize("chunk", [1, 3, 5, 12])
@pytest.mark.parametrize("blocks", [None, True])
def test_rows_of_up_go_before_those_of_gate(chunk: int, blocks: bool | None) -> None:
    """Whatever rows are written at a time: across halves, and across experts."""
    experts, half, k = 3, 128 if blocks else 4, 256 if blocks else 6
    layout = layouts.UP_FIRST_BLOCKS if blocks else layouts.UP_FIRST
    generator = torch.Generator().manual_seed(0)
    stored: Any
    if blocks:
        parts = [fp8_case_weight(2 * half, k, True, generator) for _ in range(experts)]
        values = torch.cat([part.values.view(torch.uint8) for part in parts])
        scales = torch.cat([part.scales.repeat_interleave(128, 0) for part in parts])
        stored = Fp8Rows(values.view(torch.float8_e4m3fn), scales)
        wanted = torch.stack([part.dequantize() for part in parts])
        chunk *= 37
    else:
        stored = torch.randn((experts * 2 * half, k), generator=generator)
        wanted = stored.view(experts, 2 * half, k)
    target = layout.allocate((experts, 2 * half, k), torch.float32)
    for first in range(0, len(stored.values) if blocks else len(stored), chunk):
        rows = Fp8Rows(*(part[first : first + chunk] for part in stored)) if blocks else stored[first : first + chunk]
        layout.write(target, first, rows)
    found = target.weight.dequantize() if blocks else target.weight
    assert torch.equal(found, torch.cat([wanted[:, half:], wanted[:, :half]], 1))
    turned = target.turned()
    assert torch.equal(turned.dequantize() if blocks else turned, wanted)
    assert target.shape == (experts, 2 * half, k) and target.nbytes >= wanted.numel()


def test_blocks_that_hold_rows_of_both_stay_as_they_are() -> None:
    weight, choose_layout = torch.empty((2, 2 * 192, 256), device="meta"), layouts.up_first_fp8(0)
    for format, wanted in (
        (IntegerFormat(8, 128, fp8=True), FP8_BLOCKS),
        (IntegerFormat(8, fp8=True), FP8_ROWS),
    ):
        set_integers(weight, format)
        assert choose_layout((weight,)) is wanted
    even = torch.empty((2, 2 * 256, 256), device="meta")
    set_integers(even, IntegerFormat(8, 128, fp8=True))
    assert choose_layout((even,)) is layouts.UP_FIRST_BLOCKS


@pytest.mark.parametrize("rows, groups", [(1, 4), (40, 8), (130, 24), (300, 4)])
def test_scales_are_swizzled_as_documented(rows: int, groups: int) -> None:
    """cuBLAS: tiles of 128 x 4 by rows of tiles; within one, outer = row % 128 and inner = group % 4 are at
    (outer % 32) * 16 + (outer / 32) * 4 + inner."""
    places = layouts.swizzled_places(torch.arange(rows), groups)
    for row in range(0, rows, 7):
        for group in range(groups):
            tile = row // 128 * (groups // 4) + group // 4
            outer = row % 128
            assert places[row, group] == tile * 512 + outer % 32 * 16 + outer // 32 * 4 + group % 4
    assert len(places.unique()) == rows * groups and int(places.max()) < layouts.swizzled_size(rows, groups)


def test_fp4_has_its_scales_twice() -> None:
    plain = fp4_case_weight(150, 200, 16, torch.Generator().manual_seed(0))
    target = layouts.SWIZZLED_FP4.allocate((150, 200), torch.bfloat16)
    for first in range(0, 150, 64):
        layouts.SWIZZLED_FP4.write(target, first, plain.rows_at(torch.arange(first, min(first + 64, 150))))
    groups = layouts.groups_of(target.words)
    found = target.swizzled[layouts.swizzled_places(torch.arange(150), groups)]
    assert groups == 16 and torch.equal(found[:, :13], plain.scales.view(torch.uint8)) and not found[:, 13:].any()
    assert torch.equal(target.words.dequantize(), plain.dequantize())
    torch.testing.assert_close(target.row_scales, plain.row_scales)
