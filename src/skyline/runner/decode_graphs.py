"""Decode steps on a GPU as recorded CUDA graphs: one launch for the host, whatever the model does.

A graph reads its inputs where they were when it was recorded. So those of a step (slots, positions, places in the
caches) are copied there first, and block tables stay on the device, to which only new blocks are added. There is a
graph for each of a few numbers of requests; a step takes the next larger one, and its surplus rows are padding: a slot
that nobody has, a context of 0, no place in any cache.

The rule: a step is replayed where every request computes one token and samples from it; all others run call by call.
Sizes are recorded ahead while the engine has nothing to do: those first that have occurred, once some step has. One
that a running load needs is recorded between two steps, after as many steps of that size as recording it costs. If
that fails, it is reported once and everything runs call by call.

Only the device knows the numbers of such a step. If one of its kernels does not compile, no reference could take its
place: so the step goes the way of all others, and so do those that follow.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skyline.engine.messages import StepPlan
from skyline.graph import Call, Program
from skyline.kernels.triton import DeviceOnlyError
from skyline.kernels.triton.knobs import Knobs, using
from skyline.ops import AttentionBatch
from skyline.ops.batch import BlockTables, to_device
from skyline.runner.decode_knobs import DecodeKnobs
from skyline.runner.decode_replay import Decoded
from skyline.runner.recording import Recording, record, replay_seconds
from skyline.runner.sampling import choose

_LOG = logging.getLogger(__name__)

# Rows of a step's inputs; behind them, a row of places for each group of caches.
_SLOTS, _POSITIONS, _CONTEXTS, _STATE_READS, _STATE_WRITES, _PLACES = range(6)

# Steps of a size after which it is recorded: by then call by call has lost about as much time as recording takes.
WORTH = 4

# Ops whose references in torch look at no value of a tensor; others do, or go by the host's numbers.
_PLAIN = frozenset(
    {"add", "embedding", "gelu_mul", "linear", "scale", "select_rows", "sigmoid_mul", "silu_mul", "split"}
)
_RECORDABLE = frozenset({"triton", "flashinfer"})


def recordable(call: Call) -> bool:
    """Whether what a call launches goes by no value that the device has."""
    return call.kernel.provider in _RECORDABLE or call.op.name in _PLAIN


def why_not_recorded(program: Program) -> str | None:
    """None if every call of a decode step can be recorded, else the reason."""
    for call in program.calls:
        if not recordable(call):
            return f"{call.op.name} runs in {call.kernel.provider}, which looks at values on the host"
    return None


def graph_sizes(most: int) -> list[int]:
    """Numbers of requests to record graphs for: under half of a step's rows is padding, from 17 on under a third."""
    sizes = [1, 2, 3, 4, 6, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 64, 64)]
    kept = [size for size in sizes if size < most]
    return [*kept, most]


@dataclass(slots=True)
class _Recorded:
    inputs: Tensor  # [rows above, size] int64
    uses: int = 0  # steps that ran call by call
    recording: Recording[Decoded] | None = None


