"""Passes rewrite the captured graph before it is lowered: the place of fusions.

A pass is a function that changes the graph in place and returns how many places it matched. The fused ops have
references like every other, so that a device without a kernel for one loses nothing; GPUs have more passes than CPUs,
because there a launch costs more than what it computes. What does not match exactly is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor, fx

from skyline import ops
from skyline.graph.capture import VALUE
from skyline.ops import KVCache, Op

Pass = Callable[[fx.Graph], int]

# Ops that multiply by a merged gate and up weight and can apply `silu_mul` to the product, an argument of that name.
GATED_LINEARS = frozenset(
    {"linear", "linear_fp4", "linear_fp8", "linear_int4", "linear_int8", "linear_int8_weight_only"}
)

# Ops whose kernels can norm their second argument: the norm, and the names under which they take what that is given.
NORMING: tuple[tuple[Op, Op, tuple[str, ...]], ...] = (
    (ops.latent_rope_write, ops.rms_norm, ("norm", "eps")),
    (ops.index_topk, ops.layer_norm, ("norm", "norm_bias", "eps")),
)

# Linears whose kernels can norm what they read and add to the residual stream what they give.
WHOLE_LINEARS: dict[Op, Op] = {ops.linear: ops.fused_linear, ops.linear_fp8: ops.fused_linear_fp8}

# Experts whose kernels can add to the residual stream what they give.
WHOLE_EXPERTS: dict[Any, Op] = {ops.moe_experts: ops.fused_experts, ops.moe_experts_fp8: ops.moe_experts_fp8}


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


def fuse_experts_add(graph: fx.Graph) -> int:
    """add(residual, moe_experts(x)), the experts' sum read by nothing else -> fused_experts(x, residual=residual).

    Experts in FP8 take the residual themselves.

    Where shared experts stand beside them, residual + (experts + shared) is made (residual + experts) + shared, so that
    `fuse_linear_add` can follow.
    """
    matches = 0
    for experts in [node for node in graph.nodes if node.target in WHOLE_EXPERTS]:
        total = _only_reader(experts)
        residual = _other_addend(total, experts)
        if total is not None and residual is not None and not _before(residual, experts):
            outer = _only_reader(total)
            stream = _other_addend(outer, total)
            if outer is not None and _before(stream, experts):
                total.args, outer.args = (stream, experts), (total, residual)
                residual = stream
        if total is None or not _before(residual, experts):
            continue
        with graph.inserting_before(experts):
            fused = graph.call_function(WHOLE_EXPERTS[experts.target], (*_arguments(experts)[:5], residual))
        total.replace_all_uses_with(fused)
        graph.erase_node(total)
        graph.erase_node(experts)
        matches += 1
    return matches


def fuse_norm_router(graph: fx.Graph) -> int:
    """router(rms_norm(x)) -> norm_router(x); whoever else reads the normed rows takes them from there."""
    matches = 0
    for router in graph.find_nodes(op="call_function", target=ops.router):
        norm, *rest = _arguments(router)
        # The fused call stands where the router does.
        if not _calls(norm, ops.rms_norm) or any(user < router for user in norm.users):
            continue
        with graph.inserting_before(router):
            fused = graph.call_function(ops.norm_router, (*_arguments(norm), *rest))
            normed, *chosen = (graph.call_function(operator.getitem, (fused, index)) for index in range(3))
        for part in list(router.users):
            part.replace_all_uses_with(chosen[part.args[1]])
            graph.erase_node(part)
        graph.erase_node(router)
        norm.replace_all_uses_with(normed)
        graph.erase_node(norm)
        for node in (normed, *chosen):
            if not node.users:
                graph.erase_node(node)
        matches += 1
    return matches


def fuse_norm_argument(graph: fx.Graph) -> int:
    """What the ops of NORMING read, normed and read by nothing else -> the op with its own norm."""
    matches = 0
    for op, kind, names in NORMING:
        for node in graph.find_nodes(op="call_function", target=op):
            first, norm, *_ = _arguments(node)
            if not _calls(norm, kind) or len(norm.users) != 1 or _of(node, names[0]) is not None:
                continue
            x, *given = _arguments(norm)
            bound = op.signature.bind(*_arguments(node))
            bound.arguments.update(zip(names, given, strict=True))
            node.args = (first, x, *bound.args[2:])
            graph.erase_node(norm)
            matches += 1
    return matches


def fuse_norm_linear(graph: fx.Graph) -> int:
    """linear(rms_norm(x)), the normed rows read by nothing else -> fused_linear(x, norm=weight)."""
    matches = 0
    for norm in graph.find_nodes(op="call_function", target=ops.rms_norm):
        x, weight, eps = _arguments(norm)
        reader = _only_reader(norm)
        if reader is None or not _whole(reader) or norm not in reader.args[:1] or _of(reader, "norm") is not None:
            continue
        with graph.inserting_before(reader):
            fused = _fuse_linear(graph, reader, x=x, norm=weight, eps=eps)
        reader.replace_all_uses_with(fused)
        graph.erase_node(reader)
        graph.erase_node(norm)
        matches += 1
    return matches


def _whole(node: Any) -> bool:
    return isinstance(node, fx.Node) and (node.target in WHOLE_LINEARS or node.target in WHOLE_LINEARS.values())


def _of(call: fx.Node, argument: str) -> Any:
    """An argument of a call by its name; None where the op has none of that name."""
    assert isinstance(call.target, Op)
    names = list(call.target.signature.parameters)
    return call.args[names.index(argument)] if argument in names else None


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
# What linears and experts can take in is taken from the other fusions, so they come after it.
GPU_PASSES: dict[str, Pass] = {
    "linear_silu_mul": fuse_linear_silu_mul,
    "experts_add": fuse_experts_add,
    "linear_add": fuse_linear_add,
    "norm_router": fuse_norm_router,
    "norm_argument": fuse_norm_argument,
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


def _calls(node: Any, op: Op) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.target is op


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other_addend(total: fx.Node | None, addend: fx.Node) -> Any:
    """What is added to `addend` in this sum; None where this is no sum of two that differ."""
    others = [node for node in total.args if node is not addend] if total is not None and _calls(total, ops.add) else []
    return others[0] if len(others) == 1 else None


def _before(residual: Any, call: fx.Node) -> bool:
    """Whether this is an activation, which has the shape of the rows, and is known before the call."""
    return isinstance(residual, fx.Node) and residual.op != "get_attr" and residual < call


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
