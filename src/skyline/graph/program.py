"""Lower a captured graph to a Program: a flat list of bound kernel calls, replayed without looking at the graph again.

Values live in numbered slots. Weights, caches and constants sit in their slots from the start. The results of kernels
that write to memory they are given are planned ahead (buffers.py): for each combination of sizes that a step can have
they become views of the same few buffers, so that such a call's arguments are all known before the step begins and are
bound once. Other kernels return new tensors, which are dropped after their last use.
"""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from skyline.graph.buffers import BufferPlan, plan_buffers
from skyline.graph.capture import INPUTS, resolve
from skyline.kernels import Choice, Kernel, Layout, Request, choose, finish_weight
from skyline.kernels.tuning import Tunings
from skyline.ops import AttentionBatch, Op

# Sizes for which bound arguments are kept. Decoding changes its number of requests rarely, and by one at a time.
_KEPT_BINDINGS = 64


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel launch. `arguments` and `results` are slot numbers; `frees` are the slots dead after it."""

    op: Op
    name: str
    kernel: Kernel
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    frees: tuple[int, ...]

    @property
    def is_view(self) -> bool:
        """Whether the results are parts of the first argument's memory."""
        return self.op.name == "split"


@dataclass(frozen=True, slots=True)
class WeightUse:
    """A parameter of the model in the layout that some kernels want; None is the parameter as it is."""

    slot: int
    parameter: torch.Tensor
    layout: Layout | None


