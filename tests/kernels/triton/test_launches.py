"""The declared number of launches of a call against what its kernel launches: in Triton, and in torch beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skyline.kernels import Kernel
from skyline.kernels.gpu import GPUS
from skyline.kernels.triton import latent_tactics, norms
from skyline.kernels.triton.layouts import pack_fp4, pack_int4
from skyline.ops import (
    AttentionBatch,
    Fp4Weight,
    Fp8Weight,
    IndexCache,
    KVCache,
    LatentCache,
    LayerCache,
    Op,
    QuantizedWeight,
    StateCache,
)
from skyline.ops.formats import IntegerFormat, set_integers
from skyline.ops.fp8 import quantize_fp8
from skyline.quantization import quantize_int4
from tests.kernels.triton.test_ops import KERNELS

H200 = GPUS["h200"]  # which kernels take a CPU for
BFLOAT16 = torch.bfloat16

CPU, BLOCK = torch.device("cpu"), 16
KERNEL = {op.name: kernel for op, kernel in KERNELS}

# In torch, what makes no kernel: memory, and views of it.
_FREE = ("empty", "view", "slice", "select.int", "transpose", "permute", "expand", "split", "unsqueeze", "squeeze",
         "as_strided", "alias", "detach", "t.")  # fmt: skip


class _Launches(TorchDispatchMode):
    """Counts what torch computes; `compiled` is of Triton's kernels, which do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled = 0
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).removeprefix("aten.").lstrip("_")
        if not name.startswith(_FREE) and not name.startswith("new_empty"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> _Launches:
    counter = _Launches()

    def run(*_: object, **__: object) -> None:
        counter.compiled += 1

    monkeypatch.setattr(type(norms._norm_kernel), "run", run)
    return counter


def _check(op: str, arguments: tuple[Any, ...], launches: _Launches, label: str) -> int:
    kernel = KERNEL[op]
    declared = 1 if kernel.launches is None else kernel.launches(H200, *arguments)
    for _ in range(2):  # the first call may fill what later ones find
        launches.compiled, launches.found = 0, []
        with launches, torch.no_grad():
            kernel.run(*arguments)
    assert declared == launches.compiled + len(launches.found), (
        f"{op} {label}: {declared} launches are declared; found {launches.compiled} and {launches.found}"
    )
    return declared


@pytest.mark.parametrize("op,kernel", KERNELS, ids=[op.name for op, _ in KERNELS])
def test_calls_launch_what_is_declared(op: Op, kernel: Kernel, launches: _Launches) -> None:
    for case in op.cases(BFLOAT16, torch.Generator().manual_seed(3)):
        arguments = tuple(map(_packed, case.args))
        if all(argument.shape[0] for argument in arguments if isinstance(argument, torch.Tensor)):
            _check(op.name, arguments, launches, case.label)


def _packed(argument: Any) -> Any:
    """As layouts hold it."""
    if isinstance(argument, QuantizedWeight) and argument.group:
        return pack_int4(argument)
    return pack_fp4(argument) if isinstance(argument, Fp4Weight) else argument


def _rows(rows: int, columns: int) -> Tensor:
    return torch.zeros((rows, columns), dtype=BFLOAT16)


def _batch(starts: list[int], lengths: list[int], cache: LayerCache) -> AttentionBatch:
    """Of blocks there is one: nothing is written or read."""
    blocks = -(-max(start + length for start, length in zip(starts, lengths, strict=True)) // BLOCK)
    cache.allocate(1, BLOCK, CPU)
    tables = [[0] * blocks] * len(starts)
    return AttentionBatch.build(tables, starts, lengths, BLOCK, CPU)


def _linear(op: str, weight: Any, x: Tensor, gated: bool) -> tuple[Any, ...]:
    """A norm before, and behind either silu_mul or a residual."""
    return op, (x, weight, None, gated, torch.ones(x.shape[1]), 1e-6, None if gated else _rows(x.shape[0], 256))


def _experts(tokens: int) -> tuple[Any, ...]:
    ids = torch.zeros((tokens, 4), dtype=torch.int64)
    weights = torch.zeros((tokens, 4))
    return "moe_experts", (_rows(tokens, 32), _rows(8 * 48, 32).view(8, 48, 32), _rows(8 * 32, 24).view(8, 32, 24),
                           weights, ids)  # fmt: skip


def _experts_fp8(tokens: int, blocks: bool) -> tuple[Any, ...]:
    x, _, _, weights, ids = _experts(tokens)[1]
    gate_up, down = (quantize_fp8(torch.ones(shape)) for shape in ((8, 48, 32), (8, 32, 24)))
    if blocks:  # that hold rows of gate and of up
        gate_up = Fp8Weight(gate_up.values, torch.ones((8, 1, 1)))
    return "moe_experts_fp8", (x, gate_up, down, weights, ids)


def _experts_fp4(tokens: int) -> tuple[Any, ...]:
    x, _, _, weights, ids = _experts(tokens)[1]
    one = Fp4Weight(*(torch.zeros((8, 48, k), dtype=torch.uint8) for k in (16, 1)), torch.ones((8, 48)), 32)
    other = Fp4Weight(*(torch.zeros((8, 32, k), dtype=torch.uint8) for k in (12, 1)), torch.ones((8, 32)), 32)
    one, other = _packed(one), _packed(other)
    return "moe_experts_clamped_fp4", (x, one, _rows(8, 48), other, _rows(8, 32), weights, ids, 1.702, 7.0)


def _attention(starts: list[int], lengths: list[int]) -> tuple[Any, ...]:
    cache = KVCache(2, 16, BFLOAT16)
    return "paged_attention", (_rows(sum(lengths), 64), cache, _batch(starts, lengths, cache), 0.25)


def _turned(starts: list[int], lengths: list[int]) -> tuple[Any, ...]:
    """Two KV heads and four of queries."""
    cache, tokens = KVCache(2, 16, BFLOAT16), sum(lengths)
    turn = (None, None, 0.0, torch.zeros(tokens, dtype=torch.int64), torch.zeros((100_000, 16)))
    return "rope_attention", (_rows(tokens, 128), *turn, cache, _batch(starts, lengths, cache), 0.25)


def _latent(starts: list[int], lengths: list[int], listed: int | None = None) -> tuple[Any, ...]:
    """In DeepSeek's sizes, but 16 heads."""
    cache, tokens = LatentCache(512, 64, BFLOAT16), sum(lengths)
    chosen = None if listed is None else torch.zeros((tokens, listed), dtype=torch.int32)
    batch = _batch(starts, lengths, cache)
    return "latent_attention", (_rows(tokens, 16 * 192), _rows(16 * 256, 512), cache, batch, 16, 128, 0.1, chosen)


def _index(starts: list[int], lengths: list[int]) -> tuple[Any, ...]:
    cache, tokens = IndexCache(16, BFLOAT16), sum(lengths)
    positions, table = torch.zeros(tokens, dtype=torch.int64), torch.zeros((1, 8))
    batch = _batch(starts, lengths, cache)
    return "index_topk", (_rows(tokens, 4 * 16), _rows(tokens, 16), _rows(tokens, 4), positions, table, cache, batch,
                          8, 0.5)  # fmt: skip


def _delta(starts: list[int], lengths: list[int]) -> tuple[Any, ...]:
    cache, tokens = StateCache(3, 4 * 16 + 4 * 16, 4, 16, 16, BFLOAT16), sum(lengths)
    batch = _batch(starts, lengths, cache)
    return "gated_delta_rule", (_rows(tokens, cache.channels), _rows(tokens, 4), _rows(tokens, 4), torch.zeros(4),
                                torch.zeros(4), 2, cache, batch)  # fmt: skip


WEIGHT = torch.zeros((256, 128), dtype=BFLOAT16)
FP8 = quantize_fp8(torch.ones((256, 128)))
INT4 = pack_int4(quantize_int4(torch.ones((256, 128))))
FP8_BLOCKS = Fp8Weight(FP8.values, torch.ones((2, 1)))


def _mlp(weight: Fp8Weight, rows: int) -> tuple[Any, ...]:
    """gate_up and down of 128 columns each, norm and residual."""
    down = Fp8Weight(weight.values[:128], weight.scales[: 1 if weight.blocks else 128])
    return "gated_mlp_fp8", (_rows(rows, 128), weight, down, torch.ones(128, dtype=BFLOAT16), 0.1, _rows(rows, 128))


def _attention_linear(weight: Fp8Weight, starts: list[int], longest: int = 1) -> tuple[Any, ...]:
    """One head of 128 numbers; of the first request `longest` tokens."""
    cache, lengths = KVCache(1, 128, BFLOAT16), [longest, *[1] * (len(starts) - 1)]
    batch, rows = _batch(starts, lengths, cache), sum(lengths)
    return "attention_linear_fp8", (_rows(rows, 128), weight, cache, batch, 0.1, None, None, None, None,
                                    _rows(rows, 256))  # fmt: skip


@pytest.mark.parametrize(
    "case,expected",
    [
        (_linear("fused_linear", WEIGHT, _rows(1, 128), True), 1),
        (_linear("fused_linear", WEIGHT, _rows(16, 128), True), 3),
        (_linear("fused_linear", WEIGHT, _rows(16, 128), False), 2),
        (_linear("fused_linear_int4", INT4, _rows(1, 128), True), 1),
        (_linear("fused_linear_int4", INT4, _rows(2, 128), True), 2),
        (_linear("fused_linear_int4", INT4, _rows(32, 128), True), 2),
        (_linear("fused_linear_int4", INT4, _rows(33, 128), False), 3),
        (_linear("fused_linear_int4", INT4, _rows(33, 128), True), 4),
        (_linear("fused_linear_fp8", FP8, _rows(1, 128), True), 1),
        (_linear("fused_linear_fp8", FP8, _rows(2, 128), True), 2),
        (_linear("fused_linear_fp8", FP8, _rows(64, 128), False), 2),
        (_linear("fused_linear_fp8", FP8, _rows(65, 128), False), 3),
        (_linear("fused_linear_fp8", FP8_BLOCKS, _rows(65, 128), True), 3),
        (_mlp(FP8, 1), 2),
        (_mlp(FP8, 64), 4),
        (_mlp(FP8, 65), 5),  # the residual is added by a launch of its own
        (_mlp(FP8_BLOCKS, 65), 5),
        (_attention_linear(FP8, [99]), 2),
        (_attention_linear(FP8, [99] * 2), 3),
        (_attention_linear(FP8_BLOCKS, [99] * 2), 2),
        (_attention_linear(FP8_BLOCKS, [99] * 2, 70), 4),
        (_experts(1), 2),
        (_experts(32), 3),
        (_experts(33), 4),
        (_experts_fp8(1, False), 2),
        (_experts_fp8(1, True), 5),
        (_experts_fp8(32, True), 5),
        (_experts_fp8(33, False), 6),
        (_experts_fp4(1), 2),
        (_experts_fp4(32), 3),
        (_experts_fp4(33), 4),
        (_attention([99], [1]), 1),
        (_attention([99_999] * 64, [1] * 64), 1),
        (_attention([0], [300]), 1),
        (_attention([0, 99], [300, 1]), 2),
        (_turned([99_999] * 66, [1] * 66), 1),  # a program for each of 132 processors
        (_turned([99_999] * 67, [1] * 67), 2),
        (_turned([0], [300]), 2),
        (_turned([0, 99], [300, 1]), 3),
        (_latent([4095], [1]), 4),
        (_latent([4095] * 132, [1] * 132), 3),
        (_latent([0], [64]), 3),
        (_latent([0], [65]), 3),
        (_latent([4095, 0], [1, 300]), 4 + 3),
        (_latent([4095], [1], 2048), 4),
        (_index([9999], [1]), 4),
        (_index([9999] * 64, [1] * 64), 4),
        (_index([0], [9999]), 1 + 3 * 3),
        (_delta([99] * 3, [1] * 3), 1),
        (_delta([0], [300]), 2),
        (_delta([0, 99], [300, 1]), 3),
    ],
    ids=lambda value: f"{value[0]} {value[1][0].shape[0]}" if isinstance(value, tuple) else "",
)
def test_where_the_number_changes(case: tuple[str, tuple[Any, ...]], expected: int, launches: _Launches) -> None:
    assert _check(*case, launches, "") == expected


def test_latent_attention_in_parts(launches: _Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_tactics, "EXPANDED_BYTES", 10 * 300 * 256 * 2)  # ten of sixteen heads at a time
    assert _check(*_latent([0], [300]), launches, "") == 1 + 2 * 2
    monkeypatch.setattr(latent_tactics, "TOKENS_AT_ONCE", 132)
    assert _check(*_latent([4000], [133], 2048), launches, "") == 3 + 4


def test_weights_that_are_still_to_be_read() -> None:
    """What stands for them when a model is explained is the parameter, with what it will become."""
    count = KERNEL["fused_linear_fp8"].launches
    assert count is not None
    for columns, format, expected in (
        (128, IntegerFormat(8, fp8=True), 1),
        (128, IntegerFormat(8, 128, fp8=True), 1),
        (126, IntegerFormat(8, fp8=True), 2),  # not in words of four
    ):
        weight = torch.empty((256, columns), device="meta")
        set_integers(weight, format)
        assert count(H200, _rows(1, columns), weight, None, True) == expected
    assert count(H200, _rows(1, 128), torch.empty((192, 128)), None, True) == 1
    weight = torch.empty((192, 128), device="meta")
    set_integers(weight, IntegerFormat(8, 128, fp8=True))
    assert count(H200, _rows(1, 128), weight, None, True) == 2, "a block of scales holds rows of gate and of up"


@pytest.mark.parametrize(
    "format,dtype,expected",
    [
        (IntegerFormat(4, 32), BFLOAT16, 3),  # widened, gate and up, and the activation
        (IntegerFormat(4, 128, True), torch.float16, 3),
        (IntegerFormat(4, 32), torch.float32, 1),
        (IntegerFormat(4, 32, fp4=True), BFLOAT16, 3),
        (IntegerFormat(4, 16, fp4=True), BFLOAT16, 1),
        (IntegerFormat(4, 32, fp4=True), torch.float16, 1),
    ],
)
def test_four_bits_that_are_still_to_be_read(format: IntegerFormat, dtype: torch.dtype, expected: int) -> None:
    count = KERNEL["linear_fp4" if format.fp4 else "linear_int4_weight_only"].launches
    assert count is not None
    weight = torch.empty((256, 128), device="meta")
    set_integers(weight, format)
    assert count(H200, torch.zeros((33, 128), dtype=dtype), weight, None, True) == expected
    assert count(H200, torch.zeros((32, 128), dtype=dtype), weight, None, True) == 1
