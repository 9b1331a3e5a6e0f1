"""quant_method "compressed-tensors". The tensors say what a weight is, `config_groups` how its integers are packed.

https://github.com/vllm-project/compressed-tensors (src/compressed_tensors/compressors and quantization/quant_args.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.fields import Fields
from skyline.quantization.formats.found import Found
from skyline.quantization.formats.fp8 import block_size, missing_scale
from skyline.quantization.formats.grouped import RowPacked
from skyline.quantization.formats.names import REGEX, is_ignored, matches_target, pattern_list
from skyline.quantization.formats.scaled import FP8_DTYPES, Whole, fp4, scaled
from skyline.quantization.formats.scales import expect, expect_dtype, expect_shape
from skyline.quantization.formats.stored import TensorSource

_WHERE = "quantization_config"


@dataclass(frozen=True, slots=True)
class _Scheme:
    """A config group's `weights`. group: None where a scale is for a row or more."""

    bits: int
    symmetric: bool
    group: int | None
    block: tuple[int, int] | None


def find_compressed_tensors(config: Mapping[str, Any], source: TensorSource) -> Found:
    """Raises CheckpointError for what would change the values and is not supported: sparsity, rotations."""
    _refuse(config)
    groups, ignored = _groups(config), pattern_list(config.get("ignore"), f"{_WHERE}: ignore")
    found = Found(source)
    for name in source:
        module, _, leaf = name.rpartition(".")
        plain = f"{module}.weight"
        if leaf == "weight_packed":
            _add_packed(found, plain, name, groups)
        elif leaf == "weight" and len(source.shape(name)) >= 2:
            scale = f"{module}.weight_scale"
            if scale in source:
                scheme = _scheme(groups, module)
                zeros = None
                if source.dtype(name) == torch.int8 and not scheme.symmetric:
                    zeros = expect(source, f"{module}.weight_zero_point", name)
                block = scheme.block if scheme.group is None else (1, scheme.group)
                found.add(name, scaled(source, name, scale, block, zeros))
            elif source.dtype(name) in (*FP8_DTYPES, torch.int8) and not is_ignored(module, ignored):
                raise missing_scale(source, name)
    return found


def _add_packed(found: Found, plain: str, packed: str, groups: list[tuple[tuple[str, ...], _Scheme]]) -> None:
    source, module = found.source, plain.removesuffix(".weight")
    scale = expect(source, f"{plain}_scale", packed)
    if source.dtype(packed) == torch.uint8:
        whole = f"{plain}_global_scale"
        if whole in source:
            found.add(plain, fp4(source, packed, scale, 16, (whole, Whole.DIVIDES)))
        elif source.dtype(scale) == torch.float8_e4m3fn:
            raise CheckpointError(f"{source.folder}: {whole!r} is missing; quantize the checkpoint again")
        else:
            found.add(plain, fp4(source, packed, scale, 32))
        return
    found.add(plain, _integers(source, plain, packed, scale, _scheme(groups, module)))