@dataclass(slots=True)
class _Step:
    """One call, bound. Without `fetch`, `arguments` is all it needs; else they are the values in those slots."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    fetch: tuple[int, ...] | None = None
    results: tuple[int, ...] = ()  # slots of what `run` returns
    frees: tuple[int, ...] = ()


@dataclass(slots=True)
class _Binding:
    values: list[Any]
    steps: list[_Step] = field(default_factory=list)


class Program:
    """A model ready to run. Not bound to a number of tokens or requests."""

    def __init__(
        self,
        calls: list[Call],
        constants: list[Any],
        output: int,
        choices: dict[str, Choice],
        weights: list[WeightUse],
        dtype: torch.dtype,
    ) -> None:
        self.calls = calls
        self.dtype = dtype  # of the activations
        self.choices = choices  # by op name
        self.weights = weights
        self.fusions: dict[str, int] = {}  # how often each pass matched
        self._tunings = Tunings("")
        self._constants = constants  # by slot; None for activations
        self._output = output
        self._plan: BufferPlan | None = None
        self._bindings: OrderedDict[tuple[int, int], _Binding] = OrderedDict()
        self.version = 0  # of what bound calls hold: memory, weights, tactics
        self._around: Callable[[Call, Callable[..., Any]], Callable[..., Any]] | None = None

    def set_weight(self, use: WeightUse, value: Any) -> None:
        """Give a weight its contents, in the layout that was asked for."""
        self._constants[use.slot] = value
        self._forget_bindings()

    @property
    def plan(self) -> BufferPlan:
        if self._plan is None:
            self._plan = plan_buffers(self)
        return self._plan

    def reserve(self, num_tokens: int, num_rows: int) -> None:
        """Make room for steps of so many tokens and rows of logits at once; larger steps would allocate anew."""
        self.plan.reserve(num_tokens, num_rows)
        self._forget_bindings()

    def tune(self, tunings: Tunings) -> None:
        """Use these tactics from the next step on."""
        self._tunings = tunings
        self._forget_bindings()

    def slots(self, inputs: tuple[Any, ...] = ()) -> list[Any]:
        """By slot, what is there when a step begins: its inputs, and what is the same in every step."""
        values = self._constants.copy()
        values[: len(inputs)] = inputs
        return values

    def constant(self, slot: int) -> Any:
        """What is in this slot in every step: a weight, a cache, a number. None if it is not the same in every step."""
        return self._constants[slot]

    def observe(self, around: Callable[[Call, Callable[..., Any]], Callable[..., Any]] | None) -> None:
        """Let around(call, run) take the place of each call's `run` from the next step on; None: no longer.

        `run` takes the call's results, where its kernel writes to them (Kernel.into), and then its arguments.
        """
        self._around = around
        self._forget_bindings()

    @property
    def observed(self) -> bool:
        return self._around is not None

    def __call__(self, input_ids: Any, positions: Any, batch: Any, logit_rows: Any) -> torch.Tensor:
        """input_ids, positions [T] int64; batch an AttentionBatch; logit_rows [R] int64 -> logits [R, vocab].

        The logits are valid until the next call.
        """
        binding = self._bind(input_ids.shape[0], logit_rows.shape[0])
        slots = binding.values.copy()
        slots[: len(INPUTS)] = (input_ids, positions, batch, logit_rows)
        fetch = slots.__getitem__
        for step in binding.steps:
            if step.fetch is None:
                step.run(*step.arguments)
                continue
            value = step.run(*map(fetch, step.fetch))
            if len(step.results) == 1:
                slots[step.results[0]] = value
            else:
                for slot, part in zip(step.results, value or (), strict=True):
                    slots[slot] = part
            for slot in step.frees:
                slots[slot] = None
        logits = slots[self._output]
        assert isinstance(logits, torch.Tensor)
        return logits

    def _bind(self, num_tokens: int, num_rows: int) -> _Binding:
        key = (num_tokens, num_rows)
        if (found := self._bindings.get(key)) is not None:
            self._bindings.move_to_end(key)
            return found
        binding = self._bindings[key] = self._bound(num_tokens, num_rows, None)
        if len(self._bindings) > _KEPT_BINDINGS:
            self._bindings.popitem(last=False)
        return binding

    def bound_steps(
        self, input_ids: Any, positions: Any, batch: Any, logit_rows: Any
    ) -> tuple[list[tuple[Callable[..., Any], tuple[Any, ...]]], torch.Tensor]:
        """A step on inputs that stay where they are: its calls with their arguments, and where they put the logits.

        Valid while `version` stays the same. Raises ValueError if some kernel returns memory of its own.
        """
        binding = self._bound(input_ids.shape[0], logit_rows.shape[0], (input_ids, positions, batch, logit_rows))
        if any(step.fetch is not None for step in binding.steps):
            raise ValueError("a kernel returns memory of its own, so not all of a step is known before it begins")
        return [(step.run, step.arguments) for step in binding.steps], binding.values[self._output]

    def _bound(self, num_tokens: int, num_rows: int, inputs: tuple[Any, ...] | None) -> _Binding:
        plan = self.plan
        if plan.grow(num_tokens, num_rows):
            self._forget_bindings()  # they hold views of the buffers that were too small
        values = self._constants.copy()
        known = [True] * len(values)
        for slot in (*range(len(INPUTS)), *(slot for call in self.calls for slot in call.results)):
            known[slot] = False
        if inputs is not None:
            values[: len(INPUTS)], known[: len(INPUTS)] = inputs, [True] * len(INPUTS)
        for slot, view in plan.views(num_tokens, num_rows):
            values[slot], known[slot] = view, True
        binding = _Binding(values)
        for call in self.calls:
            for step in self._bind_call(call, values, known):
                if self._around is not None:
                    step.run = self._around(call, step.run)
                binding.steps.append(step)
        return binding

    def _forget_bindings(self) -> None:
        self._bindings.clear()
        self.version += 1

    def _bind_call(self, call: Call, values: list[Any], known: list[bool]) -> Iterator[_Step]:
        if call.is_view and known[call.arguments[0]]:
            for slot, part in zip(
                call.results, call.kernel.run(*(values[slot] for slot in call.arguments)), strict=True
            ):
                values[slot], known[slot] = part, True
            return
        if call.kernel.into is None:
            yield _Step(call.kernel.run, (), call.arguments, call.results, call.frees)
            return
        slots = (*call.results, *call.arguments)
        into = call.kernel.into
        if call.kernel.tactics is not None and known[call.arguments[0]]:
            rows, weight = (values[slot] for slot in call.arguments[:2])
            into = self._tunings.into(call.kernel, rows.shape[0], weight) or into
        if all(known[slot] for slot in slots):
            yield _Step(into, tuple(values[slot] for slot in slots))
        else:
            yield _Step(into, (), slots)

    def trace(self, *inputs: Any, visit: Callable[[Call, tuple[Any, ...], tuple[Any, ...]], None]) -> torch.Tensor:
        """Follow the calls on tensors of the meta device, showing each with its arguments and results.

        Answers questions of shape, memory and cost without computing anything. Weights are described by the model's
        parameters, whatever layout they have.
        """
        slots = self._constants.copy()
        slots[: len(INPUTS)] = inputs
        for use in self.weights:
            slots[use.slot] = use.parameter
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

    def trace_sizes(
        self, num_tokens: int, num_rows: int, visit: Callable[[Call, tuple[Any, ...], tuple[Any, ...]], None]
    ) -> None:
        """`trace` of a step of one request that computes `num_tokens` and wants `num_rows` rows of logits."""
        ids = torch.empty(num_tokens, dtype=torch.int64, device="meta")
        rows = torch.empty(num_rows, dtype=torch.int64, device="meta")
        batch = AttentionBatch.build([[0]], [0], [1], num_tokens, torch.device("cpu"))
        self.trace(ids, ids, batch, rows, visit=visit)

    @property
    def output(self) -> int:
        """The slot of the logits."""
        return self._output

    def launches(self) -> Counter[str]:
        """How often each op is called in one step. Views cost nothing and are not counted."""
        return Counter(call.op.name for call in self.calls if not call.is_view)


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def lower(graph: fx.Graph, model: nn.Module, device: torch.device, dtype: torch.dtype, **options: Any) -> Program:
    """Choose a kernel for every op of the graph and bind it. Raises NoKernelError if an op has none.

    options: further fields of skyline.kernels.Request. Parameters on the meta device are weights still to be read:
    Program.weights says in which layout, and Program.set_weight takes them.
    """
    builder = _Builder(device, dtype, options)
    last_use = _last_uses(graph)
    for node in graph.nodes:
        if node.op == "placeholder":
            builder.slot_of[node] = builder.new_slot()
            if node.target != INPUTS[builder.slot_of[node]]:
                raise ValueError(f"forward() must take {INPUTS} in this order")
        elif node.op == "get_attr":
            builder.attributes[node] = resolve(model, node.target)
        elif node.op == "call_function" and node.target is not operator.getitem:
            builder.add_call(node, last_use.get(node, []))
        elif node.op == "output":
            return builder.finish(builder.slot_of[node.args[0]])
    raise ValueError("the graph has no output")


class _Builder:
    def __init__(self, device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self.slot_of: dict[fx.Node, int] = {}
        self.attributes: dict[fx.Node, Any] = {}
        self._device, self._dtype, self._options = device, dtype, options
        self._choices: dict[str, Choice] = {}
        self._constants: list[Any] = []
        self._calls: list[Call] = []
        self._weights: dict[tuple[int, int], WeightUse] = {}  # by parameter and layout
        self._flexible: list[tuple[int, int, torch.Tensor]] = []  # call, argument, parameter: any layout will do

    def new_slot(self, value: Any = None) -> int:
        self._constants.append(value)
        return len(self._constants) - 1

    def add_call(self, node: fx.Node, dead: list[fx.Node]) -> None:
        op = node.target
        assert isinstance(op, Op)
        if op.name not in self._choices:
            self._choices[op.name] = choose(Request(op, self._device.type, self._dtype, **self._options))
        kernel = self._choices[op.name].kernel
        plain = tuple(self.attributes.get(a, a) if isinstance(a, fx.Node) else a for a in node.args)
        arguments = tuple(self._argument(kernel, index, a, plain) for index, a in enumerate(node.args))
        count = op.num_outputs(*node.args) if callable(op.num_outputs) else op.num_outputs
        results = tuple(self.new_slot() for _ in range(count))
        if count == 1:
            self.slot_of[node] = results[0]
        for user in node.users:
            if user.target is operator.getitem:
                index = user.args[1]
                assert isinstance(index, int)
                self.slot_of[user] = results[index]
        frees = tuple(self.slot_of[value] for value in dead)
        self._calls.append(Call(op, node.name, kernel, arguments, results, frees))

    def _argument(self, kernel: Kernel, index: int, argument: Any, plain: tuple[Any, ...]) -> int:
        if not isinstance(argument, fx.Node):
            return self.new_slot(argument)
        if argument not in self.attributes:
            return self.slot_of[argument]
        value = self.attributes[argument]
        if not isinstance(value, nn.Parameter):
            if argument not in self.slot_of:
                self.slot_of[argument] = self.new_slot(value)
            return self.slot_of[argument]
        if index in kernel.any_layout:
            self._flexible.append((len(self._calls), index, value))
            return -1
        wanted = kernel.layouts.get(index)
        layout: Layout | None = wanted(plain) if callable(wanted) else wanted
        return self._weight(value, layout)

    def _weight(self, parameter: torch.Tensor, layout: Layout | None) -> int:
        key = (id(parameter), id(layout))
        if key not in self._weights:
            self._weights[key] = WeightUse(self.new_slot(parameter), parameter, layout)
        return self._weights[key].slot

    def finish(self, output: int) -> Program:
        for at, index, parameter in self._flexible:
            known = [use.slot for use in self._weights.values() if use.parameter is parameter]
            slot = known[0] if known else self._weight(parameter, None)
            call = self._calls[at]
            arguments = (*call.arguments[:index], slot, *call.arguments[index + 1 :])
            self._calls[at] = Call(call.op, call.name, call.kernel, arguments, call.results, call.frees)
        weights = list(self._weights.values())
        program = Program(self._calls, self._constants, output, self._choices, weights, self._dtype)
        for use in weights:
            if use.layout is not None and not use.parameter.is_meta:  # a model that is already filled
                target = use.layout.allocate(tuple(use.parameter.shape), use.parameter.dtype, use.parameter.device)
                use.layout.write(target, 0, use.parameter.detach().reshape(-1, use.parameter.shape[-1]))
                finish_weight(use.layout, target)
                program.set_weight(use, target)
        return program


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
