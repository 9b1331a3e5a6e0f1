"""Passes that only GPUs have, where a launch costs more than what it computes: linears, experts and routers take in the
norm before them, the sum behind them, or what makes their input.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from skyline import ops
from skyline.graph.matching import arguments_of, calls, constant, known_before, only_reader, other_addend
from skyline.ops import Op

# Ops whose kernels can norm their second argument: the norm, and the names under which they take what that is given.
NORMING: tuple[tuple[Op, Op, tuple[str, ...]], ...] = (
    (ops.latent_rope_write, ops.rms_norm, ("norm", "eps")),
    (ops.index_topk, ops.layer_norm, ("norm", "norm_bias", "eps")),
)

# Linears whose kernels can norm what they read and add to the residual stream what they give.
WHOLE_LINEARS: dict[Op, Op] = {
    ops.linear: ops.fused_linear,
    ops.linear_fp4: ops.fused_linear_fp4,
    ops.linear_fp8: ops.fused_linear_fp8,
    ops.linear_int4_weight_only: ops.fused_linear_int4,
    ops.linear_nvfp4: ops.fused_linear_nvfp4,
}

# Experts whose kernels can add to the residual stream what they give.
WHOLE_EXPERTS: dict[Any, Op] = {
    ops.moe_experts: ops.fused_experts,
    ops.moe_experts_fp4: ops.moe_experts_fp4,
    ops.moe_experts_fp8: ops.moe_experts_fp8,
    ops.moe_experts_int4_weight_only: ops.moe_experts_int4_weight_only,
    ops.moe_experts_nvfp4: ops.moe_experts_nvfp4,
}

# What multiplies integers of int4 on CPUs, and numbers on GPUs, whose matrix units have no use for groups of integers.
_WEIGHT_ONLY_INT4: dict[Op, Op] = {
    ops.linear_int4: ops.linear_int4_weight_only,
    ops.moe_experts_int4: ops.moe_experts_int4_weight_only,
}
# What is made for matrix units that multiply FP4.
_WEIGHT_ONLY_FP4: dict[Op, Op] = {ops.linear_nvfp4: ops.linear_fp4, ops.moe_experts_nvfp4: ops.moe_experts_fp4}


def weight_only_int4(graph: fx.Graph) -> int:
    """linear_int4, moe_experts_int4 -> the same without quantizing activations."""
    return _leave_activations(graph, _WEIGHT_ONLY_INT4)


def weight_only_fp4(graph: fx.Graph) -> int:
    """linear_nvfp4, moe_experts_nvfp4 -> the same without quantizing activations."""
    return _leave_activations(graph, _WEIGHT_ONLY_FP4)


def _leave_activations(graph: fx.Graph, plain_of: dict[Op, Op]) -> int:
    matches = 0
    for op, plain in plain_of.items():
        for node in graph.find_nodes(op="call_function", target=op):
            bound = plain.signature.bind(*node.args)
            bound.apply_defaults()
            node.target, node.args = plain, bound.args
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

    Experts in FP8, FP4 and int4 take the residual themselves.

    Where shared experts stand beside them, residual + (experts + shared) is made (residual + experts) + shared, so that
    `fuse_linear_add` can follow.
    """
    matches = 0
    for experts in [node for node in graph.nodes if node.target in WHOLE_EXPERTS]:
        total = only_reader(experts)
        residual = other_addend(total, experts)
        if total is not None and residual is not None and not known_before(residual, experts):
            outer = only_reader(total)
            stream = other_addend(outer, total)
            if outer is not None and known_before(stream, experts):
                total.args, outer.args = (stream, experts), (total, residual)
                residual = stream
        if total is None or not known_before(residual, experts):
            continue
        with graph.inserting_before(experts):
            fused = graph.call_function(WHOLE_EXPERTS[experts.target], (*arguments_of(experts)[:5], residual))
        total.replace_all_uses_with(fused)
        graph.erase_node(total)
        graph.erase_node(experts)
        matches += 1
    return matches


def fuse_norm_router(graph: fx.Graph) -> int:
    """router(rms_norm(x)) -> norm_router(x); whoever else reads the normed rows takes them from there."""
    matches = 0
    for router in graph.find_nodes(op="call_function", target=ops.router):
        norm, *rest = arguments_of(router)
        # The fused call stands where the router does.
        if not calls(norm, ops.rms_norm) or any(user < router for user in norm.users):
            continue
        with graph.inserting_before(router):
            fused = graph.call_function(ops.norm_router, (*arguments_of(norm), *rest))
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
            first, norm, *_ = arguments_of(node)
            if not calls(norm, kind) or len(norm.users) != 1 or _of(node, names[0]) is not None:
                continue
            x, *given = arguments_of(norm)
            bound = op.signature.bind(*arguments_of(node))
            bound.arguments.update(zip(names, given, strict=True))
            node.args = (first, x, *bound.args[2:])
            graph.erase_node(norm)
            matches += 1
    return matches


