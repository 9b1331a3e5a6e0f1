"""The compiled choice of tokens: each instruction set against torch's, and independence of batch and threads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from skyline.engine.messages import AdmittedRequest
from skyline.engine.sampling_params import SamplingParams
from skyline.kernels.cpu import native, sampling
from skyline.runner.sampler import Sampler
from skyline.runner.sampling import choose

pytestmark = pytest.mark.skipif(native.available() == "none", reason="no compiled kernels here")

LARGE = 151936
VOCABS = [1, 2, 15, 64, 257, 4097, 9001, LARGE]
_every_vocab = pytest.mark.parametrize("vocab", VOCABS)

# temperature, top_k (0: off), top_p, min_p
MIX = [
    (0.8, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.05),
    (0.8, 20, 0.95, 0.0),
    (1.3, 1, 1.0, 0.0),
    (1.0, 1000, 0.99, 0.001),
    (2.0, 5000, 0.9, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (5.0, 0, 0.99, 0.0),
    (1e-3, 40, 0.5, 0.0),
    (1e4, 0, 1.0, 0.0),
    (1e4, 0, 0.5, 0.0),
    (0.7, 50, 1.0, 0.3),
]


def make_logits(rows: int, vocab: int, seed: int = 0) -> Tensor:
    """Rows of several kinds: wide, flat, with ties, partly excluded, all but one excluded, constant."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    logits[1::7] *= 0.03
    logits[2::7] = logits[2::7].round()
    logits[3::7, ::2] = -math.inf
    logits[3::7, vocab // 2] = 1.0
    logits[4::7] = -math.inf
    logits[4::7, vocab // 3] = -2.5
    logits[5::7] = -0.0
    logits[5::7, : vocab // 2] = 0.0
    return logits


def make_numbers(rows: int, vocab: int, shift: int = 0) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    numbers = np.empty((5, rows))
    for row in range(rows):
        temperature, top_k, top_p, min_p = MIX[(row + shift) % len(MIX)]
        k = top_k if 0 < top_k < vocab else vocab
        numbers[:, row] = (temperature, k, top_p, min_p, 0.0)
    numbers[4] = np.random.default_rng(shift).random(rows)
    return numbers


def acceptable(logits: Tensor, numbers: np.ndarray[tuple[int], np.dtype[np.float64]], token: int) -> bool:
    """Whether the definition in float64 gives this token for u and top_p, or for ones that differ by rounding."""
    temperature, top_k, top_p, min_p, u = numbers
    scaled = (logits / torch.tensor(temperature, dtype=torch.float32)).numpy()
    weights = np.exp((scaled - scaled.max()).astype(np.float64))
    weights = np.floor(np.where(weights < np.float32(min_p), 0.0, weights) * choose.weight_scale(len(weights)))
    if weights[token] == 0:
        return False
    order = np.arange(len(weights))
    if top_k < len(weights) or top_p < 1:
        order = np.argsort(-(scaled + np.float32(0)), kind="stable")[: int(top_k)]
    ends = np.cumsum(weights[order])
    place = np.flatnonzero(order == token)
    for inexact in (1 - 1e-7, 1.0, 1 + 1e-7):
        kept = max(1, int((ends - weights[order] < ends[-1] * top_p * inexact).sum())) if top_p < 1 else len(order)
        if place.size and place[0] < kept:
            start, end = (ends[place[0]] - weights[token]) / ends[kept - 1], ends[place[0]] / ends[kept - 1]
            if start - 2e-6 <= u <= end + 2e-6:
                return True
    return False


def in_torch(logits: Tensor, numbers: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[int, float]:
    """torch's choice for one row."""
    x, vocab = logits.float().clone()[None], len(logits)
    column = torch.from_numpy(numbers.copy())[:, None, None]
    temperature, top_k, top_p, min_p, u = column[0].float(), column[1].long(), column[2], column[3].float(), column[4]
    if int(top_k) < vocab:
        if int(top_k) <= choose.MAX_TOP_K:
            tokens, tops = choose.draw_top_k(x, temperature, top_k, int(top_k), top_p, min_p, u)
        else:
            tokens, tops = choose.draw_sorted(x, temperature, top_k, top_p, min_p, u)
    elif float(top_p) < 1:
        tokens, tops = choose.draw_top_p(x, temperature, top_p, min_p, u)
    else:
        tokens, tops = choose.draw_unsorted(x, temperature, min_p, u)
    return int(tokens), float(tops)


@_every_vocab
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_greedy_equals_torch(instruction_set: str, vocab: int, dtype: torch.dtype, rows: int) -> None:
    logits = make_logits(rows, vocab).to(dtype)
    before = logits.clone()
    tokens, tops = sampling.choose_tokens(logits, None)
    values, _ = logits.max(dim=-1)
    # torch.max promises no particular one of equal values.
    first = torch.tensor([int((row == value).nonzero()[0]) for row, value in zip(logits, values, strict=True)])
    assert torch.equal(tokens, first.long()) and torch.equal(tops, values.float())
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 17, 4096, 8999])
def test_a_row_that_is_not_finite_reports_it_alone(
    instruction_set: str, dtype: torch.dtype, bad: float, place: int
) -> None:
    vocab, count = 9001, len(MIX)
    logits, numbers = make_logits(count, vocab).to(dtype), make_numbers(count, vocab)
    clean, _ = choose.choose_native(logits, numbers)
    for row in range(count):
        broken = logits.clone()
        broken[row, place] = bad
        for given in (numbers, None):
            tokens, tops = sampling.choose_tokens(broken, None if given is None else torch.from_numpy(given))
            expected = torch.ones(count, dtype=torch.bool)
            expected[row] = False
            assert torch.equal(tops.isfinite(), expected) and (tokens >= 0).all() and (tokens < vocab).all()
            assert math.isnan(float(tops[row])) == math.isnan(bad)
        tokens, _ = choose.choose_native(broken, numbers)
        assert torch.equal(tokens[expected], clean[expected])
    broken[:] = -math.inf
    assert (choose.choose_native(broken, numbers)[1] == -math.inf).all()


@_every_vocab
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_equal_torch(instruction_set: str, vocab: int, dtype: torch.dtype) -> None:
    count = 2 * len(MIX) if vocab == LARGE else 7 * len(MIX)
    logits, numbers = make_logits(count, vocab).to(dtype), make_numbers(count, vocab)
    tokens, tops = choose.choose_native(logits, numbers)
    differ = 0
    for row in range(count):
        token, top = in_torch(logits[row], numbers[:, row])
        assert float(tops[row]) == top
        differ += int(tokens[row]) != token
        assert acceptable(logits[row].float(), numbers[:, row], int(tokens[row])), (row, numbers[:, row])
    assert differ <= count // 25  # exp differs in its last bit


@pytest.mark.parametrize("vocab", [65, 4097, 9001])
@pytest.mark.parametrize("parameters", MIX)
def test_equal_weights_give_equal_tokens(
    instruction_set: str, vocab: int, parameters: tuple[float, int, float, float]
) -> None:
    """Every weight is 1, so the two agree to the bit, also at the ends of u and in the order among equals."""
    temperature, top_k, top_p, min_p = parameters
    us = [0.0, 1 - 2.0**-53, *np.random.default_rng(1).random(30)]
    logits = torch.full((len(us), vocab), -math.inf)
    logits[:, 3::3] = 7.0
    k = top_k if 0 < top_k < vocab else vocab
    numbers = np.array([[temperature, k, top_p, min_p, u] for u in us]).T.copy()
    tokens, _ = choose.choose_native(logits, numbers)
    assert tokens.tolist() == [in_torch(logits[row], numbers[:, row])[0] for row in range(len(us))]


def test_distribution_is_the_softmax(instruction_set: str) -> None:
    """u on an even grid: each token comes as often as its probability says, to within one."""
    count, vocab = 5000, 300
    logits = make_logits(1, vocab)
    expected = torch.softmax(logits[0].double() / 0.9, 0).numpy() * count
    numbers = np.repeat(np.array([[0.9], [vocab], [1.0], [0.0], [0.0]]), count, axis=1)
    numbers[4] = (np.arange(count) + 0.5) / count
    for top_p in (1.0, 1 - 2.0**-53):  # in the order of ids, and by falling probability
        numbers[2] = top_p
        tokens, _ = choose.choose_native(logits.expand(count, vocab).contiguous(), numbers)
        assert np.abs(np.bincount(tokens.numpy(), minlength=vocab) - expected).max() <= 1.001


@pytest.mark.parametrize("vocab", [257, 9001, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_depend_on_neither_batch_nor_threads(instruction_set: str, vocab: int, dtype: torch.dtype) -> None:
    count = 33
    wide = torch.zeros(count, vocab + 5, dtype=dtype)
    wide[:, :vocab] = make_logits(count, vocab)
    wide[:, vocab:] = math.nan
    logits, numbers = wide[:, :vocab], make_numbers(count, vocab)
    expected = [
        sampling.choose_tokens(logits[r : r + 1], torch.from_numpy(numbers[:, r : r + 1].copy())) for r in range(count)
    ]
    tokens, tops = torch.cat([one[0] for one in expected]), torch.cat([one[1] for one in expected])
    order = np.random.default_rng(0).permutation(count)
    try:
        for threads in (1, 2, 3):
            native.start_threads(threads)
            for rows in (np.arange(count), order, order[:5], order[:1]):
                found = choose.choose_native(logits[rows], numbers[:, rows].copy())
                assert torch.equal(found[0], tokens[rows]) and torch.equal(found[1], tops[rows])
            assert torch.equal(choose.choose_native(logits, numbers)[0], tokens)  # strided
    finally:
        native.stop_threads()


def test_widen(instruction_set: str) -> None:
    x = make_logits(7, 4111).to(torch.bfloat16)
    for part in (x, x[:, 3:1001], x[:0], x[:1, :1]):
        out = torch.empty(part.shape)
        sampling.widen(out, part)
        assert torch.equal(out, part.float())


def test_misuse_is_an_error() -> None:
    logits = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="5 numbers"):
        sampling.choose_tokens(logits, torch.zeros(4, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        sampling.choose_tokens(logits.half(), None)
    with pytest.raises(ValueError, match="vocabulary"):
        sampling.choose_tokens(logits[:, :0], None)
    with pytest.raises(ValueError, match="shapes"):
        sampling.widen(torch.empty(2, 7), logits.bfloat16())


REQUESTS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7),
    SamplingParams(top_k=20, top_p=0.95),
    SamplingParams(top_p=0.9, min_p=0.01),
    SamplingParams(temperature=1.5, top_k=2000),
    SamplingParams(temperature=0, logit_bias={3: 40.0}),
    SamplingParams(temperature=0, logprobs=2),
]


@pytest.mark.parametrize("kinds", [REQUESTS[:1], REQUESTS[:5], REQUESTS])
def test_the_sampler_takes_bfloat16_and_chooses_as_without_the_kernels(
    kinds: list[SamplingParams], monkeypatch: pytest.MonkeyPatch
) -> None:
    count, vocab = 21, 9001
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(5)).mul_(4).to(torch.bfloat16)
    found = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(choose, "is_native", lambda logits: False)
        for x in (logits, logits.float()):
            sampler = Sampler(
                vocab_size=vocab, max_slots=count, device=torch.device("cpu"), eos_token_ids=[0], grammar_compiler=None,
                token_ids=torch.zeros((count, 8), dtype=torch.int32),
            )  # fmt: skip
            for slot in range(count):
                sampler.admit(AdmittedRequest(slot, "", [2], 1, kinds[slot % len(kinds)], slot))
            for rows in (1, count, 8):  # memory for converted logits is used again
                result = sampler.sample(x[:rows].clone(), list(range(rows)), [1] * rows)
                assert result.errors == {}
                found.append((rows, result.host_token_ids(), result.logprobs))
    for rows, tokens, logprobs in found:
        expected = next(one for one in found if one[0] == rows)
        assert tokens == expected[1] and logprobs == expected[2]
