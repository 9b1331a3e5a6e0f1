"""Every quantized type against the package gguf's dequantization, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from skyline.checkpoint.gguf.types import GGML_TYPES, GGMLType

QUANTIZED = {number: kind for number, kind in GGML_TYPES.items() if kind.block is not None}


def random_rows(kind: GGMLType, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes with scales of a sane size."""
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (rows, blocks * kind.block_bytes), dtype=np.uint8)
    fields = data.reshape(-1, kind.block_bytes).view(kind.block)
    assert kind.block is not None and kind.block.names is not None
    for field in {"d", "m", "dmin"} & set(kind.block.names):
        fields[field] = generator.standard_normal(fields[field].shape) * 0.1
    if "e" in kind.block.names:
        fields["e"] = generator.integers(0, 250, fields["e"].shape)
    return data


@pytest.mark.parametrize("number", QUANTIZED, ids=lambda number: QUANTIZED[number].name)
def test_values_are_those_of_the_package_gguf(number: int) -> None:
    kind = QUANTIZED[number]
    rows = random_rows(kind, 7, 5)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(number))
    got = kind.dequantize(rows)
    assert got.dtype == np.float32 and np.isfinite(got).all() and np.ptp(got) > 0
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


def test_numbers_names_and_sizes_are_those_of_the_package_gguf() -> None:
    for number, kind in GGML_TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert (theirs.name, *gguf.GGML_QUANT_SIZES[theirs]) == (kind.name, kind.block_size, kind.block_bytes)


@pytest.mark.parametrize("number", sorted(QUANTIZED.keys() - {39}), ids=lambda number: QUANTIZED[number].name)
def test_levels_have_the_shape_that_the_type_says(number: int) -> None:
    kind = QUANTIZED[number]
    found = kind.levels(random_rows(kind, 3, 4))
    k = 4 * kind.block_size
    assert found.levels.dtype == np.int8 and found.levels.shape == (3, k)
    assert found.factors.dtype == np.float16 and found.factors.shape == (3, 4)
    assert found.group_scales().shape == (3, k // kind.group)
    assert (found.offsets is not None) == kind.offsets
    span = int(found.levels.max()) - int(found.levels.min())
    # Random bytes hold all levels of the smaller types.
    assert span == 2 ** int(kind.name[1]) - 1 or (kind.name == "Q8_0" and span > 240)
    assert (found.levels.min() == 0) == kind.offsets


@pytest.mark.parametrize("number", QUANTIZED, ids=lambda number: QUANTIZED[number].name)
def test_a_scale_that_is_not_finite_shows_in_the_values(number: int) -> None:
    kind = QUANTIZED[number]
    rows = random_rows(kind, 1, 2)
    block = rows.reshape(-1, kind.block_bytes).view(kind.block)
    block["e" if number == 39 else "d"][0] = 255 if number == 39 else np.inf
    assert not np.isfinite(kind.dequantize(rows)).all()
