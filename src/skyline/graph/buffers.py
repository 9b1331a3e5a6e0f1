"""The memory of a Program's activations: few buffers, used again and again along the calls.

A result has one row a token or one row of logits wanted; its row's size is known when the graph is, the number of rows
only when a step is. So buffers are planned by bytes a row: one plan serves every number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from skyline.graph.program import Call, Program

_ALIGNMENT = 64
# Numbers of tokens and rows that no model has as a size, to tell by a result's shape which of them it follows.
_PROBE_TOKENS, _PROBE_ROWS = 100_003, 100_019


@dataclass(slots=True)
class _Buffer:
    by_token: bool  # else by row of logits
    row_bytes: int
    memory: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a slot's value lies."""

    slot: int
    buffer: int
    shape: tuple[int, ...]  # of a row
    dtype: torch.dtype


@dataclass(slots=True)
class BufferPlan:
    buffers: list[_Buffer] = field(default_factory=list)
    places: list[_Place] = field(default_factory=list)
    capacity: tuple[int, int] = (0, 0)  # tokens and rows of logits

    def row_bytes(self) -> tuple[int, int]:
        """Bytes that each token of a step takes, and each row of logits."""
        sizes = [0, 0]
        for buffer in self.buffers:
            sizes[0 if buffer.by_token else 1] += buffer.row_bytes
        return sizes[0], sizes[1]

    def reserve(self, num_tokens: int, num_rows: int) -> None:
        """Memory that is not touched is not taken from the system, so reserving much costs nothing."""
        self.capacity = (num_tokens, num_rows)
        for buffer in self.buffers:
            size = buffer.row_bytes * (num_tokens if buffer.by_token else num_rows)
            buffer.memory = torch.empty(size, dtype=torch.uint8)

    def grow(self, num_tokens: int, num_rows: int) -> bool:
        """Make room for a step; whether the buffers had to be replaced."""
        if num_tokens <= self.capacity[0] and num_rows <= self.capacity[1]:
            return False
        self.reserve(max(num_tokens, self.capacity[0]), max(num_rows, self.capacity[1]))
        return True

    def views(self, num_tokens: int, num_rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Each planned slot and its tensor in a step of these sizes."""
        for place in self.places:
            buffer = self.buffers[place.buffer]
            assert buffer.memory is not None
            rows = num_tokens if buffer.by_token else num_rows
            size = place.dtype.itemsize
            stride = _stride(math.prod(place.shape) * size, place.shape) // size
            flat = buffer.memory[: rows * stride * size].view(place.dtype).view(rows, stride)
            yield place.slot, flat[:, : math.prod(place.shape)].view(rows, *place.shape)


def plan_buffers(program: Program) -> BufferPlan:
    """Assign the results of kernels that take their memory from outside to as few bytes as a greedy choice finds."""
    plan = BufferPlan()
    free: list[int] = []
    buffer_of: dict[int, int] = {}  # slot -> buffer, also for views into it
    readers = _last_readers(program)

    def visit(call: Call, arguments: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        if call.is_view and call.arguments[0] in buffer_of:
            buffer_of.update(dict.fromkeys(call.results, buffer_of[call.arguments[0]]))
        elif call.kernel.into is not None:
            for slot, result in zip(call.results, results, strict=True):
                by_token = result.shape[0] == _PROBE_TOKENS
                if not by_token and result.shape[0] != _PROBE_ROWS:
                    raise ValueError(f"{call.op.name} gives a result of {list(result.shape)}: rows of neither kind")
                shape = tuple(result.shape[1:])
                index = _take(plan, free, by_token, _row_bytes(shape, result.dtype))
                plan.places.append(_Place(slot, index, shape, result.dtype))
                buffer_of[slot] = index
        for index in readers.get(id(call), ()):
            if index in buffer_of and buffer_of[index] not in free and not _still_read(index, buffer_of, remaining):
                free.append(buffer_of[index])

    remaining: set[int] = set(slot for call in program.calls for slot in call.results)

    def visit_and_retire(call: Call, arguments: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        remaining.difference_update(readers.get(id(call), ()))
        visit(call, arguments, results)

    program.trace_sizes(_PROBE_TOKENS, _PROBE_ROWS, visit_and_retire)
    return plan


def _last_readers(program: Program) -> dict[int, list[int]]:
    """By call, the slots of activations that nobody reads after it; a result nobody reads at all ends with its call."""
    last: dict[int, int] = {}
    for call in program.calls:
        for slot in (*call.arguments, *call.results):
            last[slot] = id(call)
    ends: dict[int, list[int]] = {}
    made = {slot for call in program.calls for slot in call.results}
    for slot, call_id in last.items():
        if slot in made and slot != program.output:
            ends.setdefault(call_id, []).append(slot)
    return ends


def _still_read(slot: int, buffer_of: dict[int, int], remaining: set[int]) -> bool:
    """Whether another value in the same buffer, a view of it or what it is a view of, is still to be read."""
    return any(other in remaining for other, buffer in buffer_of.items() if buffer == buffer_of[slot])


def _stride(row_bytes: int, shape: tuple[int, ...]) -> int:
    """Bytes from row to row. Rows whose starts lie a power of two apart would compete for few places of the cache."""
    return row_bytes + _ALIGNMENT if len(shape) == 1 and row_bytes % 1024 == 0 else row_bytes


def _row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    size = _stride(math.prod(shape) * dtype.itemsize, shape)
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _take(plan: BufferPlan, free: list[int], by_token: bool, row_bytes: int) -> int:
    """A free buffer of that kind: the smallest that is large enough, else the largest, made larger; else a new one."""
    candidates = [index for index in free if plan.buffers[index].by_token == by_token]
    if not candidates:
        plan.buffers.append(_Buffer(by_token, row_bytes))
        return len(plan.buffers) - 1
    fitting = [index for index in candidates if plan.buffers[index].row_bytes >= row_bytes]
    if fitting:
        chosen = min(fitting, key=lambda index: plan.buffers[index].row_bytes)
    else:
        chosen = max(candidates, key=lambda index: plan.buffers[index].row_bytes)
        plan.buffers[chosen].row_bytes = row_bytes
    free.remove(chosen)
    return chosen