class DecodeGraphs:
    """Not thread-safe: one thread calls it, in the order of the plans."""

    def __init__(
        self,
        program: Program,
        token_ids: Tensor,
        *,
        table_shape: tuple[int, int, int],
        block_size: int,
        record: bool = True,
        knobs: DecodeKnobs | None = None,
    ) -> None:
        """token_ids [max_num_seqs + 1, max_model_len + 1] int32 on the device; its last row is the padding's.

        table_shape: groups of caches, max_num_seqs, blocks that a request can have. record: False runs the same steps
        call by call. knobs: what was found to be fastest, if something was.
        """
        self._program = program
        self._token_ids = token_ids
        self._block_size = block_size
        self._record = record
        self._device = token_ids.device
        groups, requests, width = table_shape
        self._tables = torch.zeros((groups, requests + 1, width), dtype=torch.int32, device=self._device)
        self._sizes = graph_sizes(requests)
        self._query_starts = torch.arange(requests + 1, dtype=torch.int32, device=self._device)
        self._rows = torch.arange(requests, device=self._device)
        self._knobs = knobs or DecodeKnobs("")
        self._known: dict[int, _Recorded] = {}
        self._due: list[int] = []  # sizes
        self.replayed = False  # whether the last step was
        self._states: bool | None = None  # whether the model has recurrent states; not known before the first step
        self._compiles = True
        self._pool: Any = None  # of memory, which all graphs share: no two run at once
        self._logits: Tensor | None = None  # [max_num_seqs, V], of whichever graph ran last

    @property
    def recorded(self) -> list[int]:
        """Sizes there are graphs for. Any thread may ask."""
        return sorted(size for size, known in list(self._known.items()) if known.recording is not None)

    @property
    def due(self) -> bool:
        """Whether `record_due` has something to record."""
        return bool(self._due)

    def set_knobs(self, knobs: DecodeKnobs) -> None:
        """From the next step on; what is recorded is recorded anew."""
        self._knobs = knobs
        self._known.clear()
        self._due.clear()

    def takes(self, plan: StepPlan) -> bool:
        return self._compiles and plan.is_decode

    def add_blocks(self, new_blocks: Sequence[tuple[int, int, list[int]]], known: Sequence[int]) -> None:
        """A plan's `new_blocks`, and how many each of them had in its table before."""
        places = [
            np.arange(before, before + len(blocks)) + (group * self._tables.shape[1] + slot) * self._tables.shape[2]
            for (slot, group, blocks), before in zip(new_blocks, known, strict=True)
        ]
        values = [np.array(blocks, np.int64) for _, _, blocks in new_blocks]
        update = to_device(np.stack((np.concatenate(places), np.concatenate(values))), self._device)
        self._tables.view(-1).index_copy_(0, update[0], update[1].int())

    def step(self, plan: StepPlan, tables: Sequence[NDArray[np.int32]]) -> Decoded | None:
        """Queue a step that `takes` accepts; None if this way is closed, and the step is still to be done.

        tables: the host's block tables by group, [max_num_seqs, blocks].
        """
        count = len(plan.slots)
        size = self._sizes[bisect.bisect_left(self._sizes, count)]
        host = self._padding(size, len(tables))
        slots, starts = np.array(plan.slots), np.array(plan.starts)
        host[_SLOTS, :count], host[_POSITIONS, :count], host[_CONTEXTS, :count] = slots, starts, starts + 1
        if plan.state_writes:
            host[_STATE_READS, :count], host[_STATE_WRITES, :count] = plan.state_reads, plan.state_writes
        blocks, offsets = np.divmod(starts, self._block_size)
        for group, table in enumerate(tables):
            host[_PLACES + group, :count] = table[slots, blocks].astype(np.int64) * self._block_size + offsets

        self._states, known = bool(plan.state_writes), self._of(size)
        self.replayed = known.recording is not None
        try:
            if self._states and not (known.uses or self.replayed):
                # Padding alone: if a kernel does not compile, none may have written a state, or the next way to do this
                # step would advance it once more.
                self._step(known.inputs)
            staged = torch.from_numpy(host)
            known.inputs.copy_(staged.pin_memory() if self._device.type == "cuda" else staged, non_blocking=True)
            if known.recording is None:
                known.uses += 1
                if known.uses == WORTH and self._record:
                    self._due.append(size)
                return self._step(known.inputs)
        except DeviceOnlyError as error:
            self._compiles = self._record = False
            _LOG.warning("decode steps are not recorded, and run like all others: %s", error)
            return None
        known.recording.graph.replay()
        return known.recording.result

    def record_next(self) -> bool:
        """Record one size more. Call it between steps; False if none is left."""
        if not self._record or self._states is None:
            return False
        missing = sorted(set(self._sizes).difference(self.recorded))
        if missing:
            self._record_size(max(missing, key=lambda size: self._known[size].uses if size in self._known else 0))
        return self._record and len(missing) > 1

    def record_due(self) -> None:
        """Record the sizes that the load needs. Call it between steps."""
        while self._due and self._record:
            self._record_size(self._due.pop())

    def time_step(self, size: int, context: int, knobs: Knobs, repeats: int = 9) -> float:
        """Median seconds of a recorded step of `size` requests with so many tokens each.

        Their last ones are chosen at random: the same ones would all go to the same experts of a mixture.

        Overwrites KV cache, tables and tokens. Raises what recording it raises.
        """
        blocks = -(-context // self._block_size)
        own = torch.arange(size * blocks, dtype=torch.int32, device=self._device).view(size, blocks)
        self._tables[:, :size, :blocks] = own
        inputs = torch.zeros((_PLACES + len(self._tables), size), dtype=torch.int64, device=self._device)
        inputs[_SLOTS] = self._rows[:size]
        inputs[_POSITIONS], inputs[_CONTEXTS] = context - 1, context
        inputs[_STATE_READS], inputs[_STATE_WRITES] = -1, -1  # recurrent states begin, and none is kept
        inputs[_PLACES:] = own[:, -1].long() * self._block_size + (context - 1) % self._block_size
        with using(knobs):
            vocabulary = self._run(inputs, True).logits.shape[1]  # compiles
            chosen = torch.randint(vocabulary, (size,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
            self._token_ids[:size, context - 1] = chosen.to(self._device)
            graph = record(lambda: self._run(inputs, True), self._pool).graph
        return replay_seconds(graph, repeats)

    def time_replay(self, size: int, repeats: int = 9) -> float:
        """Median seconds of the last step of `size` requests, one of `recorded`, done again without the host.

        Recurrent states go on by as many steps; nothing else changes.
        """
        recording = self._known[size].recording
        assert recording is not None
        return replay_seconds(recording.graph, repeats, 4)

    @torch.inference_mode()
    def _record_size(self, size: int) -> None:
        known = self._of(size)
        if known.recording is not None:
            return
        try:
            if not known.uses:
                self._step(known.inputs)  # of padding: compiles
            known.recording = record(lambda: self._shared(self._step(known.inputs)), self._pool)
        except Exception as error:
            self._record = False
            self._due.clear()
            cause = "" if error.__context__ is None else f" ({error.__context__})"
            _LOG.warning(
                "decode steps of %d requests could not be recorded, more are not tried: %s%s", size, error, cause
            )
            return
        self._pool = self._pool or known.recording.graph.pool()

    def _shared(self, done: Decoded) -> Decoded:
        """With the logits where all graphs put them: else each would keep its own."""
        assert self._logits is not None
        logits = self._logits[: done.logits.shape[0]]
        logits.copy_(done.logits)
        return Decoded(logits, done.tokens, done.tops)

    def _of(self, size: int) -> _Recorded:
        if size not in self._known:
            self._known[size] = _Recorded(to_device(self._padding(size, len(self._tables)), self._device))
        return self._known[size]

    def _padding(self, size: int, groups: int) -> NDArray[np.int64]:
        """Inputs of a step in which nobody takes part."""
        host = np.zeros((_PLACES + groups, size), np.int64)
        host[_SLOTS] = self._tables.shape[1] - 1
        host[[_STATE_READS, _STATE_WRITES]] = -1
        host[_PLACES:] = -1
        return host

    def _step(self, inputs: Tensor) -> Decoded:
        with using(self._knobs.of(inputs.shape[1])):
            done = self._run(inputs, bool(self._states))
        if self._logits is None and self._record:
            self._logits = done.logits.new_empty((len(self._rows), done.logits.shape[1]))
        return done

    def _run(self, inputs: Tensor, states: bool) -> Decoded:
        size = inputs.shape[1]
        slots, positions = inputs[_SLOTS], inputs[_POSITIONS]
        batch = AttentionBatch(
            tables=tuple(
                BlockTables(inputs[_PLACES + group], table.index_select(0, slots))
                for group, table in enumerate(self._tables)
            ),
            query_starts=self._query_starts[: size + 1],
            context_lens=inputs[_CONTEXTS].int(),
            host_query_lens=[1] * size,
            host_context_lens=[self._token_ids.shape[1]] * size,  # no context is longer
            state_reads=[],
            state_writes=[],
            device_only=True,
        )
        if states:
            batch.state_blocks = inputs[_STATE_READS : _STATE_WRITES + 1].int()
        logits = self._program(self._token_ids[slots, positions], positions, batch, self._rows[:size])
        tokens, tops = choose.greedy(logits)
        # Where a request does not take the likeliest token, the sampler writes over it before anyone reads.
        self._token_ids[slots, positions + 1] = tokens.int()
        return Decoded(logits, tokens, tops)
