"""Every feature of the scheduler at once, on random workloads, against a naive loop (tests/engine/simulated.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyline.engine.core import EngineCore, EngineError
from skyline.engine.kv_memory import KVGroup, blocks_for_one
from skyline.engine.messages import EngineOutput, EngineRequest, TokenLogprobs
from skyline.engine.request import Request
from skyline.engine.sampling_params import SamplingParams
from skyline.engine.scheduler import Limits, PlannedStep, Scheduler
from tests.engine.simulated import EOS, VOCAB, SimulatedRunner, Timing, expected

TIMINGS: tuple[Timing, ...] = ("at_submit", "at_result", "one_step_late")
LIMITS = Limits(num_blocks=16, block_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=40)
# What layers may keep, alone and mixed; none is one group that keeps everything.
FULL, STATE = KVGroup(0), KVGroup(0, state=True)
GROUPS: list[tuple[KVGroup, ...]] = [
    (),
    (FULL,),
    (KVGroup(0, window=5),),
    (FULL, KVGroup(0, window=3)),
    (FULL, KVGroup(0, window=1), KVGroup(0, window=9)),
    (FULL, STATE),
    (FULL, KVGroup(0, window=6), STATE),
]


class CheckedScheduler(Scheduler):
    """The production scheduler, with its promises about order and salts asserted after every plan."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits, secret=b"test")
        self._salt_of: dict[tuple[int, int], str] = {}  # group and block -> salt of the request that wrote it last

    def schedule(self) -> PlannedStep | None:
        before = list(self.running)
        planned = super().schedule()
        self.check()
        preempted = [request for request in before if request.slot < 0]
        kept = [request for request in before if request.slot >= 0]
        admitted = [request for request in self.running if request not in before]
        if preempted:
            assert not admitted, "a request was admitted into the room that another one was just pushed out of"
            if kept:
                assert max(_orders(kept)) < min(_orders(preempted)), "a more important request was preempted"
        if admitted and self.waiting:
            assert max(_orders(admitted)) < min(_orders(self.waiting)), "a waiting request was overtaken"
        self._check_salts(planned, admitted)
        return planned

    def _check_salts(self, planned: PlannedStep | None, admitted: list[Request]) -> None:
        for request in admitted:
            for group, table in enumerate(request.holding.tables):
                hits = table[request.holding.dropped[group] : request.holding.published[group]]
                assert all(self._salt_of[group, block] == request.salt for block in hits), "a prefix hit across salts"
        if planned is not None:
            for request in planned.requests:
                for group, table in enumerate(request.holding.tables):
                    for block in table[request.holding.published[group] :]:
                        self._salt_of[group, block] = request.salt


def _orders(requests: Sequence[Request]) -> list[tuple[int, int]]:
    return [request.order for request in requests]


@dataclass
class Arrival:
    message: EngineRequest
    step: int = 0
    abort_after: int | None = None  # steps after its arrival


@dataclass
class Result:
    outputs: list[EngineOutput] = field(default_factory=list)
    aborted: bool = False

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def last(self) -> EngineOutput:
        return self.outputs[-1]

    @property
    def ending(self) -> tuple[list[int], str | None, int | None]:
        return self.tokens, self.last.finish_reason, self.last.stop_token


def make_core(limits: Limits, runner: SimulatedRunner, asynchronous: bool) -> EngineCore:
    core = EngineCore(limits, runner, eos_token_ids=EOS, async_scheduling=asynchronous)
    core.scheduler = CheckedScheduler(limits)
    return core


