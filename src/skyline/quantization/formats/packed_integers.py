"""quant_method "gptq" and "awq": `qweight`, `qzeros` and `scales`; GPTQ also `g_idx`.

https://github.com/ModelCloud/GPTQModel, https://github.com/casper-hansen/AutoAWQ (awq/modules/linear/gemm.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.fields import Fields
from skyline.quantization.formats.found import Found
from skyline.quantization.formats.grouped import AWQPacked, GPTQPacked, GPTQPackedMinusOne
from skyline.quantization.formats.scales import expect, expect_dtype, expect_shape
from skyline.quantization.formats.stored import TensorSource

_WHERE = "quantization_config"
_VERSIONS = {"gptq": GPTQPackedMinusOne, "gptq_v2": GPTQPacked}
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


def find_gptq(config: Mapping[str, Any], source: TensorSource) -> Found:
    """Bits are what the shapes say, so that GPTQModel's rules for single layers (`dynamic`) need not be followed."""
    fields = Fields(config, _WHERE)
    version = fields.text("checkpoint_format", fields.text("format", "gptq"))
    if version not in _VERSIONS:
        raise fields.error("checkpoint_format", f"{version[:80]!r} is not supported; those that are: gptq, gptq_v2")
    usual = fields.integer("group_size", -1, 1 << 20, default=-1)
    found = Found(source)
    for packed in source:
        if not packed.endswith(".qweight"):
            continue
        module = packed.removesuffix(".qweight")
        scales, zeros = (expect(source, f"{module}.{part}", packed) for part in ("scales", "qzeros"))
        groups, n = _matrices(source, packed, scales, zeros)
        bits = _bits(source, zeros, n)
        expect_shape(source, zeros, (groups, -(-n * bits // 32)), f"one for each of {scales!r}")
        k = source.shape(packed)[0] * 32 // bits
        expect_shape(source, packed, (k * bits // 32, n), f"int{bits} for {scales!r}")
        order = f"{module}.g_idx" if f"{module}.g_idx" in source else None
        if order is not None:
            expect_shape(source, order, (k,), f"the group of each column of {packed!r}")
        group = _group(source, scales, usual, k, groups, differs=bool(config.get("dynamic")))
        kind = _VERSIONS[version]
        found.add(f"{module}.weight", kind(source, packed, scales, zeros, order, (n, k), bits, group, "GPTQ"))
        if f"{module}.bias" in source:
            found.spare.add(f"{module}.bias")
    return found


def find_awq(config: Mapping[str, Any], source: TensorSource) -> Found:
    """The GEMM layout with four bits, which is what AutoAWQ and llm-awq's successors write."""
    fields = Fields(config, _WHERE)
    version = fields.text("version", "gemm").lower()
    if version != "gemm":
        raise fields.error("version", f"{version[:80]!r} is not supported; export the checkpoint as gemm")
    bits = fields.integer("bits", 1, 16, default=fields.integer("w_bit", 1, 16, default=4))
    if bits != 4:
        raise fields.error("bits", f"is {bits}, but AWQ is supported with 4 only")
    usual = fields.integer("group_size", -1, 1 << 20, default=fields.integer("q_group_size", -1, 1 << 20, default=128))
    has_zeros = fields.boolean("zero_point", True)
    found = Found(source)
    for packed in source:
        if not packed.endswith(".qweight"):
            continue
        module = packed.removesuffix(".qweight")
        scales, zeros = expect(source, f"{module}.scales", packed), f"{module}.qzeros"
        if has_zeros:
            expect(source, zeros, packed)
        zeros_or_none = zeros if zeros in source else None
        groups, n = _matrices(source, packed, scales, zeros_or_none)
        if n % 8:
            raise CheckpointError(f"{source.folder}: {scales!r} has {n} columns, but AWQ packs them by eight")
        k = source.shape(packed)[0]
        expect_shape(source, packed, (k, n // 8), f"int4 for {scales!r}")
        if zeros_or_none is not None:
            expect_shape(source, zeros, (groups, n // 8), f"one for each of {scales!r}")
        group = _group(source, scales, usual, k, groups)
        found.add(f"{module}.weight", AWQPacked(source, packed, scales, zeros_or_none, None, (n, k), 4, group, "AWQ"))
    return found


def _matrices(source: TensorSource, packed: str, scales: str, zeros: str | None) -> tuple[int, int]:
    """The shape of the scales [groups, N]."""
    expect_dtype(source, scales, *_SCALES)
    for name in filter(None, (packed, zeros)):
        expect_dtype(source, name, torch.int32)
    for name in filter(None, (packed, scales, zeros)):
        if len(source.shape(name)) != 2 or 0 in source.shape(name):
            raise CheckpointError(f"{source.folder}: {name!r} must be a matrix, not {list(source.shape(name))}")
    groups, n = source.shape(scales)
    return groups, n


def _bits(source: TensorSource, zeros: str, n: int) -> int:
    words = source.shape(zeros)[1]
    for bits in (4, 8):
        if -(-n * bits // 32) == words:
            return bits
    raise CheckpointError(
        f"{source.folder}: {zeros!r} has {words} words for {n} columns, which is neither int4 nor int8; "
        "only those are supported"
    )


def _group(source: TensorSource, scales: str, usual: int, k: int, groups: int, differs: bool = False) -> int:
    """The configured size; where single layers may differ, what the number of groups says."""
    size = usual if usual > 0 else k
    if -(-k // size) == groups:
        return size
    if not differs or k % groups:
        raise CheckpointError(
            f"{source.folder}: {scales!r} has {groups} groups for {k} columns, which groups of {size} do not give; "
            "download or quantize the checkpoint again"
        )
    return k // groups
