"""Lower a captured graph to a Program: a flat list of bound kernel calls, replayed without looking at the graph again.

Values live in numbered slots. Weights, caches and constants sit in their slots from the start; each call fetches its
arguments by index, stores its results by index, and drops the activations that nobody reads after it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from skyline.graph.capture import INPUTS, resolve
from skyline.kernels import Choice, Request, choose
from skyline.ops import Op


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel launch. `arguments` and `results` are slot numbers; `frees` are the slots dead after it."""

    op: Op
    name: str
    run: Callable[..., Any]
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    frees: tuple[int, ...]


class Program:
    """A model ready to run. Not bound to a number of tokens or requests."""

    def __init__(self, calls: list[Call], constants: list[Any], output: int, choices: dict[str, Choice]) -> None:
        self.calls = calls
        self.choices = choices  # by op name
        self._constants = constants  # by slot; None for activations
        self._output = output
        # Flattened for the replay loop: (kernel, argument slots, the single result slot or None, result slots, frees).
        self._flat = [
            (call.run, call.arguments, call.results[0] if len(call.results) == 1 else None, call.results, call.frees)
            for call in calls
        ]

    def __call__(self, input_ids: Any, positions: Any, batch: Any, logit_rows: Any) -> torch.Tensor:
        """input_ids, positions [T] int64; batch an AttentionBatch; logit_rows [R] int64 -> logits [R, vocab]."""
        slots = self._constants.copy()
        slots[: len(INPUTS)] = (input_ids, positions, batch, logit_rows)
        fetch = slots.__getitem__
        for run, arguments, single, results, frees in self._flat:
            value = run(*map(fetch, arguments))
            if single is not None:
                slots[single] = value
            else:
                for slot, part in zip(results, value or (), strict=True):
                    slots[slot] = part
            for slot in frees:
                slots[slot] = None
        logits = slots[self._output]
        assert isinstance(logits, torch.Tensor)
        return logits

    def trace(self, *inputs: Any, visit: Callable[[Call, tuple[Any, ...], tuple[Any, ...]], None]) -> torch.Tensor:
        """Follow the calls on tensors of the meta device, showing each with its arguments and results.

        Answers questions of shape, memory and cost without computing anything.
        """
        slots = self._constants.copy()
        slots[: len(INPUTS)] = inputs
        for call in self.calls:
            arguments = tuple(_to_meta(slots[index]) for index in call.arguments)
            value = (call.op.meta or call.op.reference)(*arguments)
            results = (value,) if len(call.results) == 1 else tuple(value or ())
            visit(call, arguments, results)
            for slot, part in zip(call.results, results, strict=True):
                slots[slot] = part
        logits = slots[self._output]
        assert isinstance(logits, torch.Tensor)
        return logits

    def launches(self) -> Counter[str]:
        """How often each op is called in one step. Views cost nothing and are not counted."""
        return Counter(call.op.name for call in self.calls if call.op.name != "split")


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def lower(graph: fx.Graph, model: nn.Module, device: torch.device, dtype: torch.dtype, **options: bool) -> Program:
    """Choose a kernel for every op of the graph and bind it. Raises NoKernelError if an op has none."""
    choices: dict[str, Choice] = {}
    constants: list[Any] = []
    slot_of: dict[fx.Node, int] = {}
    calls: list[Call] = []
    last_use = _last_uses(graph)

    def new_slot(value: Any = None) -> int:
        constants.append(value)
        return len(constants) - 1

    for node in graph.nodes:
        if node.op == "placeholder":
            slot_of[node] = new_slot()
            if node.target != INPUTS[slot_of[node]]:
                raise ValueError(f"forward() must take {INPUTS} in this order")
        elif node.op == "get_attr":
            slot_of[node] = new_slot(resolve(model, node.target))
        elif node.op == "call_function" and node.target is operator.getitem:
            continue  # its slot was made with the call it picks from
        elif node.op == "call_function":
            op = node.target
            if op.name not in choices:
                choices[op.name] = choose(Request(op, device.type, dtype, **options))
            arguments = tuple(slot_of[a] if isinstance(a, fx.Node) else new_slot(a) for a in node.args)
            count = op.num_outputs(*node.args) if callable(op.num_outputs) else op.num_outputs
            results = tuple(new_slot() for _ in range(count))
            if count == 1:
                slot_of[node] = results[0]
            for user in node.users:
                if user.target is operator.getitem:
                    slot_of[user] = results[user.args[1]]
            frees = tuple(slot_of[value] for value in last_use.get(node, ()))
            calls.append(Call(op, node.name, choices[op.name].kernel.run, arguments, results, frees))
        elif node.op == "output":
            return Program(calls, constants, slot_of[node.args[0]], choices)
    raise ValueError("the graph has no output")


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each call, the activations that it is the last to read."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.target is operator.getitem or node.op == "output":
            continue
        for used in node.all_input_nodes:
            if used.op == "call_function":
                last[used] = node
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    kept = set(output.all_input_nodes)
    uses: dict[fx.Node, list[fx.Node]] = {}
    for value, reader in last.items():
        if value not in kept:
            uses.setdefault(reader, []).append(value)
    return uses