def drive(core: EngineCore, runner: SimulatedRunner, arrivals: Sequence[Arrival]) -> dict[str, Result]:
    """Run a workload to its end, checking the ownership rule after every step."""
    results = {arrival.message.request_id: Result() for arrival in arrivals}
    pending = sorted(arrivals, key=lambda arrival: arrival.step)
    aborts: dict[int, list[str]] = {}
    # A token takes at most two steps (one under way, one to see it), and the first in order always moves on.
    total = sum(_tokens_at_most(arrival.message, core.scheduler.limits) for arrival in arrivals)
    # A step that fails moves nobody on.
    lost = 2 * len(runner._failing_steps)
    deadline = 2 * total + max((arrival.step for arrival in arrivals), default=0) + lost + 10
    step = 0
    while pending or core.has_work:
        assert step < deadline, "requests starve"
        while pending and pending[0].step <= step:
            arrival = pending.pop(0)
            assert core.add(arrival.message) is None
            if arrival.abort_after is not None:
                aborts.setdefault(step + arrival.abort_after, []).append(arrival.message.request_id)
        ids = aborts.pop(step, [])
        for output in core.abort(ids):
            results[output.request_id].aborted = True
            assert output.finish_reason == "abort"
        core.scheduler.check()
        for output in core.step():
            result = results[output.request_id]
            assert not result.aborted, "output after an abort"
            assert not result.outputs or result.last.finish_reason is None, "output after the last one"
            result.outputs.append(output)
        core.scheduler.check()
        if runner.broken_plan is not None:
            raise runner.broken_plan
        step += 1
    scheduler = core.scheduler
    assert not scheduler.running and not scheduler.waiting
    assert all(pool.num_held == 0 for pool in scheduler.memory.pools), "blocks are leaked"
    assert core.stats().blocks_held == 0
    if not scheduler.limits.enable_prefix_caching:
        assert core.stats().blocks_cached == 0
    return results


def _tokens_at_most(message: EngineRequest, limits: Limits) -> int:
    return len(message.prompt) + min(message.params.max_tokens or limits.max_model_len, limits.max_model_len)


def run(
    limits: Limits, arrivals: Sequence[Arrival], *, asynchronous: bool = True, timing: Timing = "at_result"
) -> tuple[dict[str, Result], EngineCore, SimulatedRunner]:
    runner = SimulatedRunner(limits, timing)
    core = make_core(limits, runner, asynchronous)
    return drive(core, runner, arrivals), core, runner


def check_result(arrival: Arrival, result: Result, limits: Limits) -> None:
    """A request that nothing happened to ends exactly as if it had been alone."""
    message = arrival.message
    assert result.ending == expected(message, limits.max_model_len)
    first, *others = result.outputs
    assert all(output.cached_tokens == 0 and output.prompt_logprobs is None for output in others)
    if message.params.prompt_logprobs is None:
        assert first.prompt_logprobs is None
    else:
        assert first.prompt_logprobs == [
            TokenLogprobs([token], [-float(position)], 1)
            for position, token in enumerate(message.prompt)
            if position > 0
        ]
    if message.params.logprobs is not None:
        entries = [entry for output in result.outputs for entry in output.logprobs or []]
        assert [entry.ids for entry in entries] == [[token] for token in result.tokens]
        assert [-entry.logprobs[0] for entry in entries] == list(
            range(len(message.prompt), len(message.prompt) + len(result.tokens))
        )


# --- random workloads ------------------------------------------------------------------------------------------------


