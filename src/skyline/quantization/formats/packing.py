"""Small integers and E2M1 numbers out of the words and bytes they are packed in.

Everything works on whole slices. Bytes of a word are taken in the machine's order: Skyline's platforms, like the
formats, are little-endian.
"""

from __future__ import annotations

import torch
from torch import Tensor

# E2M1: a sign, two bits of exponent and one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _pairs(low_first: Tensor) -> Tensor:
    """The two values of each byte, [16] -> [256] int64, each the bits of two float32, the low nibble's first."""
    byte = torch.arange(256)
    return torch.stack((low_first[byte & 15], low_first[byte >> 4]), -1).view(torch.int64).flatten()


_E2M1_PAIRS = _pairs(torch.tensor(E2M1 + tuple(-value for value in E2M1)))
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def unpack_e2m1(packed: Tensor) -> Tensor:
    """uint8 [.., K / 2], the low nibble first -> float32 [.., K]."""
    values = _E2M1_PAIRS.index_select(0, packed.flatten().int()).view(torch.float32)
    return values.view(*packed.shape[:-1], 2 * packed.shape[-1])


def widen_fp8(values: Tensor) -> Tensor:
    """float8 of any shape -> float32. A table, where there is one, is faster than torch's conversion."""
    if values.dtype != torch.float8_e4m3fn:
        return values.float()
    return _E4M3.index_select(0, values.view(torch.uint8).flatten().int()).view(values.shape)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [R, W] -> uint8 [R, W * 32 / bits], the lowest bits first. `bits` is 4 or 8."""
    # Not contiguous(), which leaves a lone column its stride, while a view in bytes wants 1.
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def unpack_awq(words: Tensor) -> Tensor:
    """int32 [R, W] in AWQ's GEMM order, of eight columns the even ones before the odd -> uint8 [W * 8, R], transposed.

    Words are turned round before they are unpacked, as there are eight times fewer.
    """
    turned = words.t().contiguous()
    columns = torch.empty(turned.shape[0], 8, turned.shape[1], dtype=torch.uint8)
    for place in range(8):
        columns[:, 2 * (place % 4) + place // 4] = (turned >> 4 * place) & 15
    return columns.flatten(0, 1)


def spread_columns(values: Tensor, per_block: Tensor, block: int, subtract: bool = False) -> None:
    """values [.., R, K] float32 times per_block [.., R, B], in place, each for `block` columns; or minus it.

    The last block may be shorter.
    """
    k = values.shape[-1]
    whole, rest = divmod(k, block)
    apply = torch.Tensor.sub_ if subtract else torch.Tensor.mul_
    if whole:
        apply(values[..., : whole * block].view(*values.shape[:-1], whole, block), per_block[..., :whole, None])
    if rest:
        apply(values[..., whole * block :], per_block[..., whole : whole + 1])
