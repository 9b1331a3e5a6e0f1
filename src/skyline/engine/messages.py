"""The messages that cross between a front end and the engine, and between the engine and its runner.

The first group is encoded with msgspec (msgpack) and travels over ZeroMQ; the second stays inside the engine process.
No message holds a tensor, so nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from skyline.engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


# --- front end -> engine ---------------------------------------------------------------------------------------------


class EngineRequest(msgspec.Struct, tag="request", omit_defaults=True):
    """One sequence to generate (the front end has already fanned out `n`). Prompt and max_tokens fit the context."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    priority: int = 0  # lower runs first
    cache_salt: str = ""  # requests share prefix-cache blocks only under the same salt


class AbortRequests(msgspec.Struct, tag="abort"):
    request_ids: list[str]


class ResetPrefixCache(msgspec.Struct, tag="reset_prefix_cache"):
    """Drop every cached block that no request holds."""


class Shutdown(msgspec.Struct, tag="shutdown"):
    """Abort what is left and exit."""


ToEngine = EngineRequest | AbortRequests | ResetPrefixCache | Shutdown


# --- engine -> front end ---------------------------------------------------------------------------------------------


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities (natural log of softmax of the raw logits) at one position.

    `ids[0]` is the token that stands at that position, `rank` its rank (1 = most likely); the rest are the most
    likely tokens, best first.
    """

    ids: list[int]
    logprobs: list[float]
    rank: int


class EngineOutput(msgspec.Struct, omit_defaults=True):
    """What one step added to one request."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # positions 1.. of the prompt, once, with the first token
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the token id that ended it, if one did
    error: str | None = None
    cached_tokens: int = 0  # prompt tokens taken from the prefix cache; set with the first token


class EngineStats(msgspec.Struct, omit_defaults=True):
    """Gauges and running totals since start; sent at least every second, also as the sign of life."""

    steps: int = 0
    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_held: int = 0
    blocks_cached: int = 0
    preemptions: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    step_in_flight_s: float = 0.0  # how long the oldest unfinished step has been running; 0 when idle
    step_seconds: float = 0.0  # total time of steps
    schedule_seconds: float = 0.0  # total time the engine itself took (planning and bookkeeping)
    decode_recorded: int = 0  # numbers of requests whose decode steps are recorded
    decode_replayed: int = 0  # decode steps that were replayed, and those that ran call by call
    decode_eager: int = 0
    prompts_recorded: int = 0  # likewise of all other steps: numbers of tokens
    prompts_replayed: int = 0
    prompts_eager: int = 0


class StepOutputs(msgspec.Struct, tag="outputs"):
    outputs: list[EngineOutput]


class StatsReport(msgspec.Struct, tag="stats"):
    stats: EngineStats


class EngineReady(msgspec.Struct, tag="ready"):
    """Sent once, when the engine can take requests. `report` is what it decided: the rows of the start-up table."""

    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int
    report: dict[str, str]


class EngineFailed(msgspec.Struct, tag="failed"):
    """The engine cannot start or go on; the process ends after this."""

    error: str


FromEngine = StepOutputs | StatsReport | EngineReady | EngineFailed


# --- engine -> runner ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class AdmittedRequest:
    """A request that (re)enters the running set. The runner keeps its tokens and sampling state in `slot` until freed.

    `token_ids` holds the prompt and, after a preemption, what was generated so far; `num_prompt` tells them apart.
    """

    slot: int
    request_id: str
    token_ids: list[int]
    num_prompt: int
    params: SamplingParams
    seed: int  # 0 <= seed < 2**63; the client's, or drawn by the engine. Same seed, same tokens
    prompt_logprobs: bool = False  # whether the runner still has to report them


@dataclass(slots=True)
class StepPlan:
    """One step of the device. Parallel lists, one entry a scheduled request; nothing depends on a token's value.

    Request i computes tokens [starts[i], starts[i] + lengths[i]) of its slot's tokens. If samples[i], the logits of the
    last of them choose the next token, which the runner stores at position starts[i] + lengths[i] of the slot.
    Apply in order: freed, admitted, new_blocks, then compute.
    """

    step: int
    freed: list[int] = field(default_factory=list)  # slots whose request has finished, was aborted or preempted
    admitted: list[AdmittedRequest] = field(default_factory=list)
    # (slot, group, block ids to append to its table of that group)
    new_blocks: list[tuple[int, int, list[int]]] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    # Only where there are recurrent layers: the blocks to read each request's state from (-1: it begins) and write to.
    state_reads: list[int] = field(default_factory=list)
    state_writes: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def is_decode(self) -> bool:
        """Whether every request computes one token and samples from it."""
        return bool(self.slots) and all(self.samples) and max(self.lengths) == 1


@dataclass(slots=True)
class StepOutput:
    """What a step produced; the lists are parallel to the plan's."""

    step: int
    token_ids: list[int]  # the sampled token, or -1 where the plan did not sample
    logprobs: list[TokenLogprobs | None] | None = None
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # by slot: this chunk's positions
    errors: dict[int, str] = field(default_factory=dict)  # by slot: this request failed, the others are fine


class StepHandle(Protocol):
    def result(self) -> StepOutput:
        """Wait for the step and return what it sampled; raises what the step raised."""


@dataclass(slots=True)
class StepCounts:
    """As in EngineStats. Steps are of decodes if they are `StepPlan.is_decode`."""

    decode_recorded: int = 0
    decode_replayed: int = 0
    decode_eager: int = 0
    prompts_recorded: int = 0
    prompts_replayed: int = 0
    prompts_eager: int = 0


class Runner(Protocol):
    """Executes plans strictly in the order they were submitted."""

    def submit(self, plan: StepPlan) -> StepHandle:
        """Start the step and return at once."""

    def idle(self) -> bool:
        """Do a bit of what saves time later; called while there is no work. False if there is nothing left to do."""

    def step_counts(self) -> StepCounts:
        """May be called from any thread."""

    def close(self) -> None: ...