@st.composite
def limits_strategy(draw: st.DrawFn) -> Limits:
    block_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    max_model_len = draw(st.integers(2, 40))
    needed = -(-max_model_len // block_size)
    max_num_seqs = draw(st.integers(1, 6))
    max_num_batched_tokens = draw(st.integers(max_num_seqs, 24))
    num_blocks = needed + draw(st.integers(0, needed))
    groups = []
    for group in draw(st.sampled_from(GROUPS)):
        least = blocks_for_one(group, block_size, max_model_len, max_num_batched_tokens)
        groups.append(replace(group, num_blocks=least + draw(st.integers(0, least))))
    return Limits(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        groups=tuple(groups),
        max_model_len=max_model_len,
        enable_prefix_caching=draw(st.booleans()),
        max_logit_rows=draw(st.sampled_from([1, 5, 256])),
    )


@st.composite
def arrivals_strategy(draw: st.DrawFn, limits: Limits, *, aborts: bool = True) -> list[Arrival]:
    trunk = draw(st.lists(st.integers(0, VOCAB - 1), min_size=40, max_size=40))
    arrivals = []
    for number in range(draw(st.integers(1, 9))):
        shared = draw(st.integers(0, limits.max_model_len - 1))
        tail = draw(st.lists(st.integers(0, VOCAB - 1), max_size=4))
        prompt = (trunk[:shared] + tail)[: limits.max_model_len - 1] or [1]
        params = SamplingParams(
            max_tokens=draw(st.one_of(st.none(), st.integers(1, 20))),
            min_tokens=draw(st.sampled_from([0, 0, 3])),
            ignore_eos=draw(st.booleans()),
            stop_token_ids=draw(st.sampled_from([[], [], [5], [5, 7]])),
            logprobs=draw(st.sampled_from([None, None, 0])),
            prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
        )
        message = EngineRequest(
            f"r{number}", prompt, params, draw(st.integers(-1, 1)), draw(st.sampled_from(["", "", "a", "b"]))
        )
        abort_after = draw(st.one_of(st.none(), st.integers(0, 20))) if aborts else None
        arrivals.append(Arrival(message, draw(st.integers(0, 15)), abort_after))
    return arrivals


@settings(max_examples=120, deadline=None)
@given(data=st.data(), limits=limits_strategy(), asynchronous=st.booleans(), timing=st.sampled_from(TIMINGS))
def test_every_request_generates_what_it_would_alone(
    data: st.DataObject, limits: Limits, asynchronous: bool, timing: Timing
) -> None:
    """The central promise: batching, chunking, preemption, caching, priorities and aborts change no one's tokens."""
    arrivals = data.draw(arrivals_strategy(limits))
    results, _, runner = run(limits, arrivals, asynchronous=asynchronous, timing=timing)
    for arrival in arrivals:
        message, result = arrival.message, results[arrival.message.request_id]
        tokens, *_ = expected(message, limits.max_model_len)
        if result.aborted:
            assert result.tokens == tokens[: len(result.tokens)]
        else:
            check_result(arrival, result, limits)
        if result.outputs:
            cached = runner.cached_at_admission[message.request_id][0]
            assert result.outputs[0].cached_tokens == cached < len(message.prompt)
            assert len(runner.seeds[message.request_id]) == 1, "a preempted request came back with another seed"


@settings(max_examples=120, deadline=None)
@given(data=st.data(), limits=limits_strategy(), asynchronous=st.booleans(), timing=st.sampled_from(TIMINGS))
def test_failures_hit_only_their_own_requests(
    data: st.DataObject, limits: Limits, asynchronous: bool, timing: Timing
) -> None:
    """A step that raises, or a request that cannot be sampled, ends with an error, leaks nothing and harms no one."""
    arrivals = data.draw(arrivals_strategy(limits))
    # Never three in a row: that is the end of the engine, tested below.
    failing_steps = frozenset(step for step in data.draw(st.sets(st.integers(0, 40), max_size=10)) if step % 3)
    ids = [arrival.message.request_id for arrival in arrivals]
    failing_requests = data.draw(st.dictionaries(st.sampled_from(ids), st.integers(1, 4), max_size=3))
    runner = SimulatedRunner(limits, timing, failing_steps=failing_steps, failing_requests=failing_requests)
    results = drive(make_core(limits, runner, asynchronous), runner, arrivals)
    for arrival in arrivals:
        message, result = arrival.message, results[arrival.message.request_id]
        tokens, *_ = expected(message, limits.max_model_len)
        if result.aborted:
            assert result.tokens == tokens[: len(result.tokens)]
        elif result.last.finish_reason == "error":
            assert result.last.error and not result.last.token_ids
            assert result.tokens == tokens[: len(result.tokens)]
            alone = failing_requests.get(message.request_id) == len(result.tokens) + 1
            assert alone or message.request_id in runner.failed_ids
        else:
            check_result(arrival, result, limits)
            assert failing_requests.get(message.request_id, 99) > len(tokens)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_a_crowded_engine_preempts_and_still_answers_right(asynchronous: bool, enable_prefix_caching: bool) -> None:
    """Guards the random tests: this workload must really preempt (and hit the cache), else they prove little."""
    limits = replace(LIMITS, num_blocks=12, enable_prefix_caching=enable_prefix_caching)
    arrivals = [
        Arrival(EngineRequest(f"r{number}", [1, 2, 3, 4, 5, number], SamplingParams(max_tokens=30, ignore_eos=True)))
        for number in range(8)
    ]
    results, core, _ = run(limits, arrivals, asynchronous=asynchronous)
    for arrival in arrivals:
        check_result(arrival, results[arrival.message.request_id], limits)
    stats = core.stats()
    assert stats.preemptions >= 3
    assert (stats.prefix_hit_tokens > 0) == enable_prefix_caching
    assert stats.generated_tokens == 8 * 30 and stats.finished == 8


def test_what_the_cache_has_of_a_window_counts_as_room() -> None:
    """Of five blocks that a request needs at once, one is in the cache. It used to wait for five others, for ever."""
    limits = Limits(0, 1, 1, 1, max_model_len=10, groups=(KVGroup(5, window=2),))
    arrivals = [Arrival(request("first", [3, 4], max_tokens=1)), Arrival(request("long", [3, 5, 6, 7, 8, 9]), step=8)]
    results, _, runner = run(limits, arrivals)
    check_result(arrivals[1], results["long"], limits)
    assert runner.cached_at_admission["long"] == [1]


@pytest.mark.parametrize("groups", GROUPS[1:], ids=str)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_kind_of_memory_preempts_and_hits_the_cache(groups: tuple[KVGroup, ...], asynchronous: bool) -> None:
    """As above, for mixes of groups: the pools are so small that each of them runs out."""
    groups = tuple(
        replace(group, num_blocks=blocks_for_one(group, 4, 40, 16) + (3 if group.state else 1)) for group in groups
    )
    limits = replace(LIMITS, num_blocks=0, groups=groups)
    arrivals = [
        Arrival(request(f"r{number}", [1, 2, 3, 4, 5, 6, 7, 8, number % 3, number], max_tokens=30), step=6 * number)
        for number in range(8)
    ]
    arrivals += [Arrival(request("again", [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 1], max_tokens=3), step=400)]
    arrivals += [Arrival(request("once more", [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 1], max_tokens=3), step=500)]
    results, core, _ = run(limits, arrivals, asynchronous=asynchronous)
    for arrival in arrivals:
        check_result(arrival, results[arrival.message.request_id], limits)
    assert results["once more"].outputs[0].cached_tokens == 8
    # Windows take so little that two long requests find room; states are only ever needed at admission.
    assert core.stats().preemptions > 0 or groups[0].window is not None


def test_a_window_holds_no_more_than_it_needs() -> None:
    """Blocks are let go as they leave the window: a long context must not hold memory that nobody reads."""
    limits = Limits(0, 4, 1, 8, max_model_len=400, groups=(KVGroup(8, window=6),))
    runner = SimulatedRunner(limits)
    core = make_core(limits, runner, True)
    core.add(request("r", [1] * 100, max_tokens=250))
    most = 0
    while core.has_work:
        core.step()
        core.scheduler.check()
        most = max(most, core.stats().blocks_held)
    assert runner.broken_plan is None and most <= 8


def test_a_state_is_kept_at_the_end_of_a_prompt() -> None:
    """The next turn of a conversation goes on from the longest state that was kept, not from the longest blocks."""
    limits = replace(LIMITS, num_blocks=0, groups=(KVGroup(30), KVGroup(12, state=True)))
    first = request("first", list(range(10)), max_tokens=9)
    answer, *_ = expected(first, limits.max_model_len)
    second = request("second", [*range(10), *answer, 7])
    other = request("other", [*range(6), 1, 1, 1, 1])
    results, *_ = run(limits, [Arrival(first), Arrival(second, step=20), Arrival(other, step=40)])
    assert results["second"].outputs[0].cached_tokens == 8
    assert results["other"].outputs[0].cached_tokens == 0  # blocks of 4 tokens are there, but no state after them


# --- one promise at a time -------------------------------------------------------------------------------------------


def request(name: str, prompt: list[int], *, priority: int = 0, salt: str = "", **params: object) -> EngineRequest:
    settled = {"max_tokens": 4, "ignore_eos": True} | params
    return EngineRequest(name, prompt, SamplingParams(**settled), priority, salt)  # type: ignore[arg-type]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("length", "max_tokens", "generated"),
    [
        (1, 1, 1),
        (LIMITS.max_model_len - 1, 1, 1),
        (LIMITS.max_model_len - 1, 9, 1),
        (8, None, LIMITS.max_model_len - 8),
    ],
)
def test_length_limits(length: int, max_tokens: int | None, generated: int, asynchronous: bool) -> None:
    """One token more would write behind the end of the context; one less would cut an answer short."""
    message = request("r", [1] * length, max_tokens=max_tokens)
    results, _, runner = run(LIMITS, [Arrival(message)], asynchronous=asynchronous)
    assert results["r"].ending == (expected(message, LIMITS.max_model_len)[0], "length", None)
    assert len(results["r"].tokens) == generated
    assert runner.broken_plan is None


