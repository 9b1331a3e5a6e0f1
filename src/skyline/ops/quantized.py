"""Linear ops on quantized weights, in the signature of `linear`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skyline.ops import dense
from skyline.ops.contract import DEFAULT_TOLERANCE, Case, Cost, Op, randn, register
from skyline.ops.formats import DEFAULT_GROUP, IntegerFormat, integers_of


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight of small integers and what they stand for; a kernel may keep the same numbers in another order.

    int8: values [.., N, K] in -128..127 and scales [.., N] float32, one a row; `group` is None.
    int4: values [.., N, K] and scales [.., N, ceil(K / group)] float16, one for each `group` neighbours of a row (the
    last group may be shorter). Without `zeros` values are -8..7; with them, shaped like the scales, 0..15.

    An element is (value - zero) * scale. Scales may be negative.
    """

    values: Tensor  # int8, also for int4
    scales: Tensor
    zeros: Tensor | None = None
    group: int | None = None

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """As a kernel packs it: an int4 counts half a byte."""
        rows, k = self.values.numel() // max(1, self.shape[-1]), self.shape[-1]
        return int8_bytes(rows, k) if self.group is None else int4_bytes(rows, k, self.group, self.zeros is not None)

    def dequantize(self) -> Tensor:
        """float32, of `shape`."""
        if self.group is None:
            return self.values.float() * self.scales.unsqueeze(-1)
        levels = self.values.float()
        if self.zeros is not None:
            levels = levels - self._spread(self.zeros)
        return levels * self._spread(self.scales)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """A view of rows start to stop of a matrix [N, K]."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return QuantizedWeight(self.values[start:stop], self.scales[start:stop], zeros, self.group)

    def _spread(self, per_group: Tensor) -> Tensor:
        assert self.group is not None
        return per_group.float().repeat_interleave(self.group, dim=-1)[..., : self.shape[-1]]


class ByteRows(NamedTuple):
    """Rows of a weight on their way into memory: level * (factor * scale) - offset * minimum, in float32, as in GGML.

    levels int8 [n, K]. In groups of 32: factors, and offsets or None, float16 [n, ceil(K / 32)], and scales and minima
    are 1. In blocks of 256: [n, K / 256], scales int8 and minima uint8 [n, K / group].
    """

    levels: Tensor
    factors: Tensor
    offsets: Tensor | None = None
    scales: Tensor | None = None
    minima: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.levels.shape

    @property
    def group(self) -> int:
        return 32 if self.scales is None else self.shape[1] // self.scales.shape[1]

    def rows(self, start: int, stop: int) -> ByteRows:
        return ByteRows(*(None if part is None else part[start:stop] for part in self))  # type: ignore[arg-type]

    def dequantize(self) -> Tensor:
        """float32, of `shape`."""
        values = self.levels.float() * self._spread(self.factors, self.scales)
        return values if self.offsets is None else values - self._spread(self.offsets, self.minima)

    def _spread(self, factors: Tensor, by: Tensor | None) -> Tensor:
        if by is None:
            return factors.float().repeat_interleave(32, 1)[:, : self.shape[1]]
        of_groups = factors.float().repeat_interleave(by.shape[1] // factors.shape[1], 1) * by.float()
        return of_groups.repeat_interleave(self.group, 1)


def int8_bytes(n: int, k: int) -> int:
    return n * (k + 4)


def int4_bytes(n: int, k: int, group: int = DEFAULT_GROUP, zeros: bool = False) -> int:
    return n * (-(-k // 2) + -(-k // group) * (4 if zeros else 2))


# Rows of a weight that a reference widens at a time, which bounds its temporaries. Not a number that a batch decides.
_ROW_BLOCK = 4096

_Product = Callable[[Tensor, QuantizedWeight], Tensor]


def _apply(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, silu_mul: bool, dtype: torch.dtype, product: _Product
) -> Tensor:
    blocks = [
        product(x, weight.rows(start, start + _ROW_BLOCK)) for start in range(0, max(1, weight.shape[0]), _ROW_BLOCK)
    ]
    y = torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]
    if bias is not None:
        y = y + bias.float()
    activated: Tensor = dense.silu_mul.reference(y) if silu_mul else y
    return activated.to(dtype)


def _int8_weight_only_product(x: Tensor, weight: QuantizedWeight) -> Tensor:
    return (x @ weight.values.float().T) * weight.scales


def _linear_int8_weight_only(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, silu_mul: bool = False
) -> Tensor:
    """`linear` with a weight of int8, one scale a row: x [T, K], weight [N, K], bias [N] -> [T, N] in x's dtype.

    In float32: x times the integers, then the scale on the sum, the bias, and silu_mul, rounded once at the end.
    """
    return _apply(x.float(), weight, bias, silu_mul, x.dtype, _int8_weight_only_product)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> integers in -127..127 [T, K] float64 and scales [T, 1] float32, from each row's largest magnitude.

    All in float32: round_half_even(x * (127 / largest)), and largest / 127. A row without a finite reciprocal (all
    zeros, or as good as that) gives zeros; one with a NaN or an infinity has such a scale, and all its results are NaN.
    """
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    inverse = torch.div(torch.full_like(largest, 127), largest)  # 127 / largest would round twice, by a reciprocal
    levels = (wide * torch.where(inverse.isfinite(), inverse, 0.0)).round().nan_to_num(0.0)
    return levels.double(), largest / 127


