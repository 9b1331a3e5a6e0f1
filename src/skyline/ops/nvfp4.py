"""Linear layers and experts whose weights and activations are both NVFP4, for matrix units that multiply FP4.

That is what checkpoints mean that were quantized "W4A4". They also hold a scale for each layer's activations, found on
a few texts; here each row has one of its own instead, a power of two, which no text can exceed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.ops import dense
from skyline.ops.contract import Case, Op, Tolerance, randn, register
from skyline.ops.fp4 import NVFP4_GROUP, Fp4Weight, fp4_case_weight, linear_fp4, linear_fp4_cost
from skyline.ops.fp4_moe import experts_fp4_cost, fp4_case_experts, fp4_expert, moe_experts_fp4
from skyline.ops.moe import with_residual

# Most rows, of experts tokens, that are multiplied as they are: so few are bound by reading the weight.
FEW_ROWS = 32

_UP = 2.0**10  # a row's largest number is from this to twice it times the row's scale; 6 * 448 is what there is
# Between two neighbours of E2M1, and whether that itself becomes the upper one, whose last bit is 0.
_MIDDLES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def quantize_nvfp4(x: Tensor) -> Fp4Weight:
    """Rows x [T, K] in NVFP4, each with the power of two for its scale that puts its largest number below 2^11.

    A group's scale is a sixth of its largest number, rounded to E4M3. Numbers are divided by it as it was rounded and
    go to the nearest of E2M1, of two that are as near to the even one. What is not rounded is exact, so that whoever
    does this gets the same bits. A row with NaN or infinity is NaN when it is dequantized.
    """
    wide = F.pad(x.float(), (0, -x.shape[1] % NVFP4_GROUP))
    power = (wide.abs().amax(1).view(torch.int32) & 0x7F800000).view(torch.float32)
    raised = _UP / power
    raised = torch.where(raised.isfinite(), raised, 0.0)
    groups = (wide * raised[:, None]).view(x.shape[0], -1, NVFP4_GROUP)
    scales = (groups.abs().amax(2) / 6).to(torch.float8_e4m3fn)
    numbers = (groups / scales.float().unsqueeze(2)).flatten(1)
    size = numbers.abs()
    codes = (numbers < 0).to(torch.uint8) * 8
    for middle, reached in _MIDDLES:
        codes += size >= middle if reached else size > middle
    codes = torch.where(size.isfinite(), codes, 0)  # a group whose scale is 0
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return Fp4Weight(packed[:, : -(-x.shape[1] // 2)], scales, power / _UP, NVFP4_GROUP)


def _product(x: Tensor, weight: Fp4Weight, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    """`linear_fp4` of rows x that are quantized."""
    rows = quantize_nvfp4(x).dequantize()[:, : x.shape[1]]
    return linear_fp4.reference(rows, weight, bias, silu_mul).to(x.dtype)  # type: ignore[no-any-return]


def _linear_nvfp4(x: Tensor, weight: Fp4Weight, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    """`linear_fp4` of an NVFP4 weight [N, K], where more than FEW_ROWS rows x [T, K] are quantized to NVFP4 as well."""
    few = x.shape[0] <= FEW_ROWS
    y: Tensor = (linear_fp4.reference if few else _product)(x, weight, bias, silu_mul)
    return y


def _moe_experts_nvfp4(
    x: Tensor, gate_up: Fp4Weight, down: Fp4Weight, weights: Tensor, ids: Tensor, residual: Tensor | None = None
) -> Tensor:
    """`moe_experts_fp4`, where of more than FEW_ROWS tokens the inputs of both products are quantized to NVFP4."""
    if x.shape[0] <= FEW_ROWS:
        few: Tensor = moe_experts_fp4.reference(x, gate_up, down, weights, ids, residual)
        return few
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(ids).tolist():
        tokens, choices = (ids == expert).nonzero(as_tuple=True)
        hidden = _product(x.index_select(0, tokens), fp4_expert(gate_up, expert), None, True)
        result = _product(hidden, fp4_expert(down, expert))
        output.index_add_(0, tokens, result.float() * weights[tokens, choices].unsqueeze(1))
    y = output.to(x.dtype)
    return y if residual is None else y + residual


def _linear_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for rows in (1, 17, FEW_ROWS + 1, 150):
        for n, k in ((40, 64), (34, 72), (258, 400)):
            x, weight = randn((rows, k), dtype, generator), fp4_case_weight(n, k, NVFP4_GROUP, generator)
            name = f"T={rows} N={n} K={k}"
            yield Case(name, (x, weight))
            yield Case(f"{name} bias", (x, weight, randn((n,), dtype, generator)))
            yield Case(f"{name} silu_mul", (x, weight, None, True))


def _experts_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for hidden, inner in ((64, 48), (136, 24), (272, 80)):
        yield from fp4_case_experts(hidden, inner, NVFP4_GROUP, (1, 19, FEW_ROWS + 1, 90), dtype, generator)


# A kernel may round a norm, or a hidden value, to the other side. Where that moves an element to E2M1's next number,
# a result moves by up to a third of the group's largest number times a weight.
NVFP4_TOLERANCE: Tolerance = {dtype: (3e-2, 0.12) for dtype in (torch.float32, torch.bfloat16, torch.float16)}

linear_nvfp4 = register(
    Op(
        "linear_nvfp4",
        _linear_nvfp4,
        cost=linear_fp4_cost,
        cases=_linear_cases,
        meta=dense.linear_meta,
        tolerance=NVFP4_TOLERANCE,
        rounds=True,
    )
)
moe_experts_nvfp4 = register(
    Op(
        "moe_experts_nvfp4",
        _moe_experts_nvfp4,
        cost=experts_fp4_cost,
        cases=with_residual(_experts_cases),
        meta=lambda x, *_: x.new_empty(x.shape),
        tolerance=NVFP4_TOLERANCE,
        rounds=True,
    )
)
