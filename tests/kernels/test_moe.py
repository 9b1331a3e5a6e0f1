"""The compiled experts of a mixture: what the ops' small cases do not show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skyline.graph import capture, lower, quantize_linears, run_passes
from skyline.kernels import Kernel, Layout, Request, choose, finish_weight
from skyline.kernels.cpu import native
from skyline.kernels.cpu.packed import PackedWeight
from skyline.kernels.fp4_layout import FP4
from skyline.ops import OPS, Fp4Weight, Fp8Weight, QuantizedWeight
from skyline.ops.contract import randn
from skyline.ops.fp4 import MXFP4_GROUP
from skyline.ops.fp8 import quantize_fp8
from skyline.ops.quantized_moe import stacked
from skyline.quantization import SCHEMES, quantize_int4, quantize_int8
from tests.models.harness import CPU, PagedRunner, load_ours, save_tiny

pytestmark = pytest.mark.skipif(native.available() == "none", reason="no compiled kernels here")

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
EVERY = [
    ("moe_experts", FLOAT32),
    ("moe_experts", BFLOAT16),
    ("moe_experts_int8", FLOAT32),
    ("moe_experts_int8", BFLOAT16),
    ("moe_experts_int8_weight_only", BFLOAT16),
    ("moe_experts_int4", FLOAT32),
    ("moe_experts_int4", BFLOAT16),
    ("moe_experts_fp4", BFLOAT16),
    ("moe_experts_fp8", BFLOAT16),
]
_every_op = pytest.mark.parametrize(
    "op,dtype", EVERY, ids=[f"{op}-{str(dtype).removeprefix('torch.')}" for op, dtype in EVERY]
)
# Tokens, experts, choices, hidden, intermediate: whole panels, parts of one, and more rows than a panel takes at once.
SHAPES = [(1, 32, 4, 256, 128), (7, 5, 1, 40, 18), (33, 60, 8, 100, 50), (300, 3, 2, 72, 33), (1, 1, 1, 1, 1)]


def kernel_of(op: str, instruction_set: str, dtype: torch.dtype) -> Kernel:
    kernel = choose(Request(OPS[op], "cpu", dtype, batch_invariant=True, isa=instruction_set)).kernel
    assert kernel.provider == native.PROVIDER
    return kernel


def inputs(op: str, dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> list[Any]:
    """Arguments of the op, the weights as its reference takes them."""
    tokens, experts, top_k, hidden, inner = shape
    if op == "moe_experts_fp4":  # two values a byte
        hidden, inner = hidden + hidden % 2, inner + inner % 2
    g = torch.Generator().manual_seed(seed)
    x = randn((tokens, hidden), dtype, g)
    gate_up = randn((experts, 2 * inner, hidden), dtype, g, hidden**-0.5)
    down = randn((experts, hidden, inner), dtype, g, inner**-0.5)
    weights = torch.rand((tokens, top_k), generator=g)
    ids = torch.rand((tokens, experts), generator=g).argsort(dim=-1)[:, :top_k].contiguous()
    return [x, quantized(op, gate_up), quantized(op, down), weights, ids]


def quantized(op: str, weight: Tensor) -> Tensor | QuantizedWeight | Fp8Weight | Fp4Weight:
    if op == "moe_experts":
        return weight
    if op == "moe_experts_fp8":
        return quantize_fp8(weight)
    if op == "moe_experts_fp4":
        fp4 = FP4[MXFP4_GROUP].allocate(tuple(weight.shape), weight.dtype)
        FP4[MXFP4_GROUP].write(fp4, 0, weight.flatten(0, 1))
        return fp4
    return stacked([quantize_int4(part, 64) if "int4" in op else quantize_int8(part) for part in weight])


def packed(kernel: Kernel, arguments: list[Any]) -> list[Any]:
    """With weights as the loader makes them."""
    result = list(arguments)
    for index, layout in kernel.layouts.items():
        assert callable(layout)
        result[index] = _load(layout(tuple(arguments)), arguments[index])
    return result


def _load(layout: Layout, weight: Tensor | QuantizedWeight | Fp8Weight | Fp4Weight) -> PackedWeight:
    dense = weight if isinstance(weight, Tensor) else weight.dequantize()
    target = layout.allocate(tuple(dense.shape), dense.dtype)
    rows = dense.reshape(-1, dense.shape[-1])
    for first in range(0, len(rows), 7):  # pieces that end inside of experts
        layout.write(target, first, rows[first : first + 7])
    assert finish_weight(layout, target)
    assert isinstance(target, PackedWeight)
    return target


def wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def check(op: str, dtype: torch.dtype, run: Callable[..., Tensor], given: list[Any], arguments: list[Any]) -> None:
    expected = OPS[op].reference(*map(wide, arguments))
    rtol, atol = OPS[op].tolerance[dtype]
    if op in ("moe_experts_int8", "moe_experts_int4"):
        atol = 4e-2  # a hidden value between two integers may become either
    torch.testing.assert_close(run(*given).float(), expected, rtol=rtol, atol=atol)


@_every_op
def test_equals_the_reference(op: str, dtype: torch.dtype, instruction_set: str) -> None:
    kernel = kernel_of(op, instruction_set, dtype)
    for shape in SHAPES:
        arguments = inputs(op, dtype, shape)
        # Quantizing what is quantized would not give the same integers again; the op's cases cover those weights.
        given = packed(kernel, arguments) if op == "moe_experts" else arguments
        check(op, dtype, kernel.run, given, arguments)


@_every_op
def test_one_expert_for_all_and_strided_rows(op: str, dtype: torch.dtype, instruction_set: str) -> None:
    kernel = kernel_of(op, instruction_set, dtype)
    x, gate_up, down, weights, ids = inputs(op, dtype, (600, 4, 1, 72, 40))
    ids.fill_(2)
    around = torch.cat((x + 1, x, x), dim=1)
    arguments = [around[:, 72:144], gate_up, down, weights, ids]
    check(op, dtype, kernel.run, packed(kernel, arguments) if op == "moe_experts" else arguments, arguments)


@pytest.mark.parametrize("threads", [1, 2])
@_every_op
def test_a_token_does_not_depend_on_the_others(op: str, dtype: torch.dtype, instruction_set: str, threads: int) -> None:
    """Bitwise: all tokens at once on some threads, and in random parts on one."""
    kernel = kernel_of(op, instruction_set, dtype)
    for shape in ((70, 9, 3, 100, 50), (300, 3, 2, 128, 64)):
        x, gate_up, down, weights, ids = packed(kernel, inputs(op, dtype, shape))
        native.library().pool_start(torch.full((threads,), -1, dtype=torch.int32).numpy())
        try:
            together = kernel.run(x, gate_up, down, weights, ids)
        finally:
            native.stop_threads()
        rows: list[int] = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1)).tolist()
        parts = [rows[:1], rows[1:2], rows[2:7], rows[7:30], rows[30:]]
        for part in parts:
            apart = kernel.run(x[part], gate_up, down, weights[part], ids[part])
            assert torch.equal(apart, together[part]), (shape, len(part))


@_every_op
def test_a_nan_stays_in_its_row(op: str, dtype: torch.dtype, instruction_set: str) -> None:
    kernel = kernel_of(op, instruction_set, dtype)
    arguments = packed(kernel, inputs(op, dtype, (20, 4, 2, 72, 40)))
    clean = kernel.run(*arguments)
    arguments[0][11, 5] = float("nan")
    dirty = kernel.run(*arguments)
    others = [row for row in range(20) if row != 11]
    assert bool(dirty[11].isnan().all()) and torch.equal(dirty[others], clean[others])


@_every_op
def test_no_tokens_and_no_choices(op: str, dtype: torch.dtype) -> None:
    kernel = kernel_of(op, native.available(), dtype)
    x, gate_up, down, weights, ids = packed(kernel, inputs(op, dtype, (3, 4, 2, 40, 20)))
    assert kernel.run(x[:0], gate_up, down, weights[:0], ids[:0]).shape == (0, 40)
    assert torch.equal(kernel.run(x, gate_up, down, weights[:, :0], ids[:, :0]), torch.zeros_like(x))


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
@_every_op
def test_an_id_of_no_expert_is_refused(op: str, dtype: torch.dtype, bad: int) -> None:
    kernel = kernel_of(op, native.available(), dtype)
    arguments = packed(kernel, inputs(op, dtype, (3, 4, 2, 40, 20)))
    arguments[4][2, 1] = bad
    with pytest.raises(ValueError, match="an id is none of the experts'"):
        kernel.run(*arguments)


def test_misfits_are_refused() -> None:
    kernel = kernel_of("moe_experts", native.available(), FLOAT32)
    into = kernel.into
    assert into is not None
    x, gate_up, down, weights, ids = packed(kernel, inputs("moe_experts", FLOAT32, (3, 4, 2, 40, 20)))
    out = torch.empty_like(x)
    other = packed(kernel, inputs("moe_experts", FLOAT32, (3, 5, 2, 40, 20)))
    half = kernel_of("moe_experts", native.available(), BFLOAT16)
    halves = packed(half, inputs("moe_experts", BFLOAT16, (3, 4, 2, 40, 20)))
    for arguments, message in (
        ((x[:, :39], gate_up, down, weights, ids), "shapes do not match"),
        ((x, gate_up, down, weights[:, :1], ids), "shapes do not match"),
        ((x, gate_up, down, weights, ids[:2]), "shapes do not match"),
        ((x, down, down, weights, ids), "shapes do not match"),
        ((x, gate_up, down, weights, ids.int()), "int64 ids"),
        ((x, gate_up, down, weights.double(), ids), "float32 weights"),
        ((x.bfloat16(), gate_up, down, weights, ids), "of one dtype"),
        ((x, gate_up, other[2], weights, ids), "two weights do not match"),
        ((x, gate_up, gate_up, weights, ids), "two weights do not match"),
        ((x, gate_up, halves[2], weights, ids), "do not go together"),
    ):
        with pytest.raises(ValueError, match=message):
            into(out, *arguments)


class _Replayed(nn.Module):
    """The program in the model's place, for the harness."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, instruction_set: str, scheme: str | None = None) -> None:
        super().__init__()
        self.model = model
        graph = capture(model)
        if scheme is not None:
            quantize_linears(graph, scheme)
        run_passes(graph)
        self.program = lower(graph, model, CPU, dtype, isa=instruction_set)

    def forward(self, *arguments: Any) -> Tensor:
        return self.program(*arguments).clone()  # valid until the next step only


