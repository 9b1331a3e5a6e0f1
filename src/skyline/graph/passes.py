"""Passes rewrite the captured graph before it is lowered: the place of fusions.

A pass is a function that changes the graph in place and returns how many places it matched. The fused ops have
references like every other, so that a device without a kernel for one loses nothing; GPUs have more passes than CPUs,
because there a launch costs more than what it computes. What does not match exactly is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from skyline import ops
from skyline.graph import gpu_passes
from skyline.graph.matching import arguments_of, calls, constant, outputs_of, picked_from
from skyline.ops import KVCache, Op

Pass = Callable[[fx.Graph], int]

# Ops that give each row of their result from the same row of these arguments, whatever other rows there are.
EACH_ROW: dict[str, tuple[str, ...]] = {
    "add": ("x", "y"),
    "gated_rms_norm": ("x", "gate"),
    "gelu_mul": ("gate_up",),
    "router": ("x",),
    "scale": ("x",),
    "sigmoid_mul": ("x", "gate"),
    "silu_mul": ("gate_up",),
    "split": ("x",),
    "topk_router": ("logits",),
    **{
        name: ("x", "weights", "ids") if name.startswith("moe_experts") else ("x",)
        for name, op in ops.OPS.items()
        if (name.startswith(("linear", "moe_experts")) or name.endswith(("head_rms_norm", "offset_rms_norm")))
        and "x" in op.signature.parameters
        and "nvfp4" not in name  # these quantize rows where there are many
    },
    "layer_norm": ("x",),
    "rms_norm": ("x",),
}

# Ops that multiply by a merged gate and up weight and can apply `silu_mul` to the product, an argument of that name.
GATED_LINEARS = frozenset(
    {
        "linear",
        "linear_fp4",
        "linear_fp8",
        "linear_int4",
        "linear_int4_weight_only",
        "linear_int8",
        "linear_int8_weight_only",
        "linear_nvfp4",
    }
)


def select_rows_early(graph: fx.Graph) -> int:
    """select_rows(f(x)) -> f(select_rows(x)), as far up as nobody reads the other rows.

    So behind the last layer's attention only the last token of a prompt is computed.
    """
    matches = 0
    for selection in graph.find_nodes(op="call_function", target=ops.select_rows):
        last, rows = arguments_of(selection)
        few: set[fx.Node] = {selection}  # whose readers want these rows only
        for node in reversed(graph.nodes):
            if rows < node and _rows_read(node) and node.users and few.issuperset(node.users):
                few.add(node)
        few -= {node for node in few if node.target is operator.getitem and node.args[0] not in few}
        if len(few) == 1:
            continue
        selected: dict[fx.Node, fx.Node] = {}
        for node in [node for node in graph.nodes if node in few and node is not selection]:
            for read in _rows_read(node):
                if read not in few and read not in selected:
                    with graph.inserting_before(node):
                        selected[read] = graph.call_function(ops.select_rows, (read, rows))
                node.replace_input_with(read, selected.get(read, read))
        selection.replace_all_uses_with(last)
        graph.erase_node(selection)
        matches += 1
    return matches


def _rows_read(node: fx.Node) -> list[fx.Node]:
    """The activations whose rows a call takes one by one, if it takes no others; else none."""
    if node.target is operator.getitem:
        return node.all_input_nodes
    if not isinstance(node.target, Op) or node.target.name not in EACH_ROW:
        return []
    named = dict(zip(node.target.signature.parameters, node.args, strict=False))
    taken = {name: value for name, value in named.items() if isinstance(value, fx.Node) and value.op != "get_attr"}
    return list(taken.values()) if taken.keys() <= set(EACH_ROW[node.target.name]) else []


def fuse_add_rms_norm(graph: fx.Graph) -> int:
    """rms_norm(add(x, residual)) -> add_rms_norm; whoever else reads the sum takes it from there."""
    matches = 0
    for norm in graph.find_nodes(op="call_function", target=ops.rms_norm):
        total, weight, eps = arguments_of(norm)
        # The fused call stands where the norm does: a reader of the sum in between would come before it.
        if not calls(total, ops.add) or any(user < norm for user in total.users):
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
    k, v, cache_node, batch = arguments_of(write)
    rope, split = picked_from(k, ops.rope), picked_from(v, ops.split)
    cache = constant(cache_node)
    if rope is None or split is None or not isinstance(cache, KVCache):
        return None
    rotated, parts = outputs_of(rope, 2), outputs_of(split, 3)
    if rotated is None or parts is None or k is not rotated[1] or v is not parts[2]:
        return None

    *turned, positions, table, head_dim = arguments_of(rope)
    norms = [node for node in turned if calls(node, ops.head_rms_norm)]
    weights: list[Any] = [None, None]
    eps: Any = 0.0  # of no norm
    if norms:
        if len(norms) != 2 or norms[0].args[2] != norms[1].args[2]:
            return None
        turned, weights, (eps, _) = map(list, zip(*map(arguments_of, norms), strict=True))
        # A weight of another size would norm groups of columns that are no heads.
        if any(not isinstance(w := constant(weight), Tensor) or w.shape != (cache.head_dim,) for weight in weights):
            return None
    if turned != parts[:2]:
        return None

    qkv, sizes = arguments_of(split)
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
        (product,) = arguments_of(activation)
        op = product.target if isinstance(product, fx.Node) else None
        if not isinstance(op, Op) or op.name not in GATED_LINEARS or len(product.users) != 1:
            continue
        position = list(op.signature.parameters).index("silu_mul")
        arguments = list(arguments_of(product))
        if arguments[position]:
            continue  # its result is activated already
        arguments[position] = True
        product.args = tuple(arguments)
        activation.replace_all_uses_with(product)
        graph.erase_node(activation)
        matches += 1
    return matches


PASSES: dict[str, Pass] = {
    "weight_only_fp4": gpu_passes.weight_only_fp4,  # first: what it leaves, it makes independent of the number of rows
    "select_rows_early": select_rows_early,
    "add_rms_norm": fuse_add_rms_norm,
    "rope_kv_write": fuse_rope_kv_write,
    "linear_silu_mul": fuse_linear_silu_mul,
}
# What linears and experts can take in is taken from the other fusions, so they come after it.
GPU_PASSES: dict[str, Pass] = {
    "weight_only_int4": gpu_passes.weight_only_int4,
    "weight_only_fp4": gpu_passes.weight_only_fp4,
    "linear_silu_mul": fuse_linear_silu_mul,
    "experts_add": gpu_passes.fuse_experts_add,
    "linear_add": gpu_passes.fuse_linear_add,
    "norm_router": gpu_passes.fuse_norm_router,
    "norm_argument": gpu_passes.fuse_norm_argument,
    "norm_linear": gpu_passes.fuse_norm_linear,
    "add_rms_norm": fuse_add_rms_norm,
    "rope_kv_write": fuse_rope_kv_write,
    "rope_attention": gpu_passes.fuse_rope_attention,
    # What these make of linears, no other pass changes.
    "gated_mlp_fp8": gpu_passes.fuse_gated_mlp_fp8,
    "attention_linear_fp8": gpu_passes.fuse_attention_linear_fp8,
}
_TAKE_FP8 = frozenset({"gated_mlp_fp8", "attention_linear_fp8"})


def run_passes(graph: fx.Graph, device: str = "cpu", fp8: bool = True, fp4: bool = False) -> dict[str, int]:
    """Apply every pass for a device ("cpu" or "cuda") in order; the result is how often each one matched.

    fp8: whether a GPU knows FP8. Where torch computes it, attention had better keep a kernel of its own. fp4: whether
    activations may be quantized to FP4.
    """
    left_out = (frozenset() if fp8 else _TAKE_FP8) | ({"weight_only_fp4"} if fp4 else frozenset())
    passes = {n: rewrite for n, rewrite in (GPU_PASSES if device == "cuda" else PASSES).items() if n not in left_out}
    counts = {name: rewrite(graph) for name, rewrite in passes.items()}
    graph.lint()
    return counts