def _linear_int8(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    """`linear` in int8: x [T, K] is quantized as in `quantize_rows`, weight [N, K] of int8 -> [T, N] in x's dtype.

    The sum of products of integers is exact; float32(sum) * (scale of x's row * scale of weight's row) and all that
    follows are float32, rounded once at the end. (LLM.int8's vector-wise quantization, arXiv:2208.07339.)
    """
    levels, x_scales = quantize_rows(x)

    def product(levels: Tensor, weight: QuantizedWeight) -> Tensor:
        # float64 holds every such integer, so the order of the sum makes no difference.
        return (levels @ weight.values.double().T).float() * (x_scales * weight.scales)

    return _apply(levels, weight, bias, silu_mul, x.dtype, product)


def quantize_groups(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """`quantize_rows`, but each `group` neighbours of a row by themselves: [T, K] and scales [T, ceil(K / group)]."""
    rows, k = x.shape
    groups = -(-k // group)
    padded = torch.nn.functional.pad(x.float(), (0, groups * group - k))
    levels, scales = quantize_rows(padded.view(rows * groups, group))
    return levels.view(rows, groups * group)[:, :k], scales.view(rows, groups)


def _linear_int4(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    """`linear` with a weight of int4 in groups: x [T, K], weight [N, K], bias [N] -> [T, N] in x's dtype.

    Each group of a row of x is quantized to int8 as in `quantize_groups`. The sum of a group's products of integers,
    of which (sum of x's) * zero is taken off, is float32; it is multiplied by the scale of x's group and by that of
    the weight's, and added up in the order of the groups. Rounded once at the end. (What llama.cpp does for Q4_0.)
    """
    assert weight.group is not None
    group = weight.group
    levels, x_scales = quantize_groups(x, group)

    def product(levels: Tensor, weight: QuantizedWeight) -> Tensor:
        y = x_scales.new_zeros((levels.shape[0], weight.shape[0]))
        for index in range(weight.scales.shape[1]):
            columns = slice(index * group, (index + 1) * group)
            values = weight.values[:, columns].double()
            if weight.zeros is not None:
                values = values - weight.zeros[:, index : index + 1].double()
            # float64 holds every such integer, so the order of the sum makes no difference.
            sums = (levels[:, columns] @ values.T).float()
            y += sums * x_scales[:, index : index + 1] * weight.scales[:, index].float()
        return y

    return _apply(levels, weight, bias, silu_mul, x.dtype, product)


def _linear_int4_weight_only(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, silu_mul: bool = False
) -> Tensor:
    """`linear` with a weight of int4 in groups, of which x is not quantized: in float32, rounded once at the end."""
    return _apply(x.float(), weight, bias, silu_mul, x.dtype, lambda x, weight: x @ weight.dequantize().T)


class _Described(NamedTuple):
    shape: tuple[int, ...]
    nbytes: int


def weight_bytes(weight: Any, bits: int) -> int:
    """Of a weight [.., N, K]. A plain tensor stands for one yet to be quantized, and counts with its bytes then."""
    if not isinstance(weight, Tensor):
        return int(weight.nbytes)
    rows, k = weight.numel() // weight.shape[-1], weight.shape[-1]
    if bits == 8:
        return int8_bytes(rows, k)
    format = integers_of(weight) or IntegerFormat(4, DEFAULT_GROUP)
    return int4_bytes(rows, k, format.group or DEFAULT_GROUP, format.zeros)


def _cost(bits: int) -> Callable[..., Cost]:
    def cost(x: Tensor, weight: Any, bias: Tensor | None = None, silu_mul: bool = False) -> Cost:
        n, k = weight.shape
        return dense.linear_cost(x, _Described((n, k), weight_bytes(weight, bits)), bias, silu_mul)

    return cost


# The weights of the cases come out the same when their dequantized values are quantized again (skyline.quantization),
# so that a kernel with a layout of its own can be given them as rows of floats. That takes an extreme value in every
# row or group, and scales whose products with it are exact in float32.


def int8_case_weight(n: int, k: int, generator: torch.Generator) -> QuantizedWeight:
    values = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    values[torch.arange(n), torch.randint(k, (n,), generator=generator)] = 127
    scales = (0.5 + torch.rand((n,), generator=generator)) * k**-0.5 / 73  # 73: the standard deviation of the integers
    return QuantizedWeight(values, scales.half().float())


def int4_case_weight(n: int, k: int, group: int, zeros: bool, generator: torch.Generator) -> QuantizedWeight:
    groups = -(-k // group)
    shape, low = (n, groups), 0 if zeros else -8
    values = torch.randint(low, low + 16, (n, k), generator=generator, dtype=torch.int8)
    for index in range(groups):
        columns = values[:, index * group : (index + 1) * group]
        columns[:, 0] = low
        if zeros:
            columns[:, -1] = 15
    scales = ((0.5 + torch.rand(shape, generator=generator)) * k**-0.5 / 4.6).half()
    if zeros:
        middle = torch.randint(0, 16, shape, generator=generator).half()
        return QuantizedWeight(values, scales, middle, group)
    negative = torch.rand(shape, generator=generator) < 0.5
    return QuantizedWeight(values, torch.where(negative, -scales, scales), None, group)


_SHAPES = ((40, 64), (34, 72), (130, 200))
_ROWS = (1, 3, 17, 33, 70)


def _linear_cases(
    label: str, make: Callable[[int, int], QuantizedWeight], dtype: torch.dtype, generator: torch.Generator
) -> Iterator[Case]:
    for rows in _ROWS:
        for n, k in _SHAPES:
            x, weight, name = randn((rows, k), dtype, generator), make(n, k), f"T={rows} N={n} K={k}{label}"
            yield Case(name, (x, weight))
            yield Case(f"{name} bias", (x, weight, randn((n,), dtype, generator)))
            yield Case(f"{name} silu_mul", (x, weight, None, True))


def _int8_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    yield from _linear_cases("", lambda n, k: int8_case_weight(n, k, generator), dtype, generator)
    weight = int8_case_weight(40, 64, generator)
    x = randn((4, 64), dtype, generator)
    x[1] = 0
    yield Case("a row of zeros", (x, weight, randn((40,), dtype, generator), True))


def _int4_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for group in (32, 64, 128):
        for zeros in (False, True):

            def make(n: int, k: int, group: int = group, zeros: bool = zeros) -> QuantizedWeight:
                return int4_case_weight(n, k, group, zeros, generator)

            yield from _linear_cases(f" group={group} zeros={zeros}", make, dtype, generator)


# Tolerances are those of `linear`, but for one: for float32, the order of additions (linear_int8 has none: its sums are
# exact); for bfloat16, the rounding of the result, and that a kernel of what is of the weight only may round a weight,
# and its scale, to bfloat16 before it multiplies, 2^-9 of each product. Integers themselves are exact in bfloat16.
linear_int8_weight_only = register(
    Op(
        "linear_int8_weight_only",
        _linear_int8_weight_only,
        cost=_cost(8),
        cases=_int8_cases,
        meta=dense.linear_meta,
    )
)
linear_int8 = register(Op("linear_int8", _linear_int8, cost=_cost(8), cases=_int8_cases, meta=dense.linear_meta))
linear_int4 = register(Op("linear_int4", _linear_int4, cost=_cost(4), cases=_int4_cases, meta=dense.linear_meta))
linear_int4_weight_only = register(
    Op(
        "linear_int4_weight_only",
        _linear_int4_weight_only,
        cost=_cost(4),
        cases=_int4_cases,
        meta=dense.linear_meta,
        # Two roundings of a number instead of one, and silu_mul multiplies two sums.
        tolerance={**DEFAULT_TOLERANCE, torch.bfloat16: (2e-2, 6e-2)},
    )
)