def logits(model: nn.Module) -> Tensor:
    runner = PagedRunner(model)
    parts = runner.step(("a", [1, 2, 3, 4, 5, 6, 7]), ("b", [9, 8, 7]))
    return torch.cat(parts + runner.step(("b", [11]), ("c", list(range(20))), ("a", [12])))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sizes: dict[str, Any] = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    save_tiny(tmp_path, "Qwen3Moe", **sizes)
    return tmp_path


def test_a_model_computes_the_same(folder: Path, instruction_set: str) -> None:
    replayed = _Replayed(load_ours(folder), FLOAT32, instruction_set)
    assert replayed.program.choices["moe_experts"].kernel.provider == native.PROVIDER
    torch.testing.assert_close(logits(replayed), logits(load_ours(folder)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_model_is_close(folder: Path, scheme: str) -> None:
    exact = logits(load_ours(folder))
    replayed = _Replayed(load_ours(folder, BFLOAT16), BFLOAT16, native.available(), scheme)
    op = SCHEMES[scheme].experts
    assert replayed.program.choices[op.name].kernel.provider == native.PROVIDER
    # Rows of 32 values, and a router that may choose other experts: what is wrong outright is further off.
    bounds = {"int4": 0.5, "fp8": 0.3, "mxfp4": 0.8}
    assert (logits(replayed).float() - exact).std() < bounds.get(scheme, 0.15) * exact.std()
