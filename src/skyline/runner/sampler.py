"""From logits to the next token of each request, whatever mix of sampling parameters a batch holds.

Order of processing, as in vLLM: raw log-probabilities are taken from the model's logits; then allowed_token_ids,
bad_words, min_tokens, grammar, repetition penalty, frequency and presence penalties, logit_bias, temperature, min_p,
top_k, top_p, choice. Greedy requests take the argmax before temperature.

A row's token is a function of that row alone: its logits, its parameters, its seed and its position. Neither the batch,
nor the slot, nor preemption, nor the process changes it (sampling/choose.py and sampling/uniform.py say how).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skyline.engine.grammar_check import GrammarError
from skyline.engine.messages import AdmittedRequest, TokenLogprobs
from skyline.kernels.cpu import sampling
from skyline.kernels.triton import or_in_torch
from skyline.ops.batch import to_device
from skyline.runner.grammar import GrammarCompiler, Matcher, apply_bitmask, bitmask_width
from skyline.runner.sampling import choose
from skyline.runner.sampling.result import HostCopy, LogprobTensors, SampleResult
from skyline.runner.sampling.rules import Rules
from skyline.runner.sampling.uniform import uniform

__all__ = ["SampleResult", "Sampler"]

_GREEDY, _UNSORTED, _TOP_K, _TOP_P, _SORTED = range(5)
_PENALIZED_AT_ONCE = 32
_CPU_CHUNK = 1 << 20  # logits worked on at once on the CPU: their temporaries stay in its cache


class Sampler:
    """Sampling state of `max_slots` requests and the choice of their tokens.

    Not thread-safe: one thread calls it, in the order of the plans.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        max_slots: int,
        device: torch.device,
        token_ids: Tensor,
        eos_token_ids: Sequence[int],
        grammar_compiler: GrammarCompiler | None,
    ) -> None:
        """vocab_size is the width of the logits, which may exceed the tokenizer's vocabulary.

        token_ids [max_slots, max_model_len] int32 on `device` is the runner's buffer of each slot's prompt and
        generated tokens; it is only read. With grammar_compiler None, requests with a grammar fail.
        """
        self._vocab_size = vocab_size
        self._device = device
        self._token_ids = token_ids
        self._eos = [token for token in eos_token_ids if 0 <= token < vocab_size]
        self._eos_tensor = torch.tensor(self._eos, dtype=torch.int64, device=device)
        self._compiler = grammar_compiler
        self._mode = np.zeros(max_slots, dtype=np.int8)
        self._numbers = np.zeros((4, max_slots))  # temperature, top_k, top_p, min_p
        self._seeds = np.zeros(max_slots, dtype=np.uint64)
        self._num_prompt = [0] * max_slots
        self._logprobs: list[int | None] = [None] * max_slots
        self._rules: list[Rules | None] = [None] * max_slots
        self._matchers: list[Matcher | None] = [None] * max_slots
        self._failed: list[str | None] = [None] * max_slots
        self._special = np.zeros(max_slots, dtype=np.bool_)  # slots with any of the four above
        self._plain = [True] * max_slots  # greedy and none of these four: a list, which is faster to read than arrays
        self._float32: Tensor | None = None  # memory for logits that have to be converted
        self._counts: Tensor | None = None  # zeros between steps; where Triton's kernels apply penalties
        for slot in range(max_slots):
            self.release(slot)

    def admit(self, request: AdmittedRequest) -> None:
        """Take over a slot. Raises nothing for what a user sent: a bad grammar fails the slot's samples."""
        slot, params = request.slot, request.params
        self.release(slot)
        top_k = params.top_k if 0 < params.top_k < self._vocab_size else self._vocab_size
        if params.greedy:
            mode = _GREEDY
        elif top_k <= choose.MAX_TOP_K and top_k < self._vocab_size:
            mode = _TOP_K
        elif top_k < self._vocab_size:
            mode = _SORTED
        else:
            mode = _TOP_P if params.top_p < 1.0 else _UNSORTED
        self._mode[slot] = mode
        self._numbers[:, slot] = (1.0 if params.greedy else params.temperature, top_k, params.top_p, params.min_p)
        self._seeds[slot] = request.seed
        self._num_prompt[slot] = request.num_prompt
        self._logprobs[slot] = params.logprobs
        self._rules[slot] = Rules.of(params, self._eos, self._vocab_size, self._device)
        if params.grammar is not None:
            try:
                if self._compiler is None:
                    raise GrammarError("structured output is not available: the model has no tokenizer")
                matcher = self._compiler.compile(params.grammar)
                for token in request.token_ids[request.num_prompt :]:
                    matcher.accept(token)
                self._matchers[slot] = matcher
            except GrammarError as error:
                self._failed[slot] = str(error)
        state = (self._logprobs[slot], self._rules[slot], self._matchers[slot], self._failed[slot])
        self._special[slot] = any(part is not None for part in state)
        self._plain[slot] = mode == _GREEDY and not self._special[slot]

    def release(self, slot: int) -> None:
        """Forget everything about a slot. Releasing a free slot does nothing."""
        self._mode[slot] = _GREEDY
        self._numbers[:, slot] = (1.0, self._vocab_size, 1.0, 0.0)
        self._seeds[slot] = 0
        self._num_prompt[slot] = 0
        self._logprobs[slot] = None
        self._rules[slot] = None
        self._matchers[slot] = None
        self._failed[slot] = None
        self._special[slot] = False
        self._plain[slot] = True

    def sample(self, logits: Tensor, slots: list[int], positions: list[int]) -> SampleResult:
        """Choose one token for each row.

        logits [R, V] of a float dtype on the device, may be overwritten; row r belongs to slots[r], and positions[r]
        tokens stand before the one to choose. All is computed in float32. Queues device work and returns, except that
        rows with a grammar wait for their tokens, and, where torch has to choose, rows with top_p but no top_k wait
        once for the size of their nucleus.
        """
        if logits.shape != (len(slots), self._vocab_size) or not logits.is_floating_point():
            raise ValueError(
                f"logits must be float32, or of another float dtype, [{len(slots)}, {self._vocab_size}], "
                f"not {logits.dtype} {list(logits.shape)}"
            )
        special = [row for row, slot in enumerate(slots) if self._special[slot]]
        if special or not choose.takes_mixed(logits):
            logits = self._converted(logits)
        wanted = [row for row in special if self._logprobs[slots[row]] is not None]
        raw = logits[self._index(wanted)] if wanted else None
        errors = {slots[row]: text for row in special if (text := self._failed[slots[row]]) is not None}
        constrained = [row for row in special if self._matchers[slots[row]] is not None]
        if special:
            self._process(logits, slots, positions, special, constrained, errors)
        tokens, tops = self._choose(logits, np.asarray(slots, np.int64), np.asarray(positions, np.uint64))
        if constrained:
            self._advance(tokens, slots, constrained, errors)
        host, counts = [tokens, tops], None
        if raw is not None:
            counts = [self._logprobs[slot] for slot in slots]
            most = max(count for count in counts if count is not None)
            found = LogprobTensors.of(raw, tokens[self._index(wanted)], most)
            host += [found.ids, found.logprobs, found.ranks]
        return SampleResult(tokens, list(slots), HostCopy(host), counts, errors)

    def greedy_only(self, slots: list[int]) -> bool:
        """Whether the tokens of these slots are the largest of their logits as they are, and nothing else is wanted."""
        return all(map(self._plain.__getitem__, slots))

    def sample_greedy(self, tokens: Tensor, tops: Tensor, slots: list[int]) -> SampleResult:
        """`sample` for slots that are `greedy_only`, from what was already found of their logits.

        tokens [R] int64 and tops [R] float32 on the device, each row's largest logit; what is there now is copied.
        """
        host = [tokens, tops] if tokens.is_cuda else [tokens.clone(), tops.clone()]
        return SampleResult(tokens, list(slots), HostCopy(host))

    def prompt_logprobs(self, logits: Tensor, targets: Tensor, k: int) -> list[TokenLogprobs]:
        """Log-probabilities of the prompt's own tokens, each with the k most likely ones; waits for the device.

        logits [M, V] of any float dtype, left as they are; targets [M] integer, the token after each position.
        """
        found = LogprobTensors.of(logits, targets, k)
        ids, logprobs, ranks = HostCopy([found.ids, found.logprobs, found.ranks]).wait()
        return LogprobTensors.to_messages(ids, logprobs, ranks, [k] * logits.shape[0])

    def _converted(self, logits: Tensor) -> Tensor:
        """logits as float32; on the CPU in memory of the sampler's own, which the next call writes over."""
        if logits.dtype != torch.bfloat16 or not choose.is_native(logits):
            return logits.float()
        # New memory of this size would cost more than the conversion.
        if self._float32 is None or len(self._float32) < len(logits):
            self._float32 = torch.empty(logits.shape, dtype=torch.float32)
        sampling.widen(self._float32[: len(logits)], logits)
        return self._float32[: len(logits)]

    def _process(
        self,
        logits: Tensor,
        slots: list[int],
        positions: list[int],
        special: list[int],
        constrained: list[int],
        errors: dict[int, str],
    ) -> None:
        """Apply the rules and grammars of the `special` rows to their logits."""
        ruled = [(row, rules) for row in special if (rules := self._rules[slots[row]]) is not None]
        for row, rules in ruled:
            rules.mask(logits[row], self._token_ids[slots[row], self._num_prompt[slots[row]] : positions[row]])
        if constrained:
            self._constrain(logits, slots, constrained, errors)
        if choose.is_triton(logits):
            penalized = [(row, rules) for row, rules in ruled if rules.penalizes]
            for start in range(0, len(penalized), _PENALIZED_AT_ONCE):
                self._penalize(logits, slots, positions, penalized[start : start + _PENALIZED_AT_ONCE])
            for row, rules in ruled:
                rules.add_bias(logits[row])
        else:
            for row, rules in ruled:
                rules.adjust(logits[row], self._token_ids[slots[row], : positions[row]], self._num_prompt[slots[row]])

    def _penalize(self, logits: Tensor, slots: list[int], positions: list[int], ruled: list[tuple[int, Rules]]) -> None:
        """Penalties of a few rows: each needs a count of every token."""
        from skyline.kernels.triton.logits import penalize

        lengths = [positions[row] for row, _ in ruled]
        numbers = np.array(
            [
                [row for row, _ in ruled],
                [slots[row] for row, _ in ruled],
                lengths,
                [self._num_prompt[slots[row]] for row, _ in ruled],
                [rules.repetition for _, rules in ruled],
                [rules.frequency for _, rules in ruled],
                [rules.presence for _, rules in ruled],
            ],
            np.float64,
        )
        if self._counts is None or len(self._counts) < len(ruled):
            self._counts = torch.zeros((len(ruled), self._vocab_size), dtype=torch.int32, device=self._device)
        counts, there = self._counts, to_device(numbers, self._device)

        def in_torch() -> None:
            counts.zero_()  # some tokens may have been counted
            for row, rules in ruled:
                tokens = self._token_ids[slots[row], : positions[row]]
                rules.penalize(logits[row], tokens, self._num_prompt[slots[row]])

        or_in_torch("penalties", lambda: penalize(logits, counts, self._token_ids, there, max(lengths)), in_torch)

    def _constrain(self, logits: Tensor, slots: list[int], rows: list[int], errors: dict[int, str]) -> None:
        bitmask = torch.zeros(
            (len(rows), bitmask_width(self._vocab_size)), dtype=torch.int32, pin_memory=self._device.type == "cuda"
        )
        for place, row in enumerate(rows):
            matcher = self._matchers[slots[row]]
            assert matcher is not None
            try:
                matcher.fill_mask(bitmask[place])
            except GrammarError as error:
                errors[slots[row]] = str(error)
                bitmask[place] = -1
        index = self._index(rows)
        masked = apply_bitmask(logits[index], bitmask.to(self._device, non_blocking=True))
        # Other rules may exclude all that the grammar allows: end the text rather than fail the request.
        stuck = masked.amax(dim=-1, keepdim=True) == float("-inf")
        masked[:, self._eos_tensor] = masked[:, self._eos_tensor].masked_fill(stuck, 0.0)
        logits.index_copy_(0, index, masked)

    def _advance(self, tokens: Tensor, slots: list[int], rows: list[int], errors: dict[int, str]) -> None:
        """Tell the matchers what was chosen: the one place that waits for tokens."""
        chosen = tokens[self._index(rows)].tolist()
        for row, token in zip(rows, chosen, strict=True):
            matcher = self._matchers[slots[row]]
            if matcher is None or slots[row] in errors:
                continue
            try:
                matcher.accept(token)
            except GrammarError as error:
                errors[slots[row]] = str(error)

    def _choose(self, logits: Tensor, slots: NDArray[np.int64], positions: NDArray[np.uint64]) -> tuple[Tensor, Tensor]:
        """Tokens [R] int64 and the largest processed logit of each row [R]."""
        modes = self._mode[slots]
        if not modes.any():
            return choose.greedy(logits)
        numbers = np.concatenate((self._numbers[:, slots], uniform(self._seeds[slots], positions)[None]))
        if choose.takes_mixed(logits):
            numbers[1, modes == _GREEDY] = 1
            return choose.choose_mixed(logits, numbers)
        tokens = torch.empty(len(slots), dtype=torch.int64, device=self._device)
        tops = torch.empty(len(slots), dtype=torch.float32, device=self._device)
        for mode in np.unique(modes):
            rows = np.flatnonzero(modes == mode)
            for part in self._chunks(rows):
                whole = len(rows) == len(slots)
                index = slice(int(part[0]), int(part[-1]) + 1) if whole else self._index(part)
                tokens[index], tops[index] = self._choose_alike(int(mode), logits[index], numbers[:, part])
        return tokens, tops

    def _chunks(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        size = len(rows) if self._device.type != "cpu" else max(1, _CPU_CHUNK // self._vocab_size)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    def _choose_alike(self, mode: int, logits: Tensor, numbers: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Choose for rows of one mode; numbers [5, R] float64: temperature, top_k, top_p, min_p, u."""
        if mode == _GREEDY:
            return choose.greedy(logits)
        column = to_device(numbers, self._device).unsqueeze(-1)
        temperature, top_k, top_p, u = column[0].float(), column[1].long(), column[2], column[4]
        min_p = column[3].float() if numbers[3].any() else None
        if mode == _UNSORTED:
            return choose.draw_unsorted(logits, temperature, min_p, u)
        if mode == _TOP_K:
            return choose.draw_top_k(logits, temperature, top_k, int(numbers[1].max()), top_p, min_p, u)
        if mode == _TOP_P:
            return choose.draw_top_p(logits, temperature, top_p, min_p, u)
        return choose.draw_sorted(logits, temperature, top_k, top_p, min_p, u)

    def _index(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        return to_device(np.asarray(rows, np.int64), self._device)
