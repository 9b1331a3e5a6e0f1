"""How FlashInfer's kernels are tried out. It needs a GPU: stand-ins compute what its documentation says."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from skyline.kernels import candidates
from skyline.kernels import triton as provider
from skyline.kernels.flashinfer import layouts, trials, tuning
from skyline.kernels.triton import norms
from skyline.ops import OPS, KVCache
from skyline.ops.attention import make_batch
from skyline.ops.contract import randn
from skyline.ops.fp4 import fp4_case_weight, unpack_e2m1
from skyline.ops.fp8 import BLOCK, Fp8Rows, Fp8Weight, fp8_case_weight

PACKAGE = "skyline.kernels.flashinfer"
NAME = f"{PACKAGE}.linear"
MODULES = [f"{PACKAGE}.{part}" for part in ("attention", "dense", "fp4", "linear", "moe", "step")]


PLACES = {
    "flashinfer": ("rmsnorm", "silu_and_mul", "autotune"),
    "flashinfer.gemm": ("fp8_blockscale_gemm_sm90", "gemm_fp8_nt_groupwise", "mm_fp4"),
    "flashinfer.decode": ("trtllm_batch_decode_with_kv_cache",),
    "flashinfer.fused_moe": ("cutlass_fused_moe",),
}


class Library:
    """Some of its functions. wrong: products read scales as if transposed; broken: all of them raise."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.wrong = self.broken = False

    def rmsnorm(self, *, input: Tensor, weight: Tensor, eps: float) -> Tensor:
        self.calls.append("rmsnorm")
        return self._unless_broken(OPS["rms_norm"].reference(input, weight, eps))

    def silu_and_mul(self, *, input: Tensor) -> Tensor:
        self.calls.append("silu_and_mul")
        return self._unless_broken(OPS["silu_mul"].reference(input))

    def trtllm_batch_decode_with_kv_cache(self, *, query: Tensor, **options: Any) -> Tensor:
        self.calls.append("decode")
        return self._unless_broken(torch.zeros_like(query))  # wrong in any case

    def _unless_broken(self, result: Tensor) -> Tensor:
        if self.broken:
            raise RuntimeError("ninja: build stopped")
        return result

    def _product(self, x: Tensor, weight: Tensor, scales: Tensor, out: Tensor) -> Tensor:
        wide = Fp8Weight(weight, scales.t().reshape(scales.shape) if self.wrong else scales).dequantize()
        return self._unless_broken(out.copy_(x @ wide.t()))

    def fp8_blockscale_gemm_sm90(self, *, input: Tensor, weight: Tensor, weight_scale: Tensor, out: Tensor) -> Tensor:
        self.calls.append("sm90")
        groups = input.float().unflatten(1, (-1, BLOCK))
        scales = groups.abs().amax(-1, keepdim=True) / 448
        x = (groups / scales).to(torch.float8_e4m3fn).float() * scales
        return self._product(x.flatten(1), weight, weight_scale, out)

    def gemm_fp8_nt_groupwise(
        self,
        *,
        a: Tensor,
        b: Tensor,
        a_scale: Tensor,
        b_scale: Tensor,
        scale_major_mode: str,
        out: Tensor,
        backend: str,
    ) -> Tensor:
        self.calls.append("groupwise")
        assert a.shape[0] % 4 == 0 and scale_major_mode == "K" and backend == "cutlass"
        assert out.shape == (a.shape[0], b.shape[0])
        return self._product(a.float() * a_scale.repeat_interleave(BLOCK, 1), b, b_scale, out)

    def mm_fp4(
        self,
        *,
        a: Tensor,
        b: Tensor,
        a_descale: Tensor,
        b_descale: Tensor,
        alpha: Tensor,
        out_dtype: torch.dtype,
        out: Tensor,
        block_size: int,
    ) -> Tensor:
        """Scales in tiles of 128 x 4."""
        self.calls.append("fp4")
        assert out_dtype == out.dtype == torch.bfloat16 and alpha.tolist() == [1.0] and block_size == 16
        groups = a_descale.shape[1]
        assert a_descale.shape[0] % 128 == b_descale.shape[1] % 128 == 0 and 8 * groups == a.shape[1] == b.shape[0]

        def numbers(packed: Tensor, swizzled: Tensor) -> Tensor:
            scales = swizzled.flatten()[layouts.swizzled_places(torch.arange(len(packed)), groups)]
            if self.wrong:
                scales = swizzled.flatten()[: len(packed) * groups].view(len(packed), groups)
            return unpack_e2m1(packed) * scales.view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)

        wide = numbers(a, a_descale) @ numbers(b.t(), b_descale.t().contiguous()).t()
        return self._unless_broken(out.copy_(wide))

    def cutlass_fused_moe(
        self,
        *,
        input: Tensor,
        token_selected_experts: Tensor,
        token_final_scales: Tensor,
        fc1_expert_weights: Tensor,
        fc2_expert_weights: Tensor,
        output_dtype: torch.dtype,
        quant_scales: list[Tensor] | None,
        output: Tensor,
        use_deepseek_fp8_block_scale: bool,
        use_fused_finalize: bool,
    ) -> list[Tensor]:
        """The second half of the first matrices is gate's."""
        self.calls.append("mixture")
        assert token_selected_experts.dtype == torch.int32 and token_final_scales.dtype == torch.float32
        assert output_dtype == output.dtype and (quant_scales is not None) == use_deepseek_fp8_block_scale
        assert not use_fused_finalize
        up, gate = fc1_expert_weights.view(torch.uint8).chunk(2, 1)
        first = torch.cat([up, gate] if self.wrong else [gate, up], 1).view(fc1_expert_weights.dtype)
        arguments: list[Any] = [input, first, fc2_expert_weights, token_final_scales, token_selected_experts.long()]
        if quant_scales is None:
            return [self._unless_broken(output.copy_(OPS["moe_experts"].reference(*arguments)))]
        scales = torch.cat(quant_scales[0].chunk(2, 1)[::-1], 1)
        arguments[1:3] = Fp8Weight(first, scales), Fp8Weight(fc2_expert_weights, quant_scales[1])
        return [self._unless_broken(output.copy_(OPS["moe_experts_fp8"].reference(*arguments)))]

    @contextmanager
    def autotune(self, *, tune_mode: bool, cache: str) -> Iterator[None]:
        assert tune_mode
        self.calls.append("tune")
        yield
        Path(cache).write_text("{}")

    def get(self) -> Library:
        return self

    def load_configs(self, path: str) -> bool:
        self.calls.append(Path(path).read_text())
        return not self.wrong


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    found = Library()
    modules = {name: ModuleType(name) for name in PLACES}
    tuner = ModuleType("flashinfer.autotuner")
    tuner.AutoTuner = found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer.autotuner", tuner)
    for place, names in PLACES.items():
        for name in names:
            setattr(modules[place], name, getattr(found, name))
        monkeypatch.setitem(sys.modules, place, modules[place])
    for part in ("gemm", "decode", "fused_moe"):
        setattr(modules["flashinfer"], part, modules[f"flashinfer.{part}"])
    # Those that are imported already hold the real library, and shall again afterwards.
    ours = import_module(PACKAGE)
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    kept = {name.rpartition(".")[2]: vars(ours).pop(name.rpartition(".")[2], None) for name in MODULES}
    monkeypatch.setattr(trials, "_reasons", {})
    yield found
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module
    for part, module in kept.items():
        vars(ours).pop(part, None)
        if module is not None:
            setattr(ours, part, module)


