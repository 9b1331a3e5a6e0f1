"""Scales as they are stored: as float32, checked, and how they are laid over the matrix they belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skyline.checkpoint.errors import CheckpointError
from skyline.quantization.formats.stored import TensorSource


@dataclass(frozen=True, slots=True)
class Grid:
    """Which scale an element has: shape [.., A, B], each entry for `rows` x `columns` of [.., N, K].

    The last blocks of each may be partial; leading dimensions are the matrix's, or 1.
    """

    shape: tuple[int, ...]
    rows: int
    columns: int


def lay_out(
    source: TensorSource, weight: str, scale: str, shape: tuple[int, ...], block: tuple[int, int] | None
) -> Grid:
    """The grid of a scale tensor over a weight of plain shape [.., N, K].

    One scale for everything fits always. Else with `block` only its grid does; without, a scale a row, a scale a
    matrix, and [.., 2, 1] for gate and up in one matrix do. Raises CheckpointError if none fits.
    """
    found = tuple(source.shape(scale))
    *lead, n, k = shape
    if math.prod(found) == 1:
        return Grid((1,) * (len(lead) + 2), n, k)
    if block is not None:
        wanted = (*lead, -(-n // block[0]), -(-k // block[1]))
        # ModelOpt writes [A, 1, B, 1].
        if found == wanted or tuple(size for size in found if size != 1) == tuple(s for s in wanted if s != 1):
            return Grid(wanted, *block)
        raise CheckpointError(
            f"{source.folder}: scale {scale!r} has shape {list(found)}, but {weight!r} {list(shape)} in blocks of "
            f"{block[0]}x{block[1]} needs {list(wanted)}; download or quantize the checkpoint again"
        )
    if found in ((*lead, n), (*lead, n, 1)):
        return Grid((*lead, n, 1), 1, k)
    if lead and found in (tuple(lead), (*lead, 1), (*lead, 1, 1)):
        return Grid((*lead, 1, 1), n, k)
    if "gate_up" in weight and n % 2 == 0 and found in ((*lead, 2), (*lead, 2, 1)):
        return Grid((*lead, 2, 1), n // 2, k)
    raise CheckpointError(
        f"{source.folder}: scale {scale!r} has shape {list(found)}, which is neither one scale for {weight!r} "
        f"{list(shape)} nor one a row; if these are parts fused into one weight, export them as separate weights"
    )


def checked(source: TensorSource, name: str, scales: Tensor, signed: bool = False) -> Tensor:
    """float32. Raises CheckpointError if one is NaN, infinite or, unless `signed`, negative: -1 marks a missing one."""
    wide = scales.float()
    if not bool(wide.isfinite().all()):
        raise CheckpointError(f"{source.folder}: scale {name!r} holds NaN or infinite values; download it again")
    if not signed and bool((wide < 0).any()):
        raise CheckpointError(
            f"{source.folder}: scale {name!r} holds negative values, such as the -1 of one that was never computed; "
            "quantize the checkpoint again"
        )
    return wide


def exponents(scales: Tensor) -> Tensor:
    """E8M0 in whatever dtype -> what can be widened. 255 is NaN (OCP Microscaling Formats 1.0, section 5.4.1)."""
    return scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales


def expect_shape(source: TensorSource, name: str, wanted: Sequence[int], why: str) -> None:
    if tuple(source.shape(name)) != tuple(wanted):
        raise CheckpointError(
            f"{source.folder}: tensor {name!r} has shape {list(source.shape(name))} instead of {list(wanted)} "
            f"({why}); download or quantize the checkpoint again"
        )


def expect_dtype(source: TensorSource, name: str, *wanted: torch.dtype) -> None:
    if source.dtype(name) not in wanted:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
        raise CheckpointError(
            f"{source.folder}: tensor {name!r} has dtype {str(source.dtype(name)).removeprefix('torch.')} "
            f"instead of {known}; quantize the checkpoint again"
        )


def expect(source: TensorSource, name: str, owner: str) -> str:
    if name not in source:
        raise CheckpointError(
            f"{source.folder}: {name!r} is missing, without which {owner!r} cannot be read; "
            "download the checkpoint again"
        )
    return name