def _integers(source: TensorSource, plain: str, packed: str, scale: str, scheme: _Scheme) -> RowPacked:
    expect_dtype(source, packed, torch.int32)
    expect_dtype(source, scale, torch.float32, torch.float16, torch.bfloat16)
    if scheme.bits not in (4, 8):
        raise CheckpointError(f"{source.folder}: {packed!r} has integers of {scheme.bits} bits; 4 and 8 are supported")
    if len(source.shape(packed)) != 2 or len(source.shape(scale)) != 2:
        raise CheckpointError(f"{source.folder}: {packed!r} and {scale!r} must be matrices, one for each expert")
    (n, words), each, groups = source.shape(packed), 32 // scheme.bits, source.shape(scale)[1]
    k = words * each if scheme.group is None else groups * scheme.group
    shape_name = f"{plain}_shape"
    # A row may end within a word, or a group: only the stored shape can tell.
    if (scheme.group is None or -(-k // each) != words) and shape_name in source:
        stored = source.get(shape_name).tolist()
        k = stored[1] if len(stored) == 2 and 0 < stored[1] <= words * each else k
    group = k if scheme.group is None else scheme.group
    why = f"int{scheme.bits} in groups of {group}, as config_groups says"
    expect_shape(source, packed, (n, -(-k // each)), why)
    expect_shape(source, scale, (n, -(-k // group)), why)
    zeros = f"{plain}_zero_point"
    if scheme.symmetric or zeros not in source:
        if not scheme.symmetric:
            expect(source, zeros, packed)
        zeros_or_none = None
    else:
        packed_rows = n if source.dtype(zeros) == torch.int8 else -(-n // each)
        expect_dtype(source, zeros, torch.int32, torch.int8)
        expect_shape(source, zeros, (packed_rows, -(-k // group)), why)
        zeros_or_none = zeros
    order = f"{plain}_g_idx" if f"{plain}_g_idx" in source else None
    if order is not None:
        expect_shape(source, order, (k,), f"the group of each column of {packed!r}")
    recorded = shape_name if shape_name in source else None
    return RowPacked(source, packed, scale, zeros_or_none, order, (n, k), scheme.bits, group, "packed", recorded)


def _scheme(groups: list[tuple[tuple[str, ...], _Scheme]], module: str) -> _Scheme:
    """As compressed-tensors decides: names before regular expressions before classes such as "Linear".

    Classes are unknown here; where all groups, or all that are left, are the same, that makes no difference.
    """
    schemes = list(dict.fromkeys(scheme for _, scheme in groups))
    if len(schemes) == 1:
        return schemes[0]
    for by_regex in (False, True):
        for targets, scheme in groups:
            if any(t.startswith(REGEX) == by_regex and matches_target(module, t) for t in targets):
                return scheme
    classes = {scheme for targets, scheme in groups if any(_is_class(target) for target in targets)}
    if len(classes) != 1:
        raise CheckpointError(f"{_WHERE}: config_groups does not say which of its groups {module!r} belongs to")
    return classes.pop()


def _is_class(target: str) -> bool:
    return target.isidentifier() and target[0].isupper()


def _groups(config: Mapping[str, Any]) -> list[tuple[tuple[str, ...], _Scheme]]:
    groups = Fields(config, _WHERE).optional_object("config_groups") or {}
    found = []
    for name, group in groups.items():
        where = f"{_WHERE}: config_groups: {name}"
        if not isinstance(group, dict):
            raise CheckpointError(f"{where} must be an object, with the scheme written out")
        weights = Fields(group, where).optional_object("weights")
        if weights is not None:
            found.append((pattern_list(group.get("targets"), f"{where}: targets"), _parse(weights, where)))
    if not found:
        # Only keys and values are quantized; any weight that is nevertheless has to say so by its shape.
        found.append(((), _Scheme(bits=8, symmetric=True, group=None, block=None)))
    return found


def _parse(weights: Mapping[str, Any], where: str) -> _Scheme:
    fields = Fields(weights, f"{where}: weights")
    group = fields.integer("group_size", -1, 1 << 20, default=-1)
    block = weights.get("block_structure")
    if isinstance(block, str):
        block = [int(size) if size.isdecimal() else size for size in block[:40].split("x")]
    return _Scheme(
        fields.integer("num_bits", 1, 16, default=8),
        fields.boolean("symmetric", True),
        group if group > 0 else None,
        block_size(block, f"{where}: weights: block_structure"),
    )


def _refuse(config: Mapping[str, Any]) -> None:
    fields = Fields(config, _WHERE)
    sparsity = (fields.optional_object("sparsity_config") or {}).get("format")
    if sparsity not in (None, "dense"):
        raise CheckpointError(
            f"{_WHERE}: sparse weights ({str(sparsity)[:40]}) are not supported; use a dense checkpoint"
        )
    if (fields.optional_object("transform_config") or {}).get("config_groups"):
        raise CheckpointError(
            f"{_WHERE}: transform_config asks for rotations while the model runs, which are not supported; "
            "use a checkpoint without them"
        )
    if config.get("format") == "marlin-24":
        raise CheckpointError(f"{_WHERE}: the format marlin-24 is not supported; use a dense checkpoint")
