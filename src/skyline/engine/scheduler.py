"""Which request computes how many tokens in the next step.

There are no separate prefill and decode phases: every step has one token budget. Requests that run come first, each
with all the tokens it has not computed yet (one, when decoding; a chunk, while its prompt lasts); what is left of the
budget admits waiting ones. When KV memory runs out, the running request that is last in order gives up its blocks and
waits again; its tokens are recomputed later, mostly from the prefix cache.

The scheduler sees only numbers, and nothing in a plan depends on a token's value, so the plan for step k + 1 is made
while step k runs. A request that turns out to have ended in step k has then one surplus token under way; it is dropped.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from operator import attrgetter

from skyline.engine.kv_memory import NONE, NOTHING, KVGroup, KVMemory, blocks_for_one
from skyline.engine.messages import AdmittedRequest, EngineOutput, FinishReason, StepOutput, StepPlan
from skyline.engine.request import Request

# Prompt log-probabilities need logits for every position: a vocabulary's worth of floats each, so few per step.
MAX_LOGIT_ROWS = 256

_order = attrgetter("order")


@dataclass(frozen=True, slots=True)
class Limits:
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_prefix_caching: bool = True
    max_logit_rows: int = MAX_LOGIT_ROWS
    groups: tuple[KVGroup, ...] = ()  # none: one that keeps everything, of num_blocks; else those of the first

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        return self.groups or (KVGroup(self.num_blocks),)

    def validate(self) -> None:
        for group in self.kv_groups:
            needed = blocks_for_one(group, self.block_size, self.max_model_len, self.max_num_batched_tokens)
            if group.num_blocks < needed:
                raise ValueError(
                    f"{group.num_blocks} KV blocks of {self.block_size} tokens cannot hold one request of "
                    f"max_model_len {self.max_model_len} tokens ({needed} blocks): give the KV cache more memory or "
                    "lower max_model_len"
                )


@dataclass(slots=True)
class PlannedStep:
    """A plan, and which requests (in which of their lives) its rows belong to."""

    plan: StepPlan
    requests: list[Request]
    epochs: list[int]


class Scheduler:
    def __init__(self, limits: Limits, secret: bytes | None = None) -> None:
        limits.validate()
        self.limits = limits
        self.memory = KVMemory(limits.kv_groups, limits.block_size, limits.enable_prefix_caching, secret)
        self.running: list[Request] = []  # both sorted by `order`
        self.waiting: list[Request] = []
        self.num_preemptions = 0
        self.prefix_queried_tokens = 0
        self.prefix_hit_tokens = 0
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._freed_slots: list[int] = []  # told to the runner with the next plan
        self._step = 0
        self._has_state = limits.kv_groups[-1].state
        sizes = limits.block_size, limits.max_model_len, limits.max_num_batched_tokens
        self._at_once = tuple(blocks_for_one(group, *sizes) for group in limits.kv_groups if not group.state)
        self._refused: tuple[tuple[int, int], tuple[int, ...]] | None = (
            None  # who last found no room, and how much there was
        )

    # --- life of a request -------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        request.holding = NOTHING
        insort(self.waiting, request, key=_order)

    def finish(self, request: Request) -> None:
        """Free everything the request owns, whatever state it is in."""
        request.finished = True
        if request.slot >= 0:
            _remove(self.running, request)
            self._vacate(request)
        else:
            _remove(self.waiting, request)

    def _preempt(self, request: Request) -> None:
        self.num_preemptions += 1
        _remove(self.running, request)
        self._vacate(request)
        request.epoch += 1
        request.num_computed = 0
        if request.prompt_logprobs is not None and not request.reported and request.in_flight == 0:
            request.prompt_logprobs = []  # they will be computed again
        insort(self.waiting, request, key=_order)

    def _vacate(self, request: Request) -> None:
        self.memory.release(request)
        self._freed_slots.append(request.slot)
        self._free_slots.append(request.slot)
        request.slot = -1

    # --- planning ----------------------------------------------------------------------------------------------------

    def schedule(self) -> PlannedStep | None:
        """The next step, or None if no request can compute anything now."""
        planned = PlannedStep(StepPlan(self._step), [], [])
        budget = self.limits.max_num_batched_tokens
        logit_budget = self.limits.max_logit_rows
        preempted = False

        position = 0
        while position < len(self.running) and budget > 0:
            request = self.running[position]
            known = len(request.tokens) + request.in_flight
            wanted = known - request.num_computed
            if wanted == 0 or (known >= request.max_tokens_total and request.num_computed >= request.num_prompt):
                position += 1  # all it may generate is under way
                continue
            count = wanted if wanted < budget else budget
            if request.prompt_logprobs is not None and not request.reported:
                count = min(count, logit_budget)
                logit_budget -= count
                if count == 0:
                    position += 1
                    continue
            if self._has_state:
                count = self.memory.whole_chunk(request, count)
            if request.num_computed + count > request.holding.room:
                while (grown := self.memory.grow(request, request.num_computed + count)) is None:
                    preempted = True
                    victim = self.running[-1]
                    self._preempt(victim)
                    if victim is request:
                        break
                if grown is None:
                    break
                planned.plan.new_blocks += ((request.slot, group, blocks) for group, blocks in grown)
            self._append(planned, request, count, known)
            budget -= count
            position += 1

        while self.waiting and budget > 0 and self._free_slots and not preempted:
            request = self.waiting[0]
            if self._refused == (request.order, self.memory.available):
                break  # nothing has changed since it did not fit
            wants_logits = request.prompt_logprobs is not None and not request.reported
            count = self._admit(planned, request, min(budget, logit_budget) if wants_logits else budget)
            if count == 0:
                break
            budget -= count
            if wants_logits:
                logit_budget -= count

        if not planned.requests:
            return None
        planned.plan.freed, self._freed_slots = self._freed_slots, []
        self._step += 1
        return planned

    def _append(self, planned: PlannedStep, request: Request, count: int, known: int) -> None:
        plan = planned.plan
        plan.slots.append(request.slot)
        plan.starts.append(request.num_computed)
        plan.lengths.append(count)
        if self._has_state:
            read, write = self.memory.advance_state(request, request.num_computed)
            plan.state_reads.append(read)
            plan.state_writes.append(write)
        request.num_computed += count
        samples = request.num_computed == known
        plan.samples.append(samples)
        if samples:
            request.in_flight += 1
        planned.requests.append(request)
        planned.epochs.append(request.epoch)

    def _admit(self, planned: PlannedStep, request: Request, budget: int) -> int:
        """Start a waiting request with what the prefix cache has of it. Returns the tokens it takes; 0 if no room."""
        if budget == 0:
            return 0
        assert request.in_flight == 0, "a preempted request waits until its last token is known"
        known = len(request.tokens)
        hits = 0 if request.prompt_logprobs is not None and not request.reported else self.memory.cached_prefix(request)
        cached = hits * self.limits.block_size
        # Room for all of its known tokens is asked for, though a chunk may take less now: else it would only push
        # others out in the next step.
        count = min(known - cached, budget)
        if not self.memory.start(request, hits, cached + count, self._at_once):
            self._refused = (request.order, self.memory.available)
            return 0
        del self.waiting[0]
        request.num_computed = cached
        if self._has_state:
            count = self.memory.whole_chunk(request, count)
        self.prefix_queried_tokens += known
        self.prefix_hit_tokens += cached
        if request.epoch == 0:  # later it may find its own blocks again, which nobody else computed for it
            request.cached_tokens = cached
        request.slot = self._free_slots.pop()
        insort(self.running, request, key=_order)
        planned.plan.admitted.append(
            AdmittedRequest(
                slot=request.slot,
                request_id=request.id,
                token_ids=list(request.tokens),
                num_prompt=request.num_prompt,
                params=request.params,
                seed=request.seed,
                prompt_logprobs=request.prompt_logprobs is not None and not request.reported,
            )
        )
        for group, table in enumerate(request.holding.tables):
            blocks = [0 if block == NONE else block for block in table]  # no kernel reads those
            planned.plan.new_blocks.append((request.slot, group, blocks))
        self._append(planned, request, count, known)
        return count

    # --- results -----------------------------------------------------------------------------------------------------

    def update(self, planned: PlannedStep, output: StepOutput) -> list[EngineOutput]:
        """Take in what a step produced; the outputs are what clients have to hear."""
        plan = planned.plan
        outputs: list[EngineOutput] = []
        for row, request in enumerate(planned.requests):
            if request.finished:
                continue  # aborted, or ended in the step before: this was its surplus
            slot = plan.slots[row]
            same_life = request.epoch == planned.epochs[row]
            if slot in output.errors:
                outputs.append(self.fail(request, output.errors[slot]))
                continue
            # After a preemption only the last part counts: the others will be computed again.
            if request.prompt_logprobs is not None and (same_life or plan.samples[row]):
                request.prompt_logprobs += output.prompt_logprobs.get(slot, ())
            if plan.samples[row]:
                request.in_flight -= 1
                request.tokens.append(output.token_ids[row])
            if same_life:
                end = plan.starts[row] + plan.lengths[row]
                if end >= request.holding.due:
                    self.memory.confirm(request, plan.starts[row], end)
            if plan.samples[row]:
                outputs.append(self._sampled(request, output, row))
        return outputs

    def _sampled(self, request: Request, output: StepOutput, row: int) -> EngineOutput:
        token = request.tokens[-1]
        message = EngineOutput(request.id, [token])
        if output.logprobs is not None:
            entry = output.logprobs[row]
            if entry is not None:
                message.logprobs = [entry]
        if not request.reported:
            request.reported = True
            message.cached_tokens = request.cached_tokens
            message.prompt_logprobs = request.prompt_logprobs
        reason: FinishReason | None = None
        if token in request.stop_tokens and request.num_generated > request.params.min_tokens:
            reason, message.stop_token = "stop", token
        elif len(request.tokens) >= request.max_tokens_total:
            reason = "length"
        if reason is not None:
            message.finish_reason = reason
            self.finish(request)
        return message

    def fail(self, request: Request, error: str) -> EngineOutput:
        self.finish(request)
        return EngineOutput(request.id, finish_reason="error", error=error)

    def check(self) -> None:
        """Assert the ownership rule over everything the scheduler knows. For tests."""
        self.memory.check(self.running)
        assert all(request.holding is NOTHING and request.slot < 0 for request in self.waiting)
        slots = [request.slot for request in self.running]
        assert sorted(slots + self._free_slots) == list(range(self.limits.max_num_seqs))
        for queue in (self.running, self.waiting):
            assert [request.order for request in queue] == sorted(request.order for request in queue)


def _remove(queue: list[Request], request: Request) -> None:
    del queue[bisect_left(queue, request.order, key=_order)]