def fuse_norm_linear(graph: fx.Graph) -> int:
    """linear(rms_norm(x)), the normed rows read by nothing else -> fused_linear(x, norm=weight)."""
    matches = 0
    for norm in graph.find_nodes(op="call_function", target=ops.rms_norm):
        x, weight, eps = arguments_of(norm)
        reader = only_reader(norm)
        if reader is None or not _whole(reader) or norm not in reader.args[:1] or _of(reader, "norm") is not None:
            continue
        with graph.inserting_before(reader):
            fused = _fuse_linear(graph, reader, x=x, norm=weight, eps=eps)
        reader.replace_all_uses_with(fused)
        graph.erase_node(reader)
        graph.erase_node(norm)
        matches += 1
    return matches


def fuse_gated_mlp_fp8(graph: fx.Graph) -> int:
    """fused_linear_fp8(fused_linear_fp8(x, silu_mul=True)), read by nothing else -> gated_mlp_fp8(x)."""
    matches = 0
    for down in [node for node in graph.nodes if node.target in _FP8_LINEARS]:
        last = _bound(down)
        inner = last["x"]
        if not isinstance(inner, fx.Node) or inner.target not in _FP8_LINEARS or len(inner.users) != 1:
            continue
        first = _bound(inner)
        plain = last["bias"] is None and last["norm"] is None and not last["silu_mul"]
        if not plain or not first["silu_mul"] or first["bias"] is not None or first["residual"] is not None:
            continue
        arguments = (first["x"], first["weight"], last["weight"], first["norm"], first["eps"], last["residual"])
        _replace(graph, ops.gated_mlp_fp8, arguments, down, inner)
        matches += 1
    return matches


def fuse_rope_attention(graph: fx.Graph) -> int:
    """paged_attention(rope_kv_write(qkv)) of one cache, the rotated queries read by nothing else -> rope_attention."""
    matches = 0
    for attention in graph.find_nodes(op="call_function", target=ops.paged_attention):
        q, cache, batch, *rest = arguments_of(attention)
        if not calls(q, ops.rope_kv_write) or len(q.users) != 1:
            continue
        *turn, written, of = arguments_of(q)
        if constant(written) is not constant(cache) or of is not batch or _used_between(graph, cache, q, attention):
            continue
        _replace(graph, ops.rope_attention, (*turn, cache, batch, *rest), attention, q)
        matches += 1
    return matches


def _used_between(graph: fx.Graph, cache: Any, first: fx.Node, last: fx.Node) -> bool:
    """Whether anything between two calls reads or writes the cache."""
    known = [node for node in graph.find_nodes(op="get_attr") if constant(node) is constant(cache)]
    return any(first < user < last for node in known for user in node.users)


def fuse_attention_linear_fp8(graph: fx.Graph) -> int:
    """fused_linear_fp8(paged_attention(q)) or (rope_attention(qkv)), read by nothing else -> attention_linear_fp8."""
    matches = 0
    for linear in [node for node in graph.nodes if node.target in _FP8_LINEARS]:
        product = _bound(linear)
        attention = product["x"]
        turns = calls(attention, ops.rope_attention)
        if not (turns or calls(attention, ops.paged_attention)) or len(attention.users) != 1:
            continue
        if product["norm"] is not None or product["silu_mul"]:
            continue
        q, *rest = arguments_of(attention)
        turn, rest = (rest[:5], rest[5:]) if turns else ([], rest)
        # It moves to where the linear is: nothing in between may write to its cache.
        if _used_between(graph, rest[0], attention, linear):
            continue
        arguments = (q, product["weight"], *rest, product["bias"], product["residual"], *turn)
        _replace(graph, ops.attention_linear_fp8, arguments, linear, attention)
        matches += 1
    return matches


_FP8_LINEARS: frozenset[Any] = frozenset({ops.linear_fp8, ops.fused_linear_fp8})


def _bound(linear: fx.Node) -> dict[str, Any]:
    """The arguments of a linear in FP8 by the names of its fused form."""
    bound = ops.fused_linear_fp8.signature.bind(*linear.args)
    bound.apply_defaults()
    return bound.arguments


def _replace(graph: fx.Graph, op: Op, arguments: tuple[Any, ...], outer: fx.Node, inner: fx.Node) -> None:
    """One call in the place of `outer`, and of what only it reads."""
    with graph.inserting_before(outer):
        fused = graph.call_function(op, arguments)
    outer.replace_all_uses_with(fused)
    graph.erase_node(outer)
    graph.erase_node(inner)


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