@pytest.mark.parametrize("length", [0, LIMITS.max_model_len, LIMITS.max_model_len + 1])
def test_a_prompt_that_cannot_run_is_refused_with_an_answer(length: int) -> None:
    """An over-long prompt that is silently dropped leaves its client waiting for ever."""
    core = make_core(LIMITS, SimulatedRunner(LIMITS), True)
    output = core.add(request("r", [1] * length))
    assert output is not None and output.finish_reason == "error"
    assert f"{length} tokens" in str(output.error) and f"1 to {LIMITS.max_model_len - 1}" in str(output.error)
    assert not core.has_work


def test_a_request_id_in_use_is_refused() -> None:
    """Two requests under one id would receive each other's tokens; after the end the id may be used again."""
    runner = SimulatedRunner(LIMITS)
    core = make_core(LIMITS, runner, True)
    assert core.add(request("r", [1])) is None
    refused = core.add(request("r", [2]))
    assert refused is not None and refused.finish_reason == "error" and "in use" in str(refused.error)
    while core.has_work:
        core.step()
    assert core.add(request("r", [2])) is None


def test_min_tokens_counts_the_tokens_before_the_stop() -> None:
    """The sampler forbids stop tokens for the first min_tokens tokens, so a stop can be token min_tokens + 1."""
    free, *_ = expected(request("r", [1], max_tokens=30), LIMITS.max_model_len)
    stop = free[0]
    for min_tokens in (0, 1, 5):
        message = request("r", [1], max_tokens=30, min_tokens=min_tokens, stop_token_ids=[stop])
        results, *_ = run(LIMITS, [Arrival(message)])
        tokens, reason, stop_token = results["r"].ending
        if reason == "stop":
            assert stop_token == stop == tokens[-1] and len(tokens) > min_tokens
        assert (tokens, reason, stop_token) == expected(message, LIMITS.max_model_len)


