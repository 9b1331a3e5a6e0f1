"""Weights as compressed-tensors stores them: what `skyline quantize` writes, and vLLM and transformers read.

https://github.com/vllm-project/compressed-tensors. Every function takes a weight [N, K] of any float dtype and returns
the tensors that take its place, by the end of their names ("weight" is replaced by them).

Raises ValueError if a value is not finite, or K is not a multiple of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INT4_GROUP = 128
NVFP4_GROUP, MXFP4_GROUP = 16, 32
FP8_MAX, FP4_MAX = 448.0, 6.0
# Half way between the numbers of e2m1, and whether a number that lies there goes up: to the even code.
_FP4_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_FP4_TIES_UP = (False, True, False, True, False, True, False)


def int8(weight: Tensor) -> dict[str, Tensor]:
    """`weight` int8, `weight_scale` [N, 1] float32: largest magnitude of the row / 127."""
    wide = _finite(weight)
    scale = _positive(wide.abs().amax(1, keepdim=True) / 127)
    return {"weight": (wide / scale).round().clamp(-127, 127).to(torch.int8), "weight_scale": scale}


def int4(weight: Tensor) -> dict[str, Tensor]:
    """`weight_packed` [N, K / 8] int32, eight values each, lowest first, `weight_scale` [N, K / 128] bfloat16,
    `weight_shape`: largest magnitude of the group / 7.5, which uses all of -8..7.
    """
    groups = _grouped(_finite(weight), INT4_GROUP)
    scale = _positive((groups.abs().amax(2, keepdim=True) / 7.5).bfloat16())
    levels = (groups / scale.float()).round().clamp(-8, 7).to(torch.int32) + 8
    fields = levels.view(weight.shape[0], -1, 8) << (4 * torch.arange(8, dtype=torch.int32))
    packed = fields[..., 0]
    for index in range(1, 8):
        packed = packed | fields[..., index]
    return {
        "weight_packed": packed,
        "weight_scale": scale.squeeze(2),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def fp8(weight: Tensor) -> dict[str, Tensor]:
    """`weight` float8_e4m3fn, `weight_scale` [N, 1] float32: largest magnitude of the row / 448."""
    wide = _finite(weight)
    scale = _positive(wide.abs().amax(1, keepdim=True) / FP8_MAX)
    return {"weight": (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), "weight_scale": scale}


def nvfp4(weight: Tensor) -> dict[str, Tensor]:
    """`weight_packed` [N, K / 2] uint8, `weight_scale` [N, K / 16] float8_e4m3fn, `weight_global_scale` [1] float32.

    A value is e2m1 * weight_scale / weight_global_scale, and the latter puts the largest scale at 448.
    """
    groups = _grouped(_finite(weight), NVFP4_GROUP)
    whole = _positive(groups.abs().amax()) / (FP8_MAX * FP4_MAX)
    scale = (groups.abs().amax(2, keepdim=True) / FP4_MAX / whole).clamp(max=FP8_MAX).to(torch.float8_e4m3fn)
    step = scale.float() * whole
    codes = _to_fp4(torch.where(step > 0, groups / step, 0.0))
    return {
        "weight_packed": _pairs(codes.flatten(1)),
        "weight_scale": scale.squeeze(2),
        "weight_global_scale": (1 / whole).reshape(1),
    }


def mxfp4(weight: Tensor) -> dict[str, Tensor]:
    """`weight_packed` [N, K / 2] uint8, `weight_scale` [N, K / 32] uint8, an exponent of two plus 127 (E8M0).

    The exponent is that of the group's largest magnitude, less that of e2m1's largest, 4 (OCP Microscaling Formats 1.0,
    section 6.3).
    """
    groups = _grouped(_finite(weight), MXFP4_GROUP)
    largest = groups.abs().amax(2, keepdim=True)
    exponent = torch.frexp(_positive(largest)).exponent - 1 - 2
    exponent = exponent.clamp(-127, 127)
    codes = _to_fp4(torch.ldexp(groups, -exponent))
    return {"weight_packed": _pairs(codes.flatten(1)), "weight_scale": (exponent + 127).squeeze(2).to(torch.uint8)}


def _to_fp4(values: Tensor) -> Tensor:
    """The nearest number of e2m1, beyond 6 the largest, as its code: sign, two bits of exponent, one of mantissa."""
    magnitude = values.abs()
    code = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for bound, up in zip(_FP4_BOUNDS, _FP4_TIES_UP, strict=True):
        code += (magnitude >= bound) if up else (magnitude > bound)
    return code | (values.signbit().to(torch.uint8) << 3)


def _pairs(codes: Tensor) -> Tensor:
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _grouped(wide: Tensor, group: int) -> Tensor:
    if wide.shape[1] % group:
        raise ValueError(f"has {wide.shape[1]} columns, which is not a multiple of the group of {group}")
    return wide.view(wide.shape[0], -1, group)


def _positive(scale: Tensor) -> Tensor:
    """1 in the place of 0, for rows and groups that hold nothing else."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _finite(weight: Tensor) -> Tensor:
    wide = weight.float()
    if not bool(wide.isfinite().all()):
        raise ValueError("holds NaN or infinite values, which cannot be quantized")
    return wide


@dataclass(frozen=True, slots=True)
class Compression:
    """How weights are written, and what config.json says of it. `inputs`: of activations; None leaves them alone."""

    compress: Callable[[Tensor], dict[str, Tensor]]
    format: str
    weights: dict[str, Any]
    inputs: dict[str, Any] | None
    group: int = 1  # K has to be a multiple of it

    def config(self, ignore: list[str]) -> dict[str, Any]:
        """`quantization_config`; `ignore` names the linears that stay as they are."""
        common = {"symmetric": True, "dynamic": False, "observer": "minmax"}
        group = {"targets": ["Linear"], "weights": {**common, **self.weights}, "input_activations": self.inputs}
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "ignore": ignore,
            "config_groups": {"group_0": group},
        }


def _token(type: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": type, "symmetric": True, "dynamic": True, "strategy": "token"}


COMPRESSIONS = {
    "fp8": Compression(
        fp8, "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, _token("float")
    ),
    "nvfp4": Compression(
        nvfp4,
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": NVFP4_GROUP},
        None,
        NVFP4_GROUP,
    ),
    "mxfp4": Compression(
        mxfp4,
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": MXFP4_GROUP},
        None,
        MXFP4_GROUP,
    ),
    "int8": Compression(int8, "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, _token("int")),
    "int4": Compression(
        int4,
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": INT4_GROUP},
        None,
        INT4_GROUP,
    ),
}
