"""Decode steps on a CPU as recorded calls: one call from Python, whatever the model does.

A recorded step reads its inputs where they were when it was recorded: the slots of its requests and their positions,
from which it finds all else by itself. There is a recording for each number of requests that has occurred.

The rule: a step is replayed where every request computes one token and samples from it, and nobody watches the single
calls; all others run call by call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skyline.engine.messages import StepPlan
from skyline.graph import Program
from skyline.kernels.cpu import decode, sampling
from skyline.kernels.cpu.replay import Recording, Step
from skyline.ops import AttentionBatch
from skyline.ops.batch import BlockTables

_KEPT = 64  # numbers of requests; decoding changes its number rarely, and by one at a time


@dataclass(slots=True)
class Decoded:
    """Of a step, valid until the next one: logits [R, V], greedy tokens [R] int64 and their logits [R] float32."""

    logits: Tensor
    tokens: Tensor
    tops: Tensor


@dataclass(slots=True)
class _Recorded:
    slots: NDArray[np.int64]  # of the step, and the positions of its tokens: all that is written before it runs
    starts: NDArray[np.int64]
    states: NDArray[np.int32]
    model: Recording
    greedy: Recording
    result: Decoded
    version: int  # of the program


class DecodeReplay:
    """Not thread-safe: one thread calls it, in the order of the plans."""

    def __init__(
        self, program: Program, token_ids: Tensor, block_tables: Sequence[NDArray[np.int32]], block_size: int
    ) -> None:
        """token_ids [max_num_seqs + 1, max_model_len + 1] int32 and block_tables, by group [max_num_seqs, blocks that a
        request can have], are the runner's own, read when a step runs."""
        self._program = program
        self._token_ids = token_ids
        self._block_tables = [torch.from_numpy(table) for table in block_tables]
        self._block_size = block_size
        requests = len(block_tables[0])
        self._tables = [torch.zeros_like(table) for table in self._block_tables]
        self._query_starts = torch.arange(requests + 1, dtype=torch.int32)
        self._rows = torch.arange(requests)
        self._known: OrderedDict[int, _Recorded] = OrderedDict()
        self.replayed = False  # whether the last step was

    @property
    def recorded(self) -> list[int]:
        """Numbers of requests whose steps are replayed. Any thread may ask."""
        return sorted(size for size, known in list(self._known.items()) if known.model.recorded)

    def takes(self, plan: StepPlan) -> bool:
        return plan.is_decode and not self._program.observed

    def step(self, plan: StepPlan, greedy: bool) -> Decoded:
        """Run a step that `takes` accepts. greedy: its greedy tokens are wanted, and put where the next step reads
        them; else only the logits are valid."""
        known = self._known.get(len(plan.slots))
        if known is None or known.version != self._program.version:
            known = self._known[len(plan.slots)] = self._record(len(plan.slots))
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(len(plan.slots))
        known.slots[:] = plan.slots
        known.starts[:] = plan.starts
        if plan.state_writes:
            known.states[:] = plan.state_reads, plan.state_writes
        self.replayed = known.model.recorded
        known.model()
        if greedy:
            known.greedy()
        return known.result

    def _record(self, count: int) -> _Recorded:
        slots, starts, ids, positions = torch.zeros((4, count), dtype=torch.int64)
        context_lens = torch.zeros(count, dtype=torch.int32)
        places = torch.zeros((len(self._tables), count), dtype=torch.int64)
        states = torch.zeros((2, count), dtype=torch.int32)
        batch = AttentionBatch(
            tables=tuple(BlockTables(place, table[:count]) for place, table in zip(places, self._tables, strict=True)),
            query_starts=self._query_starts[: count + 1],
            context_lens=context_lens,
            host_query_lens=[1] * count,
            host_context_lens=[self._token_ids.shape[1]] * count,  # nothing that is recorded may look at it
            state_reads=[],
            state_writes=[],
            state_blocks=states,
        )
        steps, logits = self._program.bound_steps(ids, positions, batch, self._rows[:count])
        reading: list[Step] = [(decode.inputs, (ids, positions, context_lens, slots, starts, self._token_ids))]
        for group, own, table in zip(batch.tables, self._tables, self._block_tables, strict=True):
            into = (group.slot_mapping, own[:count])
            reading.append((decode.places, (*into, table, slots, starts, self._block_size)))
        tokens, tops = torch.zeros(count, dtype=torch.int64), torch.zeros(count)
        choosing: list[Step] = [
            (sampling.choose_into, (tokens, tops, logits, None)),
            (decode.outputs, (self._token_ids, slots, starts, tokens)),
        ]
        return _Recorded(
            slots.numpy(),
            starts.numpy(),
            states.numpy(),
            Recording([*reading, *steps]),
            Recording(choosing),
            Decoded(logits, tokens, tops),
            self._program.version,
        )
