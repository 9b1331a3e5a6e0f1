"""Sizes of grids and tiles. Triton's own functions of these names take some microseconds of the host for each call."""

from __future__ import annotations


def cdiv(count: int, size: int) -> int:
    """Tiles of `size` that `count` takes."""
    return -(-count // size)


def next_power_of_2(size: int) -> int:
    """The least that is not below `size`; of 0 it is 0."""
    return 1 << (size - 1).bit_length() if size > 0 else 0
