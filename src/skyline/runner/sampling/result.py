"""What sampling gives back: tokens that stay on the device, and host data that is fetched without stalling it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skyline.engine.messages import TokenLogprobs
from skyline.kernels.triton import or_in_torch
from skyline.runner.sampling import choose

_ROWS_AT_ONCE = 32  # bounds the temporaries of logprobs to a few rows of the vocabulary
_ROWS_IN_TRITON = 1024  # which has none of that size
_LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot carry (as in OpenAI's API)


class HostCopy:
    """Starts copying tensors to the host at once; waiting for it waits for nothing that was queued later."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = list(tensors)
        if tensors and tensors[0].is_cuda:
            self._host = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                for tensor in tensors
            ]
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> list[Tensor]:
        if self._event is not None:
            self._event.synchronize()
        return self._host


@dataclass(slots=True)
class LogprobTensors:
    """Log-probabilities of M positions: ids and logprobs [M, 1 + k] with the position's own token first, ranks [M]."""

    ids: Tensor
    logprobs: Tensor
    ranks: Tensor

    @staticmethod
    def of(logits: Tensor, tokens: Tensor, k: int) -> LogprobTensors:
        """logits [M, V] of any float dtype, left as they are; tokens [M] integer; 0 <= k."""
        k = min(k, logits.shape[1])
        rows = _ROWS_IN_TRITON if choose.is_triton(logits) else _ROWS_AT_ONCE
        parts = [
            _logprobs(logits[start : start + rows], tokens[start : start + rows], k)
            for start in range(0, max(logits.shape[0], 1), rows)
        ]
        ids, logprobs, ranks = (torch.cat(column) for column in zip(*parts, strict=True))
        return LogprobTensors(ids, logprobs, ranks)

    @staticmethod
    def to_messages(ids: Tensor, logprobs: Tensor, ranks: Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
        """Host tensors to messages; counts[m] is how many of the most likely tokens position m asked for."""
        rows = zip(ids.tolist(), logprobs.tolist(), ranks.tolist(), counts, strict=True)
        return [TokenLogprobs(i[: n + 1], values[: n + 1], rank) for i, values, rank, n in rows]


def _logprobs(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = tokens.to(torch.int64).unsqueeze(1)
    if choose.is_triton(logits):
        from skyline.kernels.triton.logits import token_statistics

        own, sums, ranks = or_in_torch(
            "log-probabilities",
            lambda: token_statistics(logits, tokens.squeeze(1)),
            lambda: _statistics(logits, tokens),
        )
    else:
        own, sums, ranks = _statistics(logits, tokens)
    values, ids = logits.topk(k, dim=-1)
    logprobs = torch.cat((own.unsqueeze(1), values.float()), dim=1) - sums.unsqueeze(1)
    return torch.cat((tokens, ids), dim=1), logprobs.clamp_(min=_LEAST_LOGPROB), ranks


def _statistics(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As skyline.kernels.triton.logits.token_statistics, in torch; tokens [M, 1] int64."""
    logits = logits.float()
    own = logits.gather(1, tokens)
    return own.squeeze(1), logits.logsumexp(-1), (logits > own).sum(-1) + 1


@dataclass(slots=True)
class SampleResult:
    """One step's samples.

    token_ids [R] int64 is on the device and valid at once for further device work; for rows with an error it is some
    token of the vocabulary. `host_token_ids`, `errors` and `logprobs` wait until the device has finished the sampling
    (and nothing queued after it), so read them when the step's result is wanted, not when it is submitted.
    """

    token_ids: Tensor
    slots: list[int]
    host: HostCopy  # token_ids, largest logit of each row, then the three logprob tensors if any row wants them
    logprob_counts: list[int | None] | None = None  # one entry a row
    host_errors: dict[int, str] = field(default_factory=dict)

    def host_token_ids(self) -> list[int]:
        """The tokens as a list of R ints."""
        return [int(token) for token in self.host.wait()[0].tolist()]

    @property
    def errors(self) -> dict[int, str]:
        """By slot, why its request fails; rows that are not in it are fine."""
        errors = dict(self.host_errors)
        tops = self.host.wait()[1].tolist()
        if not all(map(math.isfinite, tops)):
            for slot, top in zip(self.slots, tops, strict=True):
                if top == float("-inf"):
                    errors[slot] = (
                        "no token is left to choose from: allowed_token_ids, bad_words and min_tokens together "
                        "exclude every token"
                    )
                elif not -float("inf") < top < float("inf"):
                    errors[slot] = (
                        f"the model's logits are not finite (the largest is {top}), so no token can be chosen"
                    )
        return errors

    @property
    def logprobs(self) -> list[TokenLogprobs | None] | None:
        """One entry a row, None for rows that did not ask; None if no row asked."""
        if self.logprob_counts is None:
            return None
        ids, logprobs, ranks = self.host.wait()[2:]
        counts = [count for count in self.logprob_counts if count is not None]
        messages = iter(LogprobTensors.to_messages(ids, logprobs, ranks, counts))
        return [None if count is None else next(messages) for count in self.logprob_counts]
