"""The sampler against a naive oracle, row by row; independence of rows; slots that forget; errors of one row only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyline.engine.messages import AdmittedRequest
from skyline.engine.sampling_params import GrammarSpec, SamplingParams
from skyline.runner.sampler import Sampler
from skyline.runner.sampling import choose
from skyline.runner.sampling.uniform import splitmix64, uniform

CPU = torch.device("cpu")
EOS = [0, 1]


def make_sampler(vocab_size: int, max_slots: int = 4, length: int = 64) -> Sampler:
    buffer = torch.zeros((max_slots, length), dtype=torch.int32)
    return Sampler(
        vocab_size=vocab_size, max_slots=max_slots, device=CPU, token_ids=buffer, eos_token_ids=EOS,
        grammar_compiler=None,
    )  # fmt: skip


def admit(sampler: Sampler, slot: int, params: SamplingParams, tokens: list[int], num_prompt: int, seed: int) -> None:
    sampler._token_ids[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    sampler.admit(AdmittedRequest(slot, f"r{slot}", tokens, num_prompt, params, seed))


def sample_one(params: SamplingParams, logits: torch.Tensor, tokens: list[int], num_prompt: int, seed: int) -> int:
    sampler = make_sampler(logits.shape[0], length=max(64, len(tokens) + 1))
    admit(sampler, 2, params, tokens, num_prompt, seed)
    result = sampler.sample(logits.clone()[None], [2], [len(tokens)])
    assert result.errors == {}
    return int(result.token_ids[0])


# --- the oracle: one row, plain Python -------------------------------------------------------------------------------


def oracle_logits(params: SamplingParams, logits: list[float], tokens: list[int], num_prompt: int) -> list[float]:
    x, output = list(logits), tokens[num_prompt:]
    if params.allowed_token_ids is not None:
        x = [v if t in params.allowed_token_ids else -math.inf for t, v in enumerate(x)]
    for word in params.bad_words_token_ids:
        head = list(word[:-1])
        if len(output) >= len(head) and output[len(output) - len(head) :] == head:
            x[word[-1]] = -math.inf
    if len(output) < params.min_tokens:
        for token in [*params.stop_token_ids, *([] if params.ignore_eos else EOS)]:
            x[token] = -math.inf
    for token in set(tokens):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    for token, bias in params.logit_bias.items():
        x[token] += bias
    return x


def oracle_probabilities(params: SamplingParams, processed: list[float]) -> np.ndarray[Any, Any]:
    x = np.array(processed, dtype=np.float64) / params.temperature
    p = np.exp(x - x.max())
    p[p < params.min_p] = 0.0
    order = np.argsort(-x, kind="stable")
    if params.top_k > 0:
        p[order[params.top_k :]] = 0.0
    p /= p.sum()
    if params.top_p < 1.0:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= params.top_p]] = 0.0
    return p / p.sum()


# --- rules -----------------------------------------------------------------------------------------------------------

V = 13
token = st.integers(0, V - 1)
params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    allowed_token_ids=st.none() | st.lists(token, min_size=6, max_size=12, unique=True),
    bad_words_token_ids=st.lists(st.lists(token, min_size=1, max_size=3), max_size=3),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.lists(token, max_size=2),
    ignore_eos=st.booleans(),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -1.5]),
    presence_penalty=st.sampled_from([0.0, 0.4, -2.0]),
    logit_bias=st.dictionaries(token, st.sampled_from([-100.0, -1.5, 0.0, 2.0, 100.0]), max_size=4),
)


@settings(max_examples=250, deadline=None)
@given(
    params=params_strategy,
    tokens=st.lists(token, min_size=1, max_size=10),
    prompt=st.integers(1, 10),
    key=st.integers(0, 2**32 - 1),
)
def test_processed_logits_equal_the_oracle(params: SamplingParams, tokens: list[int], prompt: int, key: int) -> None:
    num_prompt = min(prompt, len(tokens))
    logits = torch.from_numpy(np.random.default_rng(key).normal(0, 3, V)).float()
    expected = oracle_logits(params, logits.tolist(), tokens, num_prompt)
    sampler = make_sampler(V)
    admit(sampler, 1, params, tokens, num_prompt, key)
    seen: list[torch.Tensor] = []
    original = sampler._choose
    sampler._choose = lambda x, s, p: (seen.append(x.clone()), original(x, s, p))[1]  # type: ignore[method-assign]
    result = sampler.sample(logits[None].clone(), [1], [len(tokens)])
    assert torch.allclose(seen[0][0], torch.tensor(expected), atol=1e-4)
    if max(expected) == -math.inf:
        assert "exclude every token" in result.errors[1]
    elif params.greedy:
        assert int(result.token_ids[0]) == int(seen[0][0].argmax())
    else:
        assert expected[int(result.token_ids[0])] > -math.inf


def test_padding_is_never_read_and_unknown_bad_words_are_ignored() -> None:
    params = SamplingParams(temperature=0, bad_words_token_ids=[[99, 3], [], [2, 3]], frequency_penalty=2.0)
    sampler = make_sampler(V)
    admit(sampler, 0, params, [5, 2], 1, 0)
    sampler._token_ids[0, 2:] = 4  # left over from an earlier request
    logits = torch.zeros(1, V)
    logits[0, 3], logits[0, 4] = 9.0, 8.0
    assert sampler.sample(logits, [0], [2]).token_ids.tolist() == [4]


# --- choice ----------------------------------------------------------------------------------------------------------


def test_greedy_is_the_lowest_argmax_beside_any_neighbour() -> None:
    sampler = make_sampler(50)
    admit(sampler, 0, SamplingParams(temperature=0), [3], 1, 0)
    admit(sampler, 1, SamplingParams(temperature=1.0), [3], 1, 0)
    logits = torch.zeros(2, 50)
    logits[:, [7, 20, 49]] = 4.0
    assert sampler.sample(logits[:1].clone(), [0], [1]).token_ids.tolist() == [7]
    assert int(sampler.sample(logits.clone(), [0, 1], [1, 1]).token_ids[0]) == 7


CASES = {
    "temperature": SamplingParams(temperature=0.7),
    "hot": SamplingParams(temperature=3.0),
    "top_k": SamplingParams(top_k=5),
    "top_k_1": SamplingParams(top_k=1),
    "top_p": SamplingParams(top_p=0.8),
    "min_p": SamplingParams(min_p=0.1),
    "top_k_top_p": SamplingParams(temperature=1.5, top_k=10, top_p=0.7),
    "top_p_min_p": SamplingParams(temperature=1.5, top_p=0.9, min_p=0.05),
    "all": SamplingParams(temperature=1.3, top_k=12, top_p=0.9, min_p=0.03),
}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_distribution(name: str, ties: bool) -> None:
    """Chi-square of 20,000 seeds against the oracle; seeds are fixed, so this either always passes or never."""
    params, vocab, draws = CASES[name], 30, 20_000
    logits = np.random.default_rng(5).normal(0, 2, vocab).astype(np.float32)
    if ties:
        logits = np.round(logits)
    sampler = make_sampler(vocab, max_slots=draws, length=2)
    for slot in range(draws):
        sampler.admit(AdmittedRequest(slot, "", [2], 1, params, slot))
    result = sampler.sample(torch.from_numpy(logits).repeat(draws, 1), list(range(draws)), [1] * draws)
    counts = np.bincount(result.token_ids.numpy(), minlength=vocab)
    expected = oracle_probabilities(params, logits.tolist()) * draws
    assert counts[expected == 0].sum() == 0
    kept = expected > 5
    chi2 = (((counts - expected) ** 2)[kept] / expected[kept]).sum()
    freedom = max(int(kept.sum()) - 1, 1)
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_one_stream_of_positions_is_uniform_and_seeds_do_not_overlap() -> None:
    positions = np.arange(4096, dtype=np.uint64)
    streams = [uniform(np.full(4096, seed, np.uint64), positions) for seed in (0, 1, 2, 2**63 - 1)]
    for stream in streams:
        assert stream.min() >= 0 and stream.max() < 1 and abs(stream.mean() - 0.5) < 0.02
    assert len(np.unique(np.concatenate(streams))) == 4 * 4096
    assert abs(np.corrcoef(streams)[0, 1:]).max() < 0.06


def test_splitmix64_known_value() -> None:
    # First output of the reference implementation (https://prng.di.unimi.it/splitmix64.c) from state 0.
    assert int(splitmix64(np.zeros(1, np.uint64))[0]) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000])
def test_no_token_of_zero_probability_even_at_the_ends(u: float, vocab: int) -> None:
    logits = torch.full((1, vocab), -math.inf)
    logits[0, vocab // 2] = -3.0
    one, uu = torch.ones(1, 1), torch.full((1, 1), u, dtype=torch.float64)
    tokens, tops = choose.draw_unsorted(logits.clone(), one, None, uu)
    assert tokens.tolist() == [vocab // 2] and tops.tolist() == [-3.0]
    tokens, _ = choose.draw_top_p(logits.clone(), one, one.double() * 0.999, None, uu)
    assert tokens.tolist() == [vocab // 2]


@pytest.mark.parametrize("ties", [False, True])
def test_candidates_are_in_canonical_order(ties: bool) -> None:
    logits = torch.randn(5, 4000, generator=torch.Generator().manual_seed(1)) * 3
    if ties:
        logits = logits.round() * torch.tensor([1.0, -1.0, 0.0, 1.0, -0.0])[:, None]
    expected = torch.sort(logits, dim=-1, descending=True, stable=True)
    for k in (1, 3, 64, 3999, 4000, 9999):
        values, ids = choose.top_candidates(logits, k)
        assert torch.equal(ids, expected.indices[:, :k]) and torch.equal(values, expected.values[:, :k])


def test_a_wide_nucleus_falls_back_to_the_sort() -> None:
    """Flat rows need more than the candidates; the token must be that of the definition."""
    vocab, top_p = 5000, 0.9
    rows = torch.randn(3, vocab, generator=torch.Generator().manual_seed(2)) * torch.tensor([0.1, 8.0, 0.0])[:, None]
    for row in rows:
        p = oracle_probabilities(SamplingParams(top_p=top_p), row.tolist())
        order = np.argsort(-row.numpy(), kind="stable")
        for seed in range(20):
            u = uniform(np.array([seed], np.uint64), np.array([1], np.uint64))[0]
            expected = int(np.searchsorted(np.cumsum(p[order]), u, side="right"))
            found = sample_one(SamplingParams(top_p=top_p), row, [2], 1, seed)
            assert abs(int(np.flatnonzero(order == found)[0]) - expected) <= 1  # the oracle rounds, the sampler not


MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.1, min_p=0.02),
    SamplingParams(top_k=20, top_p=0.95),
    SamplingParams(top_k=1000, temperature=2.0),
    SamplingParams(top_k=3000, top_p=0.99),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.99, temperature=4.0, min_p=0.001),
    SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3, top_k=40),
    SamplingParams(logit_bias={5: 3.0}, allowed_token_ids=list(range(0, 9000, 7)), top_p=0.5),
    SamplingParams(bad_words_token_ids=[[3], [4, 5]], min_tokens=9, logprobs=3),
]


def test_rows_do_not_depend_on_their_neighbours_or_slots() -> None:
    """Bitwise: each row alone, and among 31 others of every kind, in two orders and other slots."""
    vocab, count = 9001, 32
    generator = np.random.default_rng(3)
    logits = torch.from_numpy(generator.normal(0, 2.5, (count, vocab))).float()
    logits[::3] = logits[::3].to(torch.bfloat16).float()  # many equal values
    logits[::5] *= 0.05  # wide nuclei
    requests = [
        (MIXED[r % len(MIXED)], [int(t) for t in generator.integers(2, vocab, 1 + r)], 1 + r // 3, r * 977)
        for r in range(count)
    ]
    alone = [sample_one(p, logits[r], t, n, s) for r, (p, t, n, s) in enumerate(requests)]
    for order in (list(range(count)), list(generator.permutation(count)), list(range(0, count, 2))):
        sampler = make_sampler(vocab, max_slots=count)
        slots = [int(slot) for slot in generator.permutation(count)[: len(order)]]
        for slot, r in zip(slots, order, strict=True):
            admit(sampler, slot, *requests[r])
        result = sampler.sample(logits[order].clone(), slots, [len(requests[r][1]) for r in order])
        assert result.token_ids.tolist() == [alone[r] for r in order]
        assert result.errors == {}


def test_processing_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(0))
    found = []
    for chunk in (1, 1 << 20):
        monkeypatch.setattr("skyline.runner.sampler._CPU_CHUNK", chunk)
        sampler = make_sampler(3000, max_slots=8)
        for slot in range(8):
            admit(sampler, slot, SamplingParams(temperature=0.9), [2], 1, slot)
        found.append(sampler.sample(logits.clone(), list(range(8)), [1] * 8).token_ids.tolist())
    assert found[0] == found[1]


def test_preemption_gives_the_same_tokens() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, presence_penalty=1.0, bad_words_token_ids=[[3, 4]])
    table = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))

    def run(preempt_at: int | None) -> list[int]:
        sampler, tokens, slot = make_sampler(40), [5, 6], 0
        admit(sampler, slot, params, tokens, 2, 77)
        for step in range(20):
            if step == preempt_at:
                sampler.release(slot)
                slot = 3
                admit(sampler, slot, params, tokens, 2, 77)
            result = sampler.sample(table[step : step + 1].clone(), [slot], [len(tokens)])
            tokens = [*tokens, *result.host_token_ids()]
            sampler._token_ids[slot, len(tokens) - 1] = tokens[-1]
        return tokens

    assert run(None) == run(1) == run(13)


# --- slots, errors, log-probabilities --------------------------------------------------------------------------------


def state_of(sampler: Sampler, slot: int) -> list[object]:
    lists = (sampler._num_prompt, sampler._logprobs, sampler._rules, sampler._matchers, sampler._failed, sampler._plain)
    arrays = (sampler._mode, sampler._seeds, sampler._special, *sampler._numbers)
    return [entry[slot] for entry in lists] + [entry[slot].item() for entry in arrays]


@pytest.mark.parametrize("params", [*MIXED, SamplingParams(grammar=GrammarSpec("regex", "a"))])
def test_release_clears_everything(params: SamplingParams) -> None:
    sampler = make_sampler(9001)
    fresh = state_of(sampler, 1)
    admit(sampler, 1, params, [2, 3, 4], 2, 99)
    assert state_of(sampler, 1) != fresh
    sampler.release(1)
    assert state_of(sampler, 1) == fresh
    per_slot = {name for name, value in vars(sampler).items() if isinstance(value, (list, np.ndarray))}
    assert per_slot == {
        "_eos", "_mode", "_numbers", "_seeds", "_num_prompt", "_logprobs", "_rules", "_matchers", "_failed", "_special",
        "_plain",
    }  # fmt: skip


@pytest.mark.parametrize("vocab", [40, 5000])
@pytest.mark.parametrize("bad", [math.nan, math.copysign(math.nan, -1.0), math.inf])
@pytest.mark.parametrize("greedy", [False, True])
def test_bad_logits_fail_their_own_row_only(bad: float, greedy: bool, vocab: int) -> None:
    sampler = make_sampler(vocab, max_slots=8)
    kinds = [SamplingParams(temperature=0)] * 7 if greedy else MIXED[:7]
    logits = torch.randn(7, vocab, generator=torch.Generator().manual_seed(0))
    for slot, params in enumerate(kinds):
        admit(sampler, slot, params, [2], 1, slot)
    clean = sampler.sample(logits.clone(), list(range(7)), [1] * 7).token_ids.tolist()
    for row in range(7):
        broken = logits.clone()
        broken[row, 17] = bad
        result = sampler.sample(broken, list(range(7)), [1] * 7)
        assert list(result.errors) == [row] and "not finite" in result.errors[row]
        tokens = result.token_ids.tolist()
        assert all(0 <= token < vocab for token in tokens)
        assert [t for r, t in enumerate(tokens) if r != row] == [t for r, t in enumerate(clean) if r != row]


def test_logprobs_are_of_the_raw_logits() -> None:
    sampler = make_sampler(20)
    admit(sampler, 0, SamplingParams(temperature=0), [2], 1, 0)
    admit(sampler, 1, SamplingParams(temperature=0, logprobs=2, logit_bias={9: 50.0}), [2], 1, 0)
    admit(sampler, 2, SamplingParams(temperature=0, logprobs=0), [2], 1, 0)
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    expected = logits.log_softmax(-1)
    result = sampler.sample(logits.clone(), [0, 1, 2], [1, 1, 1])
    assert result.token_ids[1] == 9
    assert result.logprobs is not None
    first, biased, bare = result.logprobs
    assert first is None and biased is not None and bare is not None
    top = expected[1].topk(2)
    assert biased.ids == [9, *top.indices.tolist()]
    assert biased.logprobs == pytest.approx([float(expected[1, 9]), *top.values.tolist()], abs=1e-5)
    assert biased.rank == int((expected[1] > expected[1, 9]).sum()) + 1
    assert bare.ids == [int(logits[2].argmax())] and bare.rank == 1 and len(bare.logprobs) == 1
    assert sampler.sample(logits[:1].clone(), [0], [1]).logprobs is None


def test_prompt_logprobs() -> None:
    sampler, logits = make_sampler(20), torch.randn(70, 20, generator=torch.Generator().manual_seed(0))
    logits[3, 5] = -math.inf
    targets = torch.arange(70) % 20
    targets[3] = 5
    found = sampler.prompt_logprobs(logits.to(torch.bfloat16), targets, 3)
    expected = logits.to(torch.bfloat16).float().log_softmax(-1)
    assert len(found) == 70
    for row, entry in enumerate(found):
        assert entry.ids[0] == targets[row] and len(entry.ids) == 4
        assert entry.logprobs[0] == pytest.approx(max(float(expected[row, targets[row]]), -9999.0), abs=1e-5)
        assert entry.logprobs[1:] == pytest.approx(expected[row].topk(3).values.tolist(), abs=1e-5)
    assert sampler.prompt_logprobs(logits[:0], targets[:0], 3) == []


def test_misuse_is_an_error() -> None:
    with pytest.raises(ValueError, match="float32"):
        make_sampler(20).sample(torch.zeros(2, 20), [0], [1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_draws_what_the_cpu_draws() -> None:
    vocab, count = 9001, 32
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(0)) * 3
    found = []
    for device in (CPU, torch.device("cuda")):
        buffer = torch.full((count, 8), 7, dtype=torch.int32, device=device)
        sampler = Sampler(
            vocab_size=vocab, max_slots=count, device=device, token_ids=buffer, eos_token_ids=EOS,
            grammar_compiler=None,
        )  # fmt: skip
        for slot in range(count):
            sampler.admit(AdmittedRequest(slot, "", [7, 7], 1, MIXED[slot % len(MIXED)], slot))
        result = sampler.sample(logits.to(device), list(range(count)), [2] * count)
        assert result.errors == {}
        found.append(result.host_token_ids())
    assert sum(a != b for a, b in zip(*found, strict=True)) <= 1  # exp differs by an ulp
