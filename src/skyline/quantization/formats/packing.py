"""Small integers out of the words they are packed in, wider floats, and scales laid over a matrix.

Everything works on whole slices. Bytes of a word are taken in the machine's order: Skyline's platforms, like the
formats, are little-endian.
"""

from __future__ import annotations

import torch
from torch import Tensor

_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


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
