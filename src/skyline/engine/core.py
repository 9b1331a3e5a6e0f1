"""The step loop: plan, submit, take in results. One step is always being planned while another one runs."""

from __future__ import annotations

import logging
import random
import time
from collections import deque

from skyline.engine.messages import EngineOutput, EngineRequest, EngineStats, Runner, StepHandle
from skyline.engine.request import Request
from skyline.engine.scheduler import Limits, PlannedStep, Scheduler

logger = logging.getLogger(__name__)

# A step that raises fails its own requests; this many in a row mean that the device is lost.
MAX_FAILED_STEPS = 3


class EngineError(RuntimeError):
    """The engine cannot go on."""


class EngineCore:
    """Not thread-safe: one thread calls everything but `stats`."""

    def __init__(
        self,
        limits: Limits,
        runner: Runner,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        async_scheduling: bool = True,
        seed: int = 0,
    ) -> None:
        self.scheduler = Scheduler(limits)
        self._runner = runner
        self._eos_token_ids = eos_token_ids
        self._depth = 2 if async_scheduling else 1  # steps submitted and not yet taken in
        self._in_flight: deque[tuple[PlannedStep, StepHandle]] = deque()
        self._requests: dict[str, Request] = {}
        self._random = random.Random(seed)
        self._arrivals = 0
        self._failed_steps = 0
        self._stats = EngineStats(blocks_total=sum(group.num_blocks for group in limits.kv_groups))
        self._waiting_since: float | None = None

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._in_flight)

    def add(self, message: EngineRequest) -> EngineOutput | None:
        """Queue a request. A returned output says why it was refused (the front end normally refuses it earlier)."""
        limits = self.scheduler.limits
        if not message.prompt or len(message.prompt) >= limits.max_model_len:
            error = f"the prompt has {len(message.prompt)} tokens; this model takes 1 to {limits.max_model_len - 1}"
            return EngineOutput(message.request_id, finish_reason="error", error=error)
        if message.request_id in self._requests:
            error = f"request id {message.request_id!r} is already in use"
            return EngineOutput(message.request_id, finish_reason="error", error=error)
        seed = message.params.seed
        seed = self._random.getrandbits(63) if seed is None else seed & (2**63 - 1)
        request = Request(message, self._arrivals, seed, limits.max_model_len, self._eos_token_ids)
        self._arrivals += 1
        self._requests[request.id] = request
        self.scheduler.add(request)
        self._stats.prompt_tokens += request.num_prompt
        return None

    def abort(self, request_ids: list[str]) -> list[EngineOutput]:
        """Drop requests in any state; their blocks are free at once. Unknown ids have ended already."""
        outputs = []
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is not None:
                self.scheduler.finish(request)
                self._stats.aborted += 1
                outputs.append(EngineOutput(request_id, finish_reason="abort"))
        return outputs

    def idle(self) -> bool:
        """Do a bit of what saves time later; for when there is no work. False if there is nothing left to do."""
        return self._runner.idle()

    def reset_prefix_cache(self) -> None:
        self.scheduler.memory.drop_cache()

    def step(self) -> list[EngineOutput]:
        """Submit the next step, then take in the oldest one under way. Blocks while the device computes it."""
        began = time.perf_counter()
        planned = self.scheduler.schedule()
        if planned is not None:
            self._in_flight.append((planned, self._runner.submit(planned.plan)))
            self._stats.steps += 1
        if not self._in_flight or (planned is not None and len(self._in_flight) < self._depth):
            self._stats.schedule_seconds += time.perf_counter() - began
            return []
        oldest, handle = self._in_flight.popleft()
        self._waiting_since = waiting = time.perf_counter()
        try:
            output = handle.result()
        except Exception as error:
            outputs = self._fail_step(oldest, error)
        else:
            self._failed_steps = 0
            resumed = time.perf_counter()
            outputs = self.scheduler.update(oldest, output)
            self._stats.schedule_seconds += waiting - began + time.perf_counter() - resumed
        self._waiting_since = None
        self._stats.step_seconds += time.perf_counter() - began
        self._forget(outputs)
        return outputs

    def _fail_step(self, planned: PlannedStep, error: Exception) -> list[EngineOutput]:
        self._failed_steps += 1
        logger.error("step %d failed", planned.plan.step, exc_info=error)
        if self._failed_steps >= MAX_FAILED_STEPS:
            raise EngineError(f"{MAX_FAILED_STEPS} steps in a row failed, the last with: {error!r}") from error
        message = f"the engine failed on the step of this request ({type(error).__name__}: {error}); try again"
        return [self.scheduler.fail(request, message) for request in planned.requests if not request.finished]

    def _forget(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            self._stats.generated_tokens += len(output.token_ids)
            if output.finish_reason is not None:
                del self._requests[output.request_id]
                self._stats.finished += 1

    def stats(self) -> EngineStats:
        """A snapshot; may be called from another thread."""
        stats, scheduler, waiting = self._stats, self.scheduler, self._waiting_since
        stats.running = len(scheduler.running)
        stats.waiting = len(scheduler.waiting)
        stats.blocks_held = sum(pool.num_held for pool in scheduler.memory.pools)
        stats.blocks_cached = sum(pool.num_cached for pool in scheduler.memory.pools)
        stats.preemptions = scheduler.num_preemptions
        stats.prefix_queried_tokens = scheduler.prefix_queried_tokens
        stats.prefix_hit_tokens = scheduler.prefix_hit_tokens
        counts = self._runner.step_counts()
        stats.decode_recorded, stats.prompts_recorded = counts.decode_recorded, counts.prompts_recorded
        stats.decode_replayed, stats.prompts_replayed = counts.decode_replayed, counts.prompts_replayed
        stats.decode_eager, stats.prompts_eager = counts.decode_eager, counts.prompts_eager
        stats.step_in_flight_s = 0.0 if waiting is None else time.perf_counter() - waiting
        return stats
