"""Passes rewrite the captured graph before it is lowered: the place of fusions.

A pass is a function that changes the graph in place and returns how many places it matched. The fused ops have
references like every other, so that a device without a kernel for one loses nothing; GPUs have two more passes than
CPUs, because there a launch costs more than what it computes. What does not match exactly is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from skyline import ops
from skyline.graph.capture import VALUE
from skyline.ops import KVCache, Op

Pass = Callable[[fx.Graph], int]

# Ops that multiply by a merged gate and up weight and can apply `silu_mul` to the product, an argument of that name.
GATED_LINEARS = frozenset(
    {"linear", "linear_fp4", "linear_fp8", "linear_int4", "linear_int8", "linear_int8_weight_only"}
)

# Linears whose kernels can norm what they read and add to the residual stream what they give.
WHOLE_LINEARS: dict[Op, Op] = {ops.linear: ops.fused_linear, ops.linear_fp8: ops.fused_linear_fp8}


def fuse_add_rms_norm(graph: fx.Graph) -> int:
    """rms_norm(add(x, residual)) -> add_rms_norm; whoever else reads the sum takes it from there."""
    matches = 0
    for norm in graph.find_nodes(op="call_function", target=ops.rms_norm):
        total, weight, eps = _arguments(norm)
        # The fused call stands where the norm does: a reader of the sum in between would come before it.
        if not _calls(total, ops.add) or any(user < norm for user in total.users):
            continue
        if any(not isinstance(addend, fx.Node) or addend.op == "get_attr" for addend in total.args):
            continue  # what is no activation need not have the shape of the rows
        with graph.inserting_before(norm):
            fused = graph.call_function(ops.add_rms_norm, (*total.args, weight, eps))
            normed, kept = (graph.call_function(operator.getitem, (fused, index)) for index in range(2))
        for old, new in ((norm, normed), (total, kept)):
            old.replace_all_uses_with(new)
            graph.erase_node(old)
            if not new.users:
                graph.erase_node(new)
        matches += 1
    return matches


def fuse_rope_kv_write(graph: fx.Graph) -> int:
    """split(qkv), optionally head_rms_norm of q and k, rope, kv_write -> rope_kv_write."""
    matches = 0
    for write in graph.find_nodes(op="call_function", target=ops.kv_write):
        found = _match_rope_kv_write(write)
        if found is None:
            continue
        # Where the write was: nothing in the graph but the order of the nodes says that attention reads after it.
        with graph.inserting_before(write):
            fused = graph.call_function(ops.rope_kv_write, found.arguments)
        found.q.replace_all_uses_with(fused)
        for node in found.replaced:
            graph.erase_node(node)
        matches += 1
    return matches


@dataclass(frozen=True, slots=True)
class _RopeKVWrite:
    arguments: tuple[Any, ...]  # of the fused op
    q: fx.Node  # rotated
    replaced: list[fx.Node]  # readers before what they read


def _match_rope_kv_write(write: fx.Node) -> _RopeKVWrite | None:
    k, v, cache_node, batch = _arguments(write)
    rope, split = _picked_from(k, ops.rope), _picked_from(v, ops.split)
    cache = _constant(cache_node)
    if rope is None or split is None or not isinstance(cache, KVCache):
        return None
    rotated, parts = _outputs(rope, 2), _outputs(split, 3)
    if rotated is None or parts is None or k is not rotated[1] or v is not parts[2]:
        return None

    *turned, positions, table, head_dim = _arguments(rope)
    norms = [node for node in turned if _calls(node, ops.head_rms_norm)]
    weights: list[Any] = [None, None]
    eps: Any = 0.0  # of no norm
    if norms:
        if len(norms) != 2 or norms[0].args[2] != norms[1].args[2]:
            return None
        turned, weights, (eps, _) = map(list, zip(*map(_arguments, norms), strict=True))
        # A weight of another size would norm groups of columns that are no heads.
        if any(not isinstance(w := _constant(weight), Tensor) or w.shape != (cache.head_dim,) for weight in weights):
            return None
    if turned != parts[:2]:
        return None

    qkv, sizes = _arguments(split)
    kv_size = cache.num_kv_heads * cache.head_dim
    if head_dim != cache.head_dim or list(sizes[1:]) != [kv_size, kv_size]:
        return None
    inner = [rotated[1], *norms, *parts]
    if any(len(node.users) != 1 for node in inner) or any(user < write for user in rotated[0].users):
        return None
    arguments = (qkv, *weights, eps, positions, table, cache_node, batch)
    return _RopeKVWrite(arguments, rotated[0], [write, *rotated, rope, *norms, *parts, split])


def fuse_linear_silu_mul(graph: fx.Graph) -> int:
    """silu_mul(linear(x, gate_up)), the product read by nothing else -> linear(..., silu_mul=True)."""
    matches = 0
    for activation in graph.find_nodes(op="call_function", target=ops.silu_mul):
        (product,) = _arguments(activation)
        op = product.target if isinstance(product, fx.Node) else None
        if not isinstance(op, Op) or op.name not in GATED_LINEARS or len(product.users) != 1:
            continue
        position = list(op.signature.parameters).index("silu_mul")
        arguments = list(_arguments(product))
        if arguments[position]:
            continue  # its result is activated already
        arguments[position] = True
        product.args = tuple(arguments)
        activation.replace_all_uses_with(product)
        graph.erase_node(activation)
        matches += 1
    return matches


def fuse_linear_add(graph: fx.Graph) -> int:
    """add(residual, linear(x)), the product read by nothing else -> fused_linear(x, residual=residual)."""
    matches = 0
    for total in graph.find_nodes(op="call_function", target=ops.add):
        products = [node for node in total.args if _whole(node) and not _of(node, "silu_mul") and len(node.users) == 1]
        others = [node for node in total.args if node not in products[-1:]]
        # What is no activation need not have the shape of the rows.
        if not products or len(others) != 1 or not isinstance(others[0], fx.Node) or others[0].op == "get_attr":
            continue
        if _of(products[-1], "residual") is not None:
            continue
        with graph.inserting_before(total):
            fused = _fuse_linear(graph, products[-1], residual=others[0])
        total.replace_all_uses_with(fused)
        for node in (total, products[-1]):
            graph.erase_node(node)
        matches += 1
    return matches


def fuse_norm_linear(graph: fx.Graph) -> int:
    """linear(rms_norm(x)), the normed rows read by nothing else -> fused_linear(x, norm=weight)."""
    matches = 0
    for norm in graph.find_nodes(op="call_function", target=ops.rms_norm):
        x, weight, eps = _arguments(norm)
        reader = next(iter(norm.users), None)
        if reader is None or len(norm.users) != 1 or not _whole(reader) or reader.args[0] is not norm:
            continue
        if _of(reader, "norm") is not None:
            continue
        with graph.inserting_before(reader):
            fused = _fuse_linear(graph, reader, x=x, norm=weight, eps=eps)
        reader.replace_all_uses_with(fused)
        for node in (reader, norm):
            graph.erase_node(node)
        matches += 1
    return matches


def _whole(node: Any) -> bool:
    return isinstance(node, fx.Node) and (node.target in WHOLE_LINEARS or node.target in WHOLE_LINEARS.values())


def _of(linear: fx.Node, argument: str) -> Any:
    """An argument of a linear by its name; None where the op has none of that name."""
    assert isinstance(linear.target, Op)
    names = list(linear.target.signature.parameters)
    return linear.args[names.index(argument)] if argument in names else None


def _fuse_linear(graph: fx.Graph, linear: fx.Node, **changes: Any) -> fx.Node:
    """The fused form of a linear, with some of its arguments changed."""
    assert isinstance(linear.target, Op)
    bound = WHOLE_LINEARS.get(linear.target, linear.target).signature.bind(*linear.args)
    bound.apply_defaults()
    bound.arguments.update(changes)
    return graph.call_function(WHOLE_LINEARS.get(linear.target, linear.target), bound.args)


PASSES: dict[str, Pass] = {
    "add_rms_norm": fuse_add_rms_norm,
    "rope_kv_write": fuse_rope_kv_write,
    "linear_silu_mul": fuse_linear_silu_mul,
}
# What a linear can take in is taken from the other fusions, so they come after it.
GPU_PASSES: dict[str, Pass] = {
    "linear_silu_mul": fuse_linear_silu_mul,
    "linear_add": fuse_linear_add,
    "norm_linear": fuse_norm_linear,
    "add_rms_norm": fuse_add_rms_norm,
    "rope_kv_write": fuse_rope_kv_write,
}


def run_passes(graph: fx.Graph, device: str = "cpu") -> dict[str, int]:
    """Apply every pass for a device ("cpu" or "cuda") in order; the result is how often each one matched."""
    passes = GPU_PASSES if device == "cuda" else PASSES
    counts = {name: rewrite(graph) for name, rewrite in passes.items()}
    graph.lint()
    return counts


def _arguments(call: fx.Node) -> tuple[Any, ...]:
    """Complete, for ops record them with their defaults; fx's type of them is a union of all there could be."""
    return call.args


def _calls(node: Any, op: Op) -> bool:
    return isinstance(node, fx.Node) and node.target is op


def _constant(node: Any) -> Any:
    """The parameter, buffer or KV cache that a `get_attr` node stands for; None for anything else."""
    return node.meta.get(VALUE) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _picked_from(node: Any, op: Op) -> fx.Node | None:
    """The call of an op with several outputs that `node` is one of."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return None
    call = node.args[0]
    return call if isinstance(call, fx.Node) and call.target is op else None


def _outputs(call: fx.Node, count: int) -> list[fx.Node] | None:
    """The outputs of a call, in order; None unless there are `count` of them, each taken out once."""
    taken = {user.args[1]: user for user in call.users if user.target is operator.getitem}
    if len(call.users) != count or taken.keys() != set(range(count)):
        return None
    return [taken[index] for index in range(count)]
