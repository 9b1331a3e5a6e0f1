"""Turns step plans into sampled tokens on one device.

The tokens of every running request live in one buffer on the device, a row a slot. A step reads its inputs from there
and the sampler writes its results there, so the next step can start before the host has seen them. Plans are executed
strictly in order by one worker thread; torch releases the interpreter lock while it computes, and the engine plans the
next step in that time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from skyline.engine.messages import AdmittedRequest, StepCounts, StepOutput, StepPlan, TokenLogprobs
from skyline.graph import Program
from skyline.kernels.cpu import native
from skyline.ops import AttentionBatch
from skyline.ops.batch import to_device, token_positions
from skyline.runner.decode_graphs import DecodeGraphs
from skyline.runner.decode_knobs import DecodeKnobs
from skyline.runner.decode_replay import DecodeReplay
from skyline.runner.prompt_graphs import PromptGraphs
from skyline.runner.sampler import Sampler, SampleResult

T = TypeVar("T")


@dataclass(slots=True)
class _Slot:
    """What the runner keeps of a running request."""

    request: AdmittedRequest
    num_blocks: list[int]  # in the slot's block tables, by group


@dataclass(slots=True)
class _Computed:
    """A step whose results may still be on their way from the device."""

    plan: StepPlan
    sampled: SampleResult | None
    prompt_logprobs: dict[int, list[TokenLogprobs]]


class _Handle:
    def __init__(self, future: Future[_Computed]) -> None:
        self._future = future

    def result(self) -> StepOutput:
        computed = self._future.result()
        plan, sampled = computed.plan, computed.sampled
        output = StepOutput(plan.step, [-1] * len(plan.slots), prompt_logprobs=computed.prompt_logprobs)
        if sampled is None:
            return output
        output.errors = sampled.errors
        rows = [row for row, samples in enumerate(plan.samples) if samples]
        for row, token in zip(rows, sampled.host_token_ids(), strict=True):
            output.token_ids[row] = token
        if sampled.logprobs is not None:
            output.logprobs = [None] * len(plan.slots)
            for row, entry in zip(rows, sampled.logprobs, strict=True):
                output.logprobs[row] = entry
        return output


class ModelRunner:
    def __init__(
        self,
        program: Program,
        sampler: Sampler,
        token_ids: Tensor,
        *,
        block_size: int,
        device: torch.device,
        threads: int | None = None,
        table_groups: int = 1,
        graphs: bool | None = None,
        knobs: DecodeKnobs | None = None,
        prompts: PromptGraphs | None = None,
    ) -> None:
        """token_ids [max_num_seqs + 1, max_model_len + 1] int32 on the device, shared with the sampler; the last row is
        that of padding.

        table_groups: of caches that go by block tables (skyline.engine.kv_memory). graphs: record decode steps as CUDA
        graphs; False runs the same steps call by call, None has none of it. knobs: for these steps. prompts: what
        computes all other steps, if not the program itself.
        threads: of the CPU kernels; None is one for each physical core that this process may use.
        """
        self._program = program
        self._sampler = sampler
        self._token_ids = token_ids
        self._block_size = block_size
        self._device = device
        self._slots: dict[int, _Slot] = {}
        shape = (token_ids.shape[0] - 1, -(-token_ids.shape[1] // block_size))
        self._block_tables = [np.zeros(shape, np.int32) for _ in range(table_groups)]
        self.graphs: DecodeGraphs | None = None
        if graphs is not None:
            self.graphs = DecodeGraphs(
                program,
                token_ids,
                table_shape=(table_groups, *shape),
                block_size=block_size,
                record=graphs,
                knobs=knobs,
            )
        self.prompts = prompts
        self._counts = StepCounts()
        self._replay: DecodeReplay | None = None
        native_only = _all_native(program)
        if native_only:
            self._replay = DecodeReplay(program, token_ids, self._block_tables, block_size)
        self._worker = ThreadPoolExecutor(1, "runner", _prepare_worker, (device, threads, native_only))

    @property
    def recorded_sizes(self) -> list[int]:
        """Numbers of requests whose decode steps are recorded."""
        recordings = self.graphs or self._replay
        return [] if recordings is None else recordings.recorded

    def submit(self, plan: StepPlan) -> _Handle:
        return _Handle(self._worker.submit(self._execute, plan))

    def idle(self) -> bool:
        """Record one more size of steps, if they are recorded here; False if none is left."""
        if self.graphs is not None and self.between_steps(self.graphs.record_next):
            return True
        return self.prompts is not None and self.between_steps(self.prompts.record_next)

    def step_counts(self) -> StepCounts:
        """Any thread may ask."""
        prompts = 0 if self.prompts is None else len(self.prompts.recorded)
        return replace(self._counts, decode_recorded=len(self.recorded_sizes), prompts_recorded=prompts)

    def between_steps(self, function: Callable[[], T]) -> T:
        """Call it on the thread that computes, and wait for what it returns."""
        return self._worker.submit(function).result()

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _execute(self, plan: StepPlan) -> _Computed:
        with torch.inference_mode(), native.step():
            computed = self._compute(plan)
        for recorder in (self.graphs, self.prompts):
            if recorder is not None and recorder.due:
                with suppress(RuntimeError):  # the runner is being closed
                    self._worker.submit(recorder.record_due)
        return computed

    def _compute(self, plan: StepPlan) -> _Computed:
        self._apply(plan)
        recorded = self.graphs or self._replay
        if recorded is not None and recorded.takes(plan) and not any(map(self._scores, plan.slots, plan.starts)):
            decoded = self._decode(plan)
            if decoded is not None:
                return decoded
        longest = max(max(self._slots[slot].num_blocks) for slot in plan.slots)
        tables = [table[plan.slots, :longest] for table in self._block_tables]  # copies
        states = (plan.state_reads, plan.state_writes) if plan.state_writes else None
        batch = AttentionBatch.build(tables, plan.starts, plan.lengths, self._block_size, self._device, states)
        rows, at = token_positions(plan.starts, plan.lengths)
        positions = to_device(at, self._device)
        input_ids = self._token_ids[to_device(np.array(plan.slots)[rows], self._device), positions].long()

        sampling = [row for row, samples in enumerate(plan.samples) if samples]
        ends = list(accumulate(plan.lengths))
        logit_rows = [ends[row] - 1 for row in sampling]
        scored = [row for row, slot in enumerate(plan.slots) if self._scores(slot, plan.starts[row])]
        for row in scored:
            logit_rows += range(ends[row] - plan.lengths[row], ends[row])
        wanted = to_device(np.array(logit_rows, np.int64), self._device)
        run = self._program if self.prompts is None or plan.is_decode else self.prompts
        logits = run(input_ids, positions, batch, wanted)
        if plan.is_decode:
            self._counts.decode_eager += 1
        elif self.prompts is not None and self.prompts.replayed:
            self._counts.prompts_replayed += 1
        else:
            self._counts.prompts_eager += 1

        prompt_logprobs = {}
        offset = len(sampling)
        for row in scored:
            prompt_logprobs[plan.slots[row]] = self._score_prompt(plan, row, logits[offset:])
            offset += plan.lengths[row]
        if not sampling:
            return _Computed(plan, None, prompt_logprobs)
        slots = [plan.slots[row] for row in sampling]
        ends_at = [plan.starts[row] + plan.lengths[row] for row in sampling]
        return _Computed(plan, self._sample(logits[: len(sampling)], slots, ends_at), prompt_logprobs)

    def _decode(self, plan: StepPlan) -> _Computed | None:
        greedy, count = self._sampler.greedy_only(plan.slots), len(plan.slots)
        if self.graphs is not None:
            done = self.graphs.step(plan, self._block_tables)
            if done is None:
                return None
            replayed = self.graphs.replayed
        else:
            assert self._replay is not None
            done, replayed = self._replay.step(plan, greedy), self._replay.replayed
        if replayed:
            self._counts.decode_replayed += 1
        else:
            self._counts.decode_eager += 1
        if greedy:
            return _Computed(plan, self._sampler.sample_greedy(done.tokens[:count], done.tops[:count], plan.slots), {})
        return _Computed(plan, self._sample(done.logits[:count], plan.slots, [start + 1 for start in plan.starts]), {})

    def _sample(self, logits: Tensor, slots: list[int], ends: list[int]) -> SampleResult:
        """Choose the tokens that stand at `ends` of the slots, and write them there."""
        sampled = self._sampler.sample(logits, slots, ends)
        if self._device.type == "cpu":
            self._token_ids.numpy()[slots, ends] = sampled.token_ids.numpy()
            return sampled
        where = (to_device(np.array(slots), self._device), to_device(np.array(ends), self._device))
        self._token_ids.index_put_(where, sampled.token_ids.to(torch.int32))
        return sampled

    def _apply(self, plan: StepPlan) -> None:
        for slot in plan.freed:
            # A request whose step failed before it was admitted here has nothing to free.
            if self._slots.pop(slot, None) is not None:
                self._sampler.release(slot)
        for request in plan.admitted:
            self._slots[request.slot] = _Slot(request, [0] * len(self._block_tables))
            for table in self._block_tables:
                table[request.slot] = 0
            tokens = np.array(request.token_ids, np.int32)
            self._token_ids[request.slot, : len(tokens)] = to_device(tokens, self._device)
            self._sampler.admit(request)
        before = []
        for slot, group, blocks in plan.new_blocks:
            counts = self._slots[slot].num_blocks
            known = counts[group]
            before.append(known)
            counts[group] = known + len(blocks)
            self._block_tables[group][slot, known : known + len(blocks)] = blocks
        if self.graphs is not None and plan.new_blocks:
            self.graphs.add_blocks(plan.new_blocks, before)

    def _scores(self, slot: int, start: int) -> bool:
        """Whether a chunk from `start` on predicts tokens of a prompt whose log-probabilities are wanted."""
        request = self._slots[slot].request
        return request.prompt_logprobs and start < request.num_prompt - 1

    def _score_prompt(self, plan: StepPlan, row: int, logits: Tensor) -> list[TokenLogprobs]:
        """Log-probabilities of the prompt tokens that this chunk's logits predict."""
        slot, start = plan.slots[row], plan.starts[row]
        request = self._slots[slot].request
        count = min(plan.lengths[row], request.num_prompt - 1 - start)
        assert request.params.prompt_logprobs is not None
        targets = self._token_ids[slot, start + 1 : start + 1 + count].long()
        return self._sampler.prompt_logprobs(logits[:count], targets, request.params.prompt_logprobs)


def _all_native(program: Program) -> bool:
    return all(call.is_view or call.kernel.provider == native.PROVIDER for call in program.calls)


def _prepare_worker(device: torch.device, threads: int | None, all_native: bool) -> None:
    """Settings of the thread that computes, which a new one does not inherit."""
    if device.type == "cpu" and native.available() != "none":
        native.start_threads(threads)
    if all_native:
        # What is left to torch is small, and its threads would spin on the cores that the kernels' threads need.
        torch.set_num_threads(1)
    elif threads is not None:
        torch.set_num_threads(threads)  # else oneDNN starts one thread a core, whatever was asked for
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # else pinned memory and events belong to the first GPU