def _module(monkeypatch: pytest.MonkeyPatch, major: int) -> Any:
    module = import_module(NAME)
    monkeypatch.setattr(module, "capability", lambda device: (major, 0))
    return module


def _inputs(n: int, k: int, seed: int = 0) -> tuple[Tensor, Fp8Weight, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((70, k), generator=generator).bfloat16()
    norm = (1 + 0.1 * torch.randn(k, generator=generator)).bfloat16()
    return x, fp8_case_weight(n, k, True, generator), norm


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.allclose(found.float(), expected.float(), rtol=0.1, atol=0.25)


@pytest.mark.parametrize("major, used", [(9, "sm90"), (10, "groupwise"), (12, "groupwise")])
def test_linear(major: int, used: str, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call is a trial, the next goes to the library alone; both with all that may be around the product."""
    module = _module(monkeypatch, major)
    x, weight, norm = _inputs(256, 384)
    arguments = (x, weight, torch.full((256,), 0.5).bfloat16(), False, norm, 1e-6, torch.ones((70, 256)).bfloat16())
    expected = OPS["fused_linear_fp8"].reference(*arguments)
    ours = module.triton.product_fp8
    assert _close(module.fused_linear_fp8(*arguments), expected) and library.calls == [used]
    monkeypatch.setattr(module.triton, "product_fp8", None)
    assert _close(module.fused_linear_fp8(*arguments), expected) and library.calls == [used] * 2
    gated = OPS["linear_fp8"].reference(x, weight, None, True)
    assert _close(module.linear_fp8(x, weight, None, True), gated) and library.calls == [used] * 3
    monkeypatch.setattr(module.triton, "product_fp8", ours)
    assert module.linear_fp8(x[:8], weight).shape == (8, 256) and library.calls == [used] * 3  # few rows are ours


@pytest.mark.parametrize("major", [9, 10])
def test_gated_mlp(major: int, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module(monkeypatch, major)
    (x, gate_up, norm), (_, down, _) = _inputs(512, 128), _inputs(128, 256, 1)
    arguments = (x, gate_up, down, norm, 1e-6, x)
    expected = OPS["gated_mlp_fp8"].reference(*arguments)
    for _ in range(2):
        assert _close(module.gated_mlp_fp8(*arguments), expected)
    assert len(library.calls) == 4


@pytest.mark.parametrize("fault, said", [("wrong", "off by"), ("broken", "RuntimeError: ninja: build stopped")])
def test_what_fails_its_trial_is_never_used(
    fault: str, said: str, library: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = _module(monkeypatch, 9)
    x, weight, _ = _inputs(256, 384)
    setattr(library, fault, True)
    expected = OPS["linear_fp8"].reference(x, weight)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert _close(module.linear_fp8(x, weight), expected)
    assert library.calls == ["sm90"]
    assert [said in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("broken", [False, True])
def test_norm_and_activation(broken: bool, library: Library) -> None:
    dense = import_module(f"{PACKAGE}.dense")
    library.broken = broken
    x, _, norm = _inputs(128, 384)
    for _ in range(2):
        assert _close(dense.rms_norm(x, norm, 1e-6), OPS["rms_norm"].reference(x, norm, 1e-6))
        assert _close(dense.silu_mul(x), OPS["silu_mul"].reference(x))
    assert library.calls == ["rmsnorm", "silu_and_mul"] * (1 if broken else 2)


@pytest.mark.parametrize("broken", [False, True])
def test_attention(broken: bool, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in gives zeros, or raises: either way the answer is right, and it is asked once."""
    attention = import_module(f"{PACKAGE}.attention")
    monkeypatch.setattr(attention, "capability", lambda device: (10, 0))
    monkeypatch.setattr(attention.step, "_WORKSPACE", 16)
    library.broken = broken
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(2, 64, torch.bfloat16)
    cache.allocate(9, 16, torch.device("cpu"))
    for part in cache.tensors:
        part.copy_(torch.randn(part.shape, generator=generator))
    q = torch.randn((2, 4 * 64), generator=generator).bfloat16()
    batch = make_batch([20, 5], [1, 1], 16)
    expected = OPS["paged_attention"].reference(q, cache, batch, 0.125)
    for _ in range(2):
        assert _close(attention.paged_attention(q, cache, batch, 0.125), expected)
    assert library.calls == ["decode"]


def test_a_plan_waits_for_the_copy_of_the_last(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written where the device, which may be a step behind, reads the last one."""
    step = import_module(f"{PACKAGE}.step")
    order: list[str] = []

    class Recorder:
        def __init__(self, **arguments: Any) -> None: ...

        def __getattr__(self, name: str) -> Any:
            return lambda **arguments: order.append(name)

    monkeypatch.setattr(step.flashinfer, "BatchPrefillWithPagedKVCacheWrapper", Recorder, raising=False)
    monkeypatch.setattr(step.torch.cuda, "Event", Recorder)
    monkeypatch.setattr(step, "_wrappers", {})
    monkeypatch.setattr(step, "_copied", {})
    monkeypatch.setattr(step, "workspace", lambda *_: None)
    monkeypatch.setattr(step, "pages", lambda *_: None)
    monkeypatch.setattr(step.calls, "prefill_plan", lambda *_: {})
    shape = step.Shape(4, 2, 64, 16, torch.bfloat16, 0.125, None, None, 0)
    tables = SimpleNamespace(device=torch.device("cpu"), is_cuda=True)
    for starts in ([0], [5]):
        mine = step.of(make_batch(starts, [5]))
        for _ in range(2):  # layers
            mine.wrapper(shape, tables, "auto")
    assert order == ["plan", "record", "synchronize", "plan", "record"]


def test_zeros_are_no_trial() -> None:
    calls: list[str] = []

    def foreign() -> Tensor:
        calls.append("")
        return torch.zeros(3)

    for ours in (torch.zeros(3), torch.zeros(3), torch.ones(3)):
        assert trials.checked(("zeros",), foreign, lambda ours=ours: ours) is ours  # type: ignore[misc]
    assert len(calls) == 1


@pytest.mark.parametrize(
    "n, k, rows, blocks, major, expected",
    [
        (256, 384, 70, True, 9, True),
        (192, 384, 70, True, 9, True),
        (192, 384, 70, True, 10, False),
        (256, 320, 70, True, 9, False),
        (256, 384, 64, True, 9, False),
        (256, 384, 70, False, 9, False),
        (256, 384, 70, True, 8, False),
    ],
)
def test_what_is_served(n: int, k: int, rows: int, blocks: bool, major: int, expected: bool, library: Library) -> None:
    weight = fp8_case_weight(n, k, blocks, torch.Generator().manual_seed(0))
    assert import_module(NAME).serves(torch.zeros((rows, k), dtype=torch.bfloat16), weight, major) == expected


@pytest.mark.parametrize("wrong", [False, True])
def test_products_of_fp4(wrong: bool, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of rows, bias, activation and residual come behind the library's product."""
    module = import_module(f"{PACKAGE}.fp4")
    generator = torch.Generator().manual_seed(0)
    x, norm = randn((150, 200), torch.bfloat16, generator), 1 + randn((200,), torch.bfloat16, generator, 0.1)
    plain = fp4_case_weight(128, 200, 16, generator)
    weight = layouts.SWIZZLED_FP4.allocate((128, 200), torch.bfloat16)
    layouts.SWIZZLED_FP4.write(weight, 0, plain)
    bias, residual = randn((128,), torch.bfloat16, generator), randn((150, 128), torch.bfloat16, generator)
    library.wrong = wrong
    op = OPS["fused_linear_nvfp4"]
    for arguments in (
        (bias, False, norm, 1e-6, residual),
        (bias, True, None, 0.0, None),
        (None, False, None, 0.0, None),
    ):
        expected = op.reference(x, plain, *arguments)
        torch.testing.assert_close(module.fused_linear_nvfp4(x, weight, *arguments), expected, rtol=3e-2, atol=3e-2)
    assert library.calls == ["fp4"] * (1 if wrong else 3)
    for rows, n in ((32, 128), (150, 120)):  # few of them, or of the weight's not a multiple
        part = layouts.SWIZZLED_FP4.allocate((n, 200), torch.bfloat16)
        layouts.SWIZZLED_FP4.write(part, 0, plain.rows_at(torch.arange(n)))
        expected = OPS["linear_nvfp4"].reference(x[:rows], plain.rows_at(torch.arange(n)))
        torch.testing.assert_close(module.linear_nvfp4(x[:rows], part), expected, rtol=3e-2, atol=3e-2)
    assert library.calls == ["fp4"] * (1 if wrong else 3)


@pytest.mark.parametrize("fault", ["", "wrong", "broken"])
@pytest.mark.parametrize("blocks", [False, True])
def test_mixtures(blocks: bool, fault: str, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many rows the library's, of few Triton's, both on weights with up first."""
    module = import_module(f"{PACKAGE}.moe")
    monkeypatch.setattr(module, "capability", lambda device: (9, 0))
    experts, half, h, generator = 3, 128 if blocks else 16, 256 if blocks else 32, torch.Generator().manual_seed(0)
    op = OPS["moe_experts_fp8" if blocks else "fused_experts"]
    gate_up: Any
    down: Any
    if blocks:
        gate_up, down = (_stacked(n, k, experts, generator) for n, k in ((2 * half, h), (h, half)))
        ours = layouts.UP_FIRST_BLOCKS.allocate(gate_up.shape, torch.bfloat16)
        rows = Fp8Rows(gate_up.values.flatten(0, 1), gate_up.scales.repeat_interleave(BLOCK, 1).flatten(0, 1))
        layouts.UP_FIRST_BLOCKS.write(ours, 0, rows)
    else:
        gate_up = randn((experts, 2 * half, h), torch.bfloat16, generator, h**-0.5)
        down = randn((experts, h, half), torch.bfloat16, generator, half**-0.5)
        ours = layouts.UP_FIRST.allocate(gate_up.shape, torch.bfloat16)
        layouts.UP_FIRST.write(ours, 0, gate_up.flatten(0, 1))
    if fault:
        setattr(library, fault, True)
    for tokens in (30, 24, 1, 5):
        x, residual = randn((tokens, h), torch.bfloat16, generator), randn((tokens, h), torch.bfloat16, generator)
        weights = torch.rand((tokens, 2), generator=generator)
        ids = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)])
        expected = op.reference(x, gate_up, down, weights, ids, residual)
        got = getattr(module, op.name)(x, ours, down, weights, ids, residual)
        rtol, atol = (0.1, 0.25) if blocks else (2e-2, 3e-2)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
    assert library.calls == ["mixture"] * (1 if fault else 2)


def test_where_nothing_compiles_references_take_weights_as_they_were(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gate first, and without scales that lie twice."""

    def does_not_fit(*_: object, **__: object) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(provider, "FALLS_BACK", True)
    monkeypatch.setattr(type(norms._norm_kernel), "run", does_not_fit)
    generator = torch.Generator().manual_seed(0)
    gate_up, down = randn((3, 32, 64), torch.bfloat16, generator), randn((3, 64, 16), torch.bfloat16, generator)
    ours = layouts.UP_FIRST.allocate(gate_up.shape, torch.bfloat16)
    layouts.UP_FIRST.write(ours, 0, gate_up.flatten(0, 1))
    plain = fp4_case_weight(64, 96, 16, generator)
    twice = layouts.SWIZZLED_FP4.allocate((64, 96), torch.bfloat16)
    layouts.SWIZZLED_FP4.write(twice, 0, plain)
    choices = torch.rand((4, 2), generator=generator), torch.tensor([[0, 2]] * 4)
    for op, weights, given, rest in (
        ("moe_experts", (gate_up, down), (ours, down), choices),
        ("linear_nvfp4", (plain,), (twice,), ()),
    ):
        x = randn((4, gate_up.shape[2] if op == "moe_experts" else 96), torch.bfloat16, generator)
        kernel = next(kernel for kernel in candidates(op) if kernel.provider == "flashinfer")
        assert torch.equal(kernel.run(x, *given, *rest), OPS[op].reference(x, *weights, *rest))
    assert not library.calls


def _stacked(n: int, k: int, experts: int, generator: torch.Generator) -> Fp8Weight:
    parts = [fp8_case_weight(n, k, True, generator) for _ in range(experts)]
    values = torch.stack([part.values.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    return Fp8Weight(values, torch.stack([part.scales for part in parts]))


def test_mixtures_that_are_served() -> None:
    module = pytest.importorskip("skyline.kernels.flashinfer.moe", reason="needs FlashInfer")
    for tokens, shape, blocks, major, wanted in (
        (1024, (128, 1536, 2048), False, 9, True),
        (255, (128, 1536, 2048), False, 9, False),  # of experts that have fewer than 16 rows
        (1024, (128, 1536, 2048), True, 10, False),
        (1024, (128, 1472, 2048), True, 9, False),
        (1024, (128, 1472, 2048), False, 12, True),
        (1024, (128, 1536, 2048), False, 8, False),
    ):
        assert module.serves(tokens, 8, shape, blocks, major) == wanted, (tokens, shape, blocks, major)


def test_what_the_autotuner_found_is_read(library: Library, tmp_path: Path) -> None:
    file = tmp_path / "tactics.json"
    assert not tuning.read(file) and library.calls == []
    with tuning.tuning(file):
        library.calls.append("a step")
    assert tuning.read(file) and library.calls == ["tune", "a step", "{}"]
    library.wrong = True  # of another version
    assert not tuning.read(file)
