"""bitsandbytes' 4-bit tensors: written here, one number at a time, and by the library itself where it is installed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from skyline.checkpoint.errors import CheckpointError
from skyline.quantization.formats import detect
from tests.quantization.formats.tensors import Tensors, found, randint, randn, whole

NAME = "model.layers.0.mlp.up_proj.weight"
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def written(shape: tuple[int, int], nested: bool, block: int = 64, outer: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    """Blocks run on through the rows; the high nibble is the first; scales of scales have blocks of their own."""
    count = shape[0] * shape[1]
    codes, blocks = randint(0, 16, count), -(-count // block)
    table = randn(16).sort().values
    padded = torch.cat((codes, torch.zeros(count % 2, dtype=torch.int64)))
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    tensors = {NAME: (padded[::2] * 16 + padded[1::2]).to(torch.uint8).view(-1, 1), f"{NAME}.quant_map": table}
    if nested:
        inner, outer_table = randint(0, 256, blocks, seed=1), randn(256, seed=2).abs().sort().values
        outer_scales = randn(-(-blocks // outer), seed=3).abs()
        scales = outer_table[inner] * outer_scales.repeat_interleave(outer)[:blocks] + 0.25
        state |= {"nested_blocksize": outer, "nested_dtype": "float32", "nested_offset": 0.25}
        tensors |= {
            f"{NAME}.absmax": inner.to(torch.uint8),
            f"{NAME}.nested_absmax": outer_scales,
            f"{NAME}.nested_quant_map": outer_table,
        }
    else:
        scales = randn(blocks, seed=1).abs()
        tensors[f"{NAME}.absmax"] = scales
    text = list(json.dumps(state).encode())
    tensors[f"{NAME}.quant_state.bitsandbytes__nf4"] = torch.tensor(text, dtype=torch.uint8)
    return tensors, (table[codes] * scales.repeat_interleave(block)[:count]).view(shape)


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("shape", ((40, 96), (33, 50), (20, 7), (1, 64), (21, 3)))
def test_values(shape: tuple[int, int], nested: bool) -> None:
    tensors, values = written(shape, nested)
    weights = found(CONFIG, tensors)
    stored = weights.stored[NAME]
    assert set(stored.parts) == set(tensors) and stored.shape == shape and stored.integers is None
    assert torch.equal(whole(stored), values)


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("kind", ("nf4", "fp4"))
def test_values_are_the_librarys(kind: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(randn(80, 96), quant_type=kind, compress_statistics=nested)
    tensors = {NAME: packed, **{f"{NAME}.{name}": part for name, part in state.as_dict(packed=True).items()}}
    stored = found(CONFIG, tensors).stored[NAME]
    assert torch.equal(whole(stored), functional.dequantize_4bit(packed, state))


def test_what_does_not_fit_is_refused() -> None:
    tensors, _ = written((8, 64), nested=True)
    state = f"{NAME}.quant_state.bitsandbytes__nf4"
    for part in tensors:
        if part != state:
            less = {name: tensor for name, tensor in tensors.items() if name != part}
            with pytest.raises(CheckpointError, match="up_proj"):
                detect(CONFIG, Tensors(less))
    for text in (b"{", b"[]", b'{"shape": [8, 65], "blocksize": 64}', b'{"shape": [8, 64]}', b'{"shape": -1}'):
        bad = {**tensors, state: torch.tensor(list(text), dtype=torch.uint8)}
        with pytest.raises(CheckpointError, match=r"up_proj\.weight"):
            _ = found(CONFIG, bad).stored[NAME].shape
    with pytest.raises(CheckpointError, match="4 bits"):
        detect({"quant_method": "bitsandbytes", "load_in_8bit": True}, Tensors({}))


@pytest.mark.parametrize("part", ("absmax", "quant_map"))
def test_scales_that_cannot_be(part: str) -> None:
    tensors, _ = written((8, 64), nested=False)
    tensors[f"{NAME}.{part}"][-1] = float("nan")
    with pytest.raises(CheckpointError, match=part):
        found(CONFIG, tensors).stored[NAME].read(0, 8)
