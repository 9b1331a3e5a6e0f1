"""The pass that puts a quantization scheme's ops in the place of `linear` and `moe_experts`."""

from __future__ import annotations

import operator
from collections import Counter

from torch import fx

from skyline import ops
from skyline.quantization import SCHEMES


def quantize_linears(graph: fx.Graph, scheme: str) -> dict[str, int]:
    """Rewrite each `linear` and `moe_experts` to the scheme's op; the result is how often each was put in, by name.

    Arguments stay as they are: the weight is still the attribute of the model, and the kernel's layout says what
    becomes of its rows while they are read. What only decides stays dense: routers, gates, the indexer of sparse
    attention. Run it before the passes that fuse. Raises ValueError for a scheme that does not exist.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantization must be one of {', '.join(SCHEMES)}, not {scheme!r}")
    chosen = SCHEMES[scheme]
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is ops.moe_experts:
            node.target = chosen.experts
            counts[chosen.experts.name] += 1
            continue
        if node.target is not ops.linear:
            continue
        if _decides(node):
            continue
        op = chosen.head if any(user.op == "output" for user in node.users) else chosen.linear
        node.target = op
        counts[op.name] += 1
    return dict(counts)


def _decides(linear: fx.Node) -> bool:
    """Whether the product chooses experts or tokens, or gates: such weights are small, and their errors go far."""
    readers = list(linear.users)
    for reader in readers:  # through the parts of a split, which are appended here
        if reader.target in (ops.split, operator.getitem):
            readers.extend(reader.users)
    return any(
        reader.target in (ops.topk_router, ops.index_topk)
        or (reader.target is ops.gated_delta_rule and reader.args[0] not in readers)
        or (reader.target is ops.sigmoid_mul and reader.args[1] is linear)
        for reader in readers
    )
