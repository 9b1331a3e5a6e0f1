"""The pass that puts a quantization scheme's ops in the place of `linear` and `moe_experts`."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import fx

from skyline import ops
from skyline.graph.capture import VALUE
from skyline.ops import Op
from skyline.ops.formats import DEFAULT_GROUP, IntegerFormat, set_integers, widened
from skyline.ops.fp4 import MXFP4_GROUP
from skyline.quantization import SCHEMES, Scheme

# Which arguments are weights.
_WEIGHTS: dict[Any, tuple[int, ...]] = {ops.linear: (1,), ops.moe_experts: (1, 2), ops.moe_experts_clamped: (1, 3)}
_FP4: dict[Any, Op] = {
    ops.linear: ops.linear_fp4,
    ops.moe_experts: ops.moe_experts_fp4,
    ops.moe_experts_clamped: ops.moe_experts_clamped_fp4,
}
_NVFP4: dict[Any, Op] = {**_FP4, ops.linear: ops.linear_nvfp4, ops.moe_experts: ops.moe_experts_nvfp4}


def quantize_linears(
    graph: fx.Graph,
    scheme: str | None,
    group: int = DEFAULT_GROUP,
    stored: Mapping[int, IntegerFormat] | None = None,
) -> dict[str, int]:
    """Rewrite `linear` and `moe_experts` to ops on integers, FP8 or FP4; the result is how often each was put in.

    With a scheme, all of them are, int4 in groups of `group`. Without one, those whose weights the checkpoint has as
    such: `stored`, by the parameter's id; so are gpt-oss's experts under a scheme that has no op for them. Ops on
    weights that are widened where they are read stay, and are not counted. Arguments stay as they are: the weight is
    still the attribute of the model, which is told what it becomes (skyline.ops.formats.set_integers), and the
    kernel's layout does that while its rows are read. What decides stays dense under a scheme: routers, gates, the
    weights of the indexer's heads. Run it before the passes that fuse. Raises ValueError for a scheme that does not
    exist.
    """
    if scheme is not None and scheme not in SCHEMES:
        raise ValueError(f"quantization must be one of {', '.join(SCHEMES)}, not {scheme!r}")
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _WEIGHTS:
            continue
        weights = [node.args[index].meta[VALUE] for index in _WEIGHTS[node.target]]
        if scheme and not (node.target is ops.moe_experts_clamped and SCHEMES[scheme].clamped is None):
            chosen = _from_scheme(node, SCHEMES[scheme], group)
            found = None if chosen is None else (chosen[0], [chosen[1]] * len(weights))
        else:
            found = _as_stored(node, weights, stored or {})
        if found is None:
            continue
        op, formats = found
        for weight, format in zip(weights, formats, strict=True):
            set_integers(weight, format)
        if op is not node.target:
            counts[op.name] += 1
            node.target = op
    return dict(counts)


def _from_scheme(node: fx.Node, scheme: Scheme, group: int) -> tuple[Op, IntegerFormat] | None:
    op: Op | None
    if node.target is ops.moe_experts:
        op = scheme.experts
    elif node.target is ops.moe_experts_clamped:
        op = scheme.clamped
    elif _decides(node):
        return None
    else:
        op = scheme.head if any(user.op == "output" for user in node.users) else scheme.linear
    if op is None or op is node.target:
        return None
    if op in _FP4.values():
        return op, IntegerFormat(4, MXFP4_GROUP, fp4=True)
    if op in (ops.linear_fp8, ops.moe_experts_fp8):
        return op, IntegerFormat(8, fp8=True)
    return op, IntegerFormat(4, group) if op in (ops.linear_int4, ops.moe_experts_int4) else IntegerFormat(8)


def _as_stored(
    node: fx.Node, weights: list[Any], stored: Mapping[int, IntegerFormat]
) -> tuple[Op, list[IntegerFormat]] | None:
    kept = [stored.get(id(weight)) for weight in weights]
    formats = [format for format in kept if format is not None]
    if len(formats) < len(kept):
        return None
    if any(format.widened for format in formats):  # of experts, the other one then is, too
        assert isinstance(node.target, Op)
        return node.target, [widened(format) for format in formats]
    if len(set(formats)) > 1:
        return None
    op = _op_on(node, formats[0], all(format.activations for format in formats))
    return None if op is None else (op, formats)


def _op_on(node: fx.Node, format: IntegerFormat, activations: bool) -> Op | None:
    if format.fp4:
        return (_NVFP4 if activations else _FP4)[node.target]
    if node.target is ops.moe_experts_clamped:
        return None
    experts = node.target is ops.moe_experts
    if format.fp8:
        return ops.moe_experts_fp8 if experts else ops.linear_fp8
    if format.bits == 8:
        return ops.moe_experts_int8 if experts else ops.linear_int8
    return ops.moe_experts_int4 if experts else ops.linear_int4


def _decides(linear: fx.Node) -> bool:
    """Whether the product chooses experts or tokens, or gates: such weights are small, and their errors go far."""
    readers = list(linear.users)
    for reader in readers:  # through the parts of a split, which are appended here
        if reader.target in (ops.split, operator.getitem):
            readers.extend(reader.users)
    return any(
        reader.target is ops.topk_router
        or (reader.target is ops.index_topk and reader.args[2] in (linear, *readers))
        or (reader.target is ops.gated_delta_rule and reader.args[0] not in readers)
        or (reader.target is ops.sigmoid_mul and reader.args[1] is linear)
        for reader in readers
    )
