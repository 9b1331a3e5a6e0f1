"""The engine's view of one request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skyline.engine.messages import EngineRequest, TokenLogprobs

if TYPE_CHECKING:
    from skyline.engine.kv_memory import Holding


class Request:
    """Counts and tokens of one request.

    Under asynchronous scheduling a plan is made before the tokens of the plan before it are known, so two counts run
    ahead of `tokens`: `num_computed` includes what plans under way compute, and `in_flight` tokens are being sampled.
    """

    __slots__ = (
        "block_hashes",
        "cached_tokens",
        "epoch",
        "finished",
        "holding",
        "id",
        "in_flight",
        "max_tokens_total",
        "num_computed",
        "num_prompt",
        "order",
        "params",
        "prompt_logprobs",
        "reported",
        "salt",
        "seed",
        "slot",
        "stop_tokens",
        "tokens",
    )

    def __init__(
        self, message: EngineRequest, arrival: int, seed: int, max_model_len: int, eos_token_ids: frozenset[int]
    ) -> None:
        params = message.params
        self.id = message.request_id
        self.params = params
        self.salt = message.cache_salt
        self.seed = seed
        self.order = (message.priority, arrival)  # the smaller runs first and is preempted last
        self.tokens = list(message.prompt)  # the prompt, then every token whose value is known
        self.num_prompt = len(message.prompt)
        limit = max_model_len if params.max_tokens is None else self.num_prompt + params.max_tokens
        self.max_tokens_total = min(limit, max_model_len)
        stop = set(params.stop_token_ids) if params.ignore_eos else eos_token_ids.union(params.stop_token_ids)
        self.stop_tokens = frozenset(stop)
        self.num_computed = 0
        self.in_flight = 0
        self.slot = -1  # the runner's; -1 while waiting
        self.holding: Holding  # of memory, while it runs
        self.block_hashes: list[bytes] = []  # of the full blocks of known tokens, as far as they were needed
        self.epoch = 0  # counts preemptions, so that output of an earlier life is recognised
        self.cached_tokens = 0
        self.reported = False  # whether the first output has gone out
        self.finished = False
        self.prompt_logprobs: list[TokenLogprobs] | None = None if params.prompt_logprobs is None else []

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt
