"""quant_method "mxfp4", gpt-oss: `experts.gate_up_proj_blocks` and `_scales` for all experts of a layer.

https://huggingface.co/openai/gpt-oss-120b; OCP Microscaling Formats 1.0
"""

from __future__ import annotations

from skyline.checkpoint.errors import CheckpointError
from skyline.quantization.formats.found import Found
from skyline.quantization.formats.scaled import E8M0_SCALES, ScaledWeight
from skyline.quantization.formats.scales import Grid, expect, expect_dtype, expect_shape
from skyline.quantization.formats.stored import TensorSource

_BLOCKS, _SCALES, _GROUP = "_blocks", "_scales", 32


def find_mxfp4(source: TensorSource) -> Found:
    """Blocks [E, N, K / 32, 16] and exponents [E, N, K / 32] stand for what transformers holds as [E, K, N]."""
    found = Found(source)
    for name in source:
        if not name.endswith(_BLOCKS):
            continue
        plain = name.removesuffix(_BLOCKS)
        scales = expect(source, plain + _SCALES, name)
        shape = tuple(source.shape(name))
        if len(shape) != 4 or shape[-1] != _GROUP // 2:
            raise CheckpointError(
                f"{source.folder}: {name!r} has shape {list(shape)} instead of [experts, N, K / 32, 16]; "
                "download the checkpoint again"
            )
        expect_dtype(source, name, E8M0_SCALES[0])
        expect_dtype(source, scales, *E8M0_SCALES)
        expect_shape(source, scales, shape[:-1], f"one for {_GROUP} elements of {name!r}")
        matrix, grid = (*shape[:2], shape[2] * _GROUP), Grid(shape[:-1], 1, _GROUP)
        found.add(plain, ScaledWeight(source, name, scales, grid, matrix, "mxfp4, groups of 32", transposed=True))
    return found
