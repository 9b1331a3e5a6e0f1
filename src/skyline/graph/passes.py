"""Passes rewrite the captured graph before it is lowered: the place of fusions.

A pass is a function that changes the graph in place and returns how many places it matched. None is registered yet: the
fused kernels they would introduce come with the native CPU provider.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

Pass = Callable[[fx.Graph], int]

PASSES: dict[str, Pass] = {}


def run_passes(graph: fx.Graph) -> dict[str, int]:
    """Apply every pass in order; the result is how often each one matched."""
    counts = {name: rewrite(graph) for name, rewrite in PASSES.items()}
    graph.lint()
    return counts
