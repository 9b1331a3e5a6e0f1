"""What passes ask of a graph: what a node calls, of what, and who reads it."""

from __future__ import annotations

import operator
from typing import Any, TypeGuard

from torch import fx

from skyline import ops
from skyline.graph.capture import VALUE
from skyline.ops import Op


def arguments_of(call: fx.Node) -> tuple[Any, ...]:
    """Complete, for ops record them with their defaults; fx's type of them is a union of all there could be."""
    return call.args


def calls(node: Any, op: Op) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.target is op


def only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def other_addend(total: fx.Node | None, addend: fx.Node) -> Any:
    """What is added to `addend` in this sum; None where this is no sum of two that differ."""
    others = [node for node in total.args if node is not addend] if total is not None and calls(total, ops.add) else []
    return others[0] if len(others) == 1 else None


def known_before(residual: Any, call: fx.Node) -> bool:
    """Whether this is an activation, which has the shape of the rows, and is known before the call."""
    return isinstance(residual, fx.Node) and residual.op != "get_attr" and residual < call


def constant(node: Any) -> Any:
    """The parameter, buffer or KV cache that a `get_attr` node stands for; None for anything else."""
    return node.meta.get(VALUE) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def picked_from(node: Any, op: Op) -> fx.Node | None:
    """The call of an op with several outputs that `node` is one of."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return None
    call = node.args[0]
    return call if isinstance(call, fx.Node) and call.target is op else None


def outputs_of(call: fx.Node, count: int) -> list[fx.Node] | None:
    """The outputs of a call, in order; None unless there are `count` of them, each taken out once."""
    taken = {user.args[1]: user for user in call.users if user.target is operator.getitem}
    if len(call.users) != count or taken.keys() != set(range(count)):
        return None
    return [taken[index] for index in range(count)]
