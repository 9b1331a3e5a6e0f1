"""Oracles of the ops on weights of four-bit floats."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from skyline.ops import Fp4Weight

from .oracles import ORACLES, oracle, silu_mul


@oracle
def linear_fp4(x: Tensor, weight: Fp4Weight, bias: Tensor | None = None, activated: bool = False) -> list[Tensor]:
    product = x.double().numpy() @ _dequantized(weight).T
    result = torch.from_numpy(product if bias is None else product + bias.double().numpy())
    return silu_mul(result) if activated else [result]


@oracle
def moe_experts_fp4(
    x: Tensor, gate_up: Fp4Weight, down: Fp4Weight, weights: Tensor, ids: Tensor, residual: Tensor | None = None
) -> list[Tensor]:
    result = torch.zeros(x.shape, dtype=torch.float64) if residual is None else residual.double().clone()
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token].tolist(), ids[token].tolist(), strict=True):
            (hidden,) = linear_fp4(x[token : token + 1], _of(gate_up, expert), None, True)
            (added,) = linear_fp4(hidden.to(x.dtype), _of(down, expert))
            result[token] += weight * added[0]
    return [result]


@oracle
def moe_experts_clamped_fp4(
    x: Tensor,
    gate_up: Fp4Weight,
    gate_up_bias: Tensor,
    down: Fp4Weight,
    down_bias: Tensor,
    weights: Tensor,
    ids: Tensor,
    alpha: float,
    limit: float,
) -> list[Tensor]:
    plain = [
        torch.stack([torch.from_numpy(_dequantized(_of(weight, expert))) for expert in range(weight.shape[0])])
        for weight in (gate_up, down)
    ]
    return ORACLES["moe_experts_clamped"](x, plain[0], gate_up_bias, plain[1], down_bias, weights, ids, alpha, limit)


def _of(weight: Fp4Weight, expert: int) -> Fp4Weight:
    return Fp4Weight(weight.values[expert], weight.scales[expert], weight.row_scales[expert], weight.group)


def _dequantized(weight: Fp4Weight) -> np.ndarray:
    """Each code decoded as the formats' specifications define their numbers."""
    numbers = np.array([_float(code, 2, 1, 1) for code in range(16)])
    if weight.group == 32:
        factors = np.array([2.0 ** (code - 127) for code in range(256)])
    else:
        factors = np.array([_float(code, 4, 3, 7) for code in range(256)])
    column = np.arange(weight.shape[1])
    codes = weight.values.numpy()[:, column // 2] >> (column % 2 * 4) & 15
    scales = factors[weight.scales.view(torch.uint8).numpy()[:, column // weight.group]]
    return numbers[codes] * scales * weight.row_scales.double().numpy()[:, None]


def _float(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    return sign * (2.0 ** (exponent - bias) * (1 + mantissa) if exponent else 2.0 ** (1 - bias) * mantissa)


@oracle
def linear_nvfp4(x: Tensor, weight: Fp4Weight, bias: Tensor | None = None, activated: bool = False) -> list[Tensor]:
    return linear_fp4(x if x.shape[0] <= 32 else _in_nvfp4(x), weight, bias, activated)


@oracle
def moe_experts_nvfp4(
    x: Tensor, gate_up: Fp4Weight, down: Fp4Weight, weights: Tensor, ids: Tensor, residual: Tensor | None = None
) -> list[Tensor]:
    if x.shape[0] <= 32:
        return moe_experts_fp4(x, gate_up, down, weights, ids, residual)
    result, rows = torch.zeros(x.shape, dtype=torch.float64), _in_nvfp4(x)
    for expert in ids.unique().tolist():
        tokens, choices = (ids == expert).nonzero(as_tuple=True)
        (hidden,) = linear_fp4(rows[tokens], _of(gate_up, expert), None, True)
        (added,) = linear_fp4(_in_nvfp4(hidden.to(x.dtype)), _of(down, expert))
        result[tokens] += weights[tokens, choices].double()[:, None] * added
    return [result if residual is None else result + residual.double()]


def _in_nvfp4(x: Tensor) -> Tensor:
    """What rows become: a row's scale is a power of two, a group's the nearest E4M3, elements the nearest E2M1."""
    values, result = x.double().numpy(), np.zeros(tuple(x.shape))
    for row, line in enumerate(values):
        largest = np.abs(line).max()
        unit = 2.0 ** (np.floor(np.log2(largest)) - 10) if largest else 0.0
        for first in range(0, len(line) if unit else 0, 16):
            group = line[first : first + 16] / unit
            scale = _nearest(np.abs(group).max() / 6, _E4M3)
            if scale:
                elements = [np.sign(value) * _nearest(abs(value) / scale, _E2M1) for value in group]
                result[row, first : first + 16] = np.array(elements) * scale * unit
    return torch.from_numpy(result)


def _nearest(value: float, numbers: np.ndarray) -> float:
    """Of numbers in ascending order; of two as near the one at an even place, whose last bit is 0."""
    away = np.abs(numbers - value)
    return float(numbers[min(np.flatnonzero(away == away.min()), key=lambda place: place % 2)])


_E2M1 = np.array([_float(code, 2, 1, 1) for code in range(8)])
_E4M3 = np.array([_float(code, 4, 3, 7) for code in range(127)])
