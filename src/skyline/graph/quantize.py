"""The pass that puts a quantization scheme's ops in the place of `linear` and `moe_experts`."""

from __future__ import annotations

from collections import Counter

from torch import fx

from skyline import ops
from skyline.quantization import SCHEMES


def quantize_linears(graph: fx.Graph, scheme: str) -> dict[str, int]:
    """Rewrite each `linear` and `moe_experts` to the scheme's op; the result is how often each was put in, by name.

    Arguments stay as they are: the weight is still the attribute of the model, and the kernel's layout says what
    becomes of its rows while they are read. Routers stay dense: they are small, and a wrong choice of experts costs a
    lot. Run it before the passes that fuse. Raises ValueError for a scheme that does not exist.
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
        if any(user.target is ops.topk_router for user in node.users):
            continue
        op = chosen.head if any(user.op == "output" for user in node.users) else chosen.linear
        node.target = op
        counts[op.name] += 1
    return dict(counts)
