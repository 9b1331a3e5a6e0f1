"""A runner without tensors that notices every mistake in a plan, and the naive loop that says what it must generate.

What a real model keeps of a token in KV memory depends on that token and on everything before it. Here it is one
number, `chain`: a running hash of the history. A step writes the chain of each computed position through the slot's
block table and then reads the whole context back through it. A wrong prefix hit, a stale block, a block with two
writers or a gap shows at once, because some position then holds another history's number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from skyline.engine.messages import AdmittedRequest, EngineRequest, StepCounts, StepOutput, StepPlan, TokenLogprobs
from skyline.engine.scheduler import Limits

VOCAB = 11
EOS = frozenset({0})

# When the device computes a step, seen from the engine: at once, when the result is waited for, or one step late.
Timing = Literal["at_submit", "at_result", "one_step_late"]


def chain(parent: int, token: int) -> int:
    return (parent * 6364136223846793005 + (token + 1) * 1442695040888963407) % (1 << 61)


def chains(tokens: Sequence[int]) -> list[int]:
    """For each position, the hash of the history up to and with it."""
    result: list[int] = []
    for token in tokens:
        result.append(chain(result[-1] if result else 1, token))
    return result


def next_token(last_chain: int) -> int:
    return (last_chain >> 17) % VOCAB


def expected(message: EngineRequest, max_model_len: int) -> tuple[list[int], str, int | None]:
    """The oracle: the tokens one request generates when it is alone in the world, why it ends, and on which token."""
    params, history = message.params, list(message.prompt)
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else EOS)
    while True:
        history.append(next_token(chains(history)[-1]))
        generated = history[len(message.prompt) :]
        if history[-1] in stops and len(generated) > params.min_tokens:
            return generated, "stop", history[-1]
        if len(generated) == params.max_tokens or len(history) == max_model_len:
            return generated, "length", None


@dataclass
class _Slot:
    request: AdmittedRequest
    tokens: list[int]
    chains: list[int]
    tables: list[list[int]] = field(default_factory=list)  # by paged group
    computed: int | None = None  # positions whose KV is written; None until the first step tells what was cached
    lost: bool = False  # a step of this request failed, so nothing about it is certain any more

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.chains.append(chain(self.chains[-1], token))


class _Handle:
    def __init__(self, runner: SimulatedRunner, plan: StepPlan) -> None:
        self._runner = runner
        self._plan = plan
        self.output: StepOutput | None = None
        self.error: Exception | None = None

    def execute(self) -> None:
        try:
            self.output = self._runner.execute(self._plan)
        except StepFailed as error:
            self.error = error
        except AssertionError as error:
            self._runner.broken_plan = error  # the engine takes it for a failing device; the test must not
            raise

    def result(self) -> StepOutput:
        self._runner.execute_until(self)
        if self.error is not None:
            raise self.error
        assert self.output is not None
        return self.output


class StepFailed(RuntimeError):
    """What a failing device raises. Broken plans raise AssertionError instead, so that no test mistakes one for it."""


class SimulatedRunner:
    def __init__(
        self,
        limits: Limits,
        timing: Timing = "at_submit",
        *,
        failing_steps: frozenset[int] = frozenset(),
        failing_requests: Mapping[str, int] | None = None,
    ) -> None:
        """`failing_steps` raise as a whole; `failing_requests` fail alone when they sample their n-th token."""
        self.limits = limits
        self.broken_plan: AssertionError | None = None
        self.failed_ids: set[str] = set()  # requests that had a row in a step that raised
        self.cached_at_admission: dict[str, list[int]] = {}  # by request id, for each time it was admitted
        self.seeds: dict[str, set[int]] = {}
        self._timing = timing
        self._failing_steps = failing_steps
        self._failing_requests = failing_requests or {}
        self._windows = [group.window for group in limits.kv_groups if not group.state]
        self._memory = [
            [[0] * limits.block_size for _ in range(group.num_blocks)] for group in limits.kv_groups if not group.state
        ]
        # The state after some tokens is the chain of the last of them.
        self._states = [0] * (limits.kv_groups[-1].num_blocks if limits.kv_groups[-1].state else 0)
        self._slots: dict[int, _Slot] = {}
        self._queue: list[_Handle] = []

    def submit(self, plan: StepPlan) -> _Handle:
        handle = _Handle(self, plan)
        self._queue.append(handle)
        if self._timing == "at_submit":
            self.execute_until(handle)
        elif self._timing == "one_step_late" and len(self._queue) > 1:
            self.execute_until(self._queue[-2])
        return handle

    def idle(self) -> bool:
        return False

    def step_counts(self) -> StepCounts:
        return StepCounts()

    def close(self) -> None:
        pass

    def execute_until(self, handle: _Handle) -> None:
        """Run the queued steps up to this one, strictly in order."""
        while handle in self._queue:
            self._queue.pop(0).execute()

    def execute(self, plan: StepPlan) -> StepOutput:
        self._apply(plan)
        if plan.step in self._failing_steps:
            for slot in plan.slots:
                self._slots[slot].lost = True
                self.failed_ids.add(self._slots[slot].request.request_id)
            raise StepFailed(f"step {plan.step}")
        rows = [
            (self._slots[slot], start, start + length)
            for slot, start, length in zip(plan.slots, plan.starts, plan.lengths, strict=True)
        ]
        self._check(plan, rows)
        for row, (slot, start, end) in enumerate(rows):
            if slot.lost:
                continue
            for position in range(start, end):
                self._write(slot, position)
            if self._states:
                self._advance_state(plan.state_reads[row], plan.state_writes[row], slot, start, end)
        output = StepOutput(plan.step, [-1] * len(rows), logprobs=[None] * len(rows))
        for row, (slot, start, end) in enumerate(rows):
            if not slot.lost:
                self._read_back(slot, end)
            self._sample(plan, output, row, slot, start, end)
        return output

    def _apply(self, plan: StepPlan) -> None:
        for number in plan.freed:
            del self._slots[number]
        for request in plan.admitted:
            assert request.slot not in self._slots, "a slot was given away twice"
            assert 0 <= request.slot < self.limits.max_num_seqs
            self._slots[request.slot] = _Slot(
                request, list(request.token_ids), chains(request.token_ids), [[] for _ in self._windows]
            )
            self.seeds.setdefault(request.request_id, set()).add(request.seed)
        for number, group, blocks in plan.new_blocks:
            self._slots[number].tables[group] += blocks

    def _check(self, plan: StepPlan, rows: list[tuple[_Slot, int, int]]) -> None:
        """The plan keeps the limits, and no row writes into memory that anyone else can see."""
        limits = self.limits
        assert plan.slots and len(plan.samples) == len(rows)
        assert len(set(plan.slots)) == len(plan.slots), "a slot occurs twice"
        assert len(self._slots) <= limits.max_num_seqs
        assert all(length > 0 for length in plan.lengths)
        assert plan.num_tokens <= limits.max_num_batched_tokens, "over the token budget"
        logit_rows = 0
        for slot, start, end in rows:
            if slot.lost:
                continue
            if slot.computed is None:
                assert start % limits.block_size == 0, "only whole blocks can come from the prefix cache"
                self.cached_at_admission.setdefault(slot.request.request_id, []).append(start)
            else:
                assert start == slot.computed, "a gap or an overlap between steps"
            assert end <= len(slot.tokens) < limits.max_model_len, "a token is computed before it is known"
            slot.computed = end
            if slot.request.prompt_logprobs:
                logit_rows += max(0, min(end, slot.request.num_prompt) - start)
            for group, table in enumerate(slot.tables):
                written = set(self._seen(group, table, start, end)[start // limits.block_size :])
                for other in self._slots.values():
                    theirs = other.tables[group]
                    read = self._seen(group, theirs, other.computed or 0, len(theirs) * limits.block_size)
                    # A block that is let go keeps its place in the table, where 0 may also stand for nothing.
                    read = read if self._windows[group] is None or other.computed is not None else []
                    assert other is slot or written.isdisjoint(read), "a block that is written is shared"
        written = plan.state_writes
        assert len(set(written)) == len(written) and (not self._states or len(written) == len(rows))
        shared = set(written) & set(plan.state_reads)
        assert all(read == write for read, write in zip(plan.state_reads, written, strict=True) if write in shared)
        assert logit_rows <= limits.max_logit_rows, "over the limit of logit rows"

    def _seen(self, group: int, table: list[int], start: int, end: int) -> list[int]:
        """The table up to token `end`, less what queries from `start` on do not see any more."""
        window, size = self._windows[group], self.limits.block_size
        first = 0 if window is None else max(0, start - window + 1) // size
        return [-1] * first + table[first : -(-end // size)]

    def _write(self, slot: _Slot, position: int) -> None:
        size = self.limits.block_size
        for memory, table in zip(self._memory, slot.tables, strict=True):
            memory[table[position // size]][position % size] = slot.chains[position]

    def _read_back(self, slot: _Slot, end: int) -> None:
        size = self.limits.block_size
        for memory, table, window in zip(self._memory, slot.tables, self._windows, strict=True):
            first = 0 if window is None else max(0, end - window)
            context = [memory[table[position // size]][position % size] for position in range(first, end)]
            assert context == slot.chains[first:end], f"KV memory of {slot.request.request_id} is not its own history"

    def _advance_state(self, read: int, write: int, slot: _Slot, start: int, end: int) -> None:
        assert (read < 0) == (start == 0)
        assert start == 0 or self._states[read] == slot.chains[start - 1], "the state is not that of its own history"
        self._states[write] = slot.chains[end - 1]

    def _sample(self, plan: StepPlan, output: StepOutput, row: int, slot: _Slot, start: int, end: int) -> None:
        request = slot.request
        if request.prompt_logprobs:
            positions = range(start + 1, min(end + 1, request.num_prompt))
            output.prompt_logprobs[plan.slots[row]] = [
                TokenLogprobs([slot.tokens[position]], [-float(position)], 1) for position in positions
            ]
        if not plan.samples[row]:
            assert slot.lost or end < len(slot.tokens), "the last known token was computed and nothing sampled"
            return
        assert slot.lost or end == len(slot.tokens), "sampled in the middle of what is known"
        token = next_token(slot.chains[min(end, len(slot.chains)) - 1])
        slot.append(token)
        output.token_ids[row] = token
        if request.params.logprobs is not None:
            assert output.logprobs is not None
            output.logprobs[row] = TokenLogprobs([token], [-float(end)], 1)
        if self._failing_requests.get(request.request_id) == len(slot.tokens) - request.num_prompt:
            slot.lost = True
            output.errors[plan.slots[row]] = "this request cannot be sampled"