@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (16, 12)])
def test_cached_tokens_leave_at_least_one_to_compute(length: int, cached: int) -> None:
    """A prompt that is cached to its last token still needs logits; a miscounted hit is billed wrongly."""
    prompt = list(range(length))
    arrivals = [Arrival(request("first", prompt, max_tokens=1)), Arrival(request("again", prompt), step=5)]
    results, core, _ = run(LIMITS, arrivals)
    assert results["first"].outputs[0].cached_tokens == 0
    assert results["again"].outputs[0].cached_tokens == cached
    assert core.stats().prefix_hit_tokens == cached
    check_result(arrivals[1], results["again"], LIMITS)


def test_generated_tokens_are_cached_for_the_next_turn() -> None:
    """A chat sends the answer back as part of the next prompt; recomputing it would double the work of every turn."""
    first = request("first", [1, 2, 3], max_tokens=9)
    answer, *_ = expected(first, LIMITS.max_model_len)
    second = request("second", [1, 2, 3, *answer, 7])
    results, *_ = run(LIMITS, [Arrival(first), Arrival(second, step=20)])
    assert results["second"].outputs[0].cached_tokens == 8  # the last generated token was never computed


def test_salts_keep_tenants_apart() -> None:
    """A hit across salts would let one tenant time another's prompts."""
    prompt = list(range(9))
    arrivals = [Arrival(request(f"r{salt}", prompt, salt=salt), step=10 * n) for n, salt in enumerate(["", "a", "b"])]
    arrivals.append(Arrival(request("same", prompt, salt="a"), step=40))
    results, *_ = run(LIMITS, arrivals)
    assert [results[arrival.message.request_id].outputs[0].cached_tokens for arrival in arrivals] == [0, 0, 0, 8]


def test_reset_prefix_cache_forgets_everything() -> None:
    """After new weights or a tenant's wish, no old block may be found again."""
    runner = SimulatedRunner(LIMITS)
    core = make_core(LIMITS, runner, True)
    drive(core, runner, [Arrival(request("r", list(range(9))))])
    assert core.stats().blocks_cached > 0
    core.reset_prefix_cache()
    assert core.stats().blocks_cached == 0
    results = drive(core, runner, [Arrival(request("s", list(range(9))))])
    assert results["s"].outputs[0].cached_tokens == 0


def test_prompt_tokens_recomputed_after_a_preemption_are_not_called_cached() -> None:
    """`cached_tokens` is billed: a request that finds its own blocks again was not served from the cache."""
    limits = replace(LIMITS, num_blocks=8, max_model_len=32)
    arrivals = [Arrival(request("first", [1] * 12, max_tokens=6)), Arrival(request("late", [2] * 20))]
    results, core, runner = run(limits, arrivals, asynchronous=False)
    assert core.stats().preemptions > 0 and len(runner.cached_at_admission["late"]) > 1
    assert runner.cached_at_admission["late"][-1] > 0, "the scenario: it came back to blocks of its own"
    assert results["late"].outputs[0].cached_tokens == 0


def test_a_more_important_request_is_admitted_first_and_preempted_last() -> None:
    """Priority decides among those that wait; among equals, arrival does."""
    limits = replace(LIMITS, max_num_seqs=1)
    arrivals = [Arrival(request(name, [1], priority=priority)) for name, priority in [("c", 5), ("b", 0), ("a", 0)]]
    runner = SimulatedRunner(limits)
    core = make_core(limits, runner, True)
    order = []
    for arrival in arrivals:
        core.add(arrival.message)
    while core.has_work:
        order += [output.request_id for output in core.step() if output.finish_reason]
    assert order == ["b", "a", "c"]


def test_decodes_go_on_while_a_long_prompt_is_computed() -> None:
    """Chunked prefill exists so that a long prompt does not stall everyone else's stream."""
    limits = replace(LIMITS, max_num_batched_tokens=4)
    arrivals = [Arrival(request("short", [1], max_tokens=12)), Arrival(request("long", [2] * 30), step=2)]
    runner = SimulatedRunner(limits)
    core = make_core(limits, runner, False)
    core.add(arrivals[0].message)
    core.step()
    core.add(arrivals[1].message)
    for _ in range(9):
        assert "short" in [output.request_id for output in core.step()]


@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "preempted"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_abort_frees_everything_at_once(state: str, asynchronous: bool) -> None:
    """A client that goes away must not hold memory, whatever its request was doing."""
    limits = replace(LIMITS, num_blocks=11, max_num_batched_tokens=8, max_num_seqs=4)
    runner = SimulatedRunner(limits, "at_result")
    core = make_core(limits, runner, asynchronous)
    core.add(request("other", [1] * 10, max_tokens=25))
    core.add(request("r", [2] * 22, max_tokens=15))
    target = core._requests["r"]
    reached = {
        "waiting": lambda: True,
        "prefilling": lambda: 0 < target.num_computed < target.num_prompt,
        "decoding": lambda: target.num_generated > 2,
        "preempted": lambda: target.epoch > 0 and target.slot < 0,
    }[state]
    while not reached():
        core.step()
    assert [output.finish_reason for output in core.abort(["r", "unknown"])] == ["abort"]
    assert core.abort(["r"]) == [], "a second abort of the same request is harmless"
    core.scheduler.check()
    assert core.stats().blocks_held == sum(map(len, core._requests["other"].holding.tables))
    while core.has_work:
        assert "r" not in [output.request_id for output in core.step()], "output after an abort"
        core.scheduler.check()
    assert core.stats().blocks_held == 0 and runner.broken_plan is None


def test_three_failed_steps_in_a_row_end_the_engine() -> None:
    """A lost device fails every step; answering each request with an error for ever would look alive to a router."""
    runner = SimulatedRunner(LIMITS, failing_steps=frozenset({0, 1, 3, 4, 6, 7, 8}))
    core = make_core(LIMITS, runner, False)
    failures = 0
    with pytest.raises(EngineError, match="3 steps in a row"):
        for number in range(50):
            core.add(request(f"r{number}", [1], max_tokens=1))
            failures += sum(output.finish_reason == "error" for output in core.step())
    assert failures == 6, "two failed steps in a row fail only their requests"


def test_limits_that_cannot_hold_one_request_are_refused() -> None:
    """Such an engine would accept a request and never be able to finish it."""
    with pytest.raises(ValueError, match="max_model_len"):
        Scheduler(Limits(9, 4, 4, 16, max_model_len=37))


def test_stats_add_up() -> None:
    """Dashboards subtract these totals from each other; they must count every request and token once."""
    arrivals = [Arrival(request(f"r{n}", [n] * 6), abort_after=3 if n == 2 else None) for n in range(4)]
    _, core, _ = run(LIMITS, arrivals, asynchronous=False)
    stats = core.stats()
    assert (stats.finished, stats.aborted, stats.prompt_tokens) == (3, 1, 24)
    assert 3 * 4 <= stats.generated_tokens <= 3 * 4 + 4
    assert (stats.running, stats.waiting, stats.blocks_held) == (0, 0, 0)
    assert stats.step_in_flight_s == 0.0 and 0 < stats.schedule_seconds <= stats.step_seconds
