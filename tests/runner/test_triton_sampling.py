"""The sampler on Triton's kernels: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from skyline.engine.messages import AdmittedRequest
from skyline.engine.sampling_params import SamplingParams
from skyline.kernels import triton as provider
from skyline.runner.sampler import Sampler
from skyline.runner.sampling import choose
from tests.kernels.triton.test_ops import DEVICE
from tests.runner.test_sampler import CPU, EOS, MIXED

GREEDY = SamplingParams(temperature=0)
KINDS = [
    *MIXED,
    SamplingParams(temperature=0, frequency_penalty=1.5, logit_bias={7: 2.0}, logprobs=2),
    SamplingParams(temperature=0.8, presence_penalty=-1.0, repetition_penalty=0.8, min_tokens=3),
]


def make_sampler(vocab: int, kinds: list[SamplingParams], device: torch.device) -> Sampler:
    tokens = torch.randint(2, vocab, (len(kinds), 9), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    tokens[:, 3] = tokens[:, 8] = 7
    sampler = Sampler(
        vocab_size=vocab, max_slots=len(kinds), device=device, token_ids=tokens.to(device), eos_token_ids=EOS,
        grammar_compiler=None,
    )  # fmt: skip
    for slot, params in enumerate(kinds):
        sampler.admit(AdmittedRequest(slot, "", tokens[slot].tolist(), 1 + slot % 5, params, slot))
    return sampler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_batch_gives_what_torch_gives(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, rows = 3001, list(range(len(KINDS)))
    logits = torch.randn(len(KINDS), vocab, generator=torch.Generator().manual_seed(0)).mul_(3).to(dtype)
    logits[1, 5] = math.nan
    monkeypatch.setattr(choose, "is_native", lambda logits: False)
    expected = make_sampler(vocab, KINDS, CPU).sample(logits.clone(), rows, [9] * len(rows))
    monkeypatch.setattr(choose, "is_triton", lambda logits: True)
    sampler = make_sampler(vocab, KINDS, DEVICE)
    penalized = torch.tensor([rules is not None and rules.penalizes for rules in sampler._rules])
    for limit in (32, 1):
        monkeypatch.setattr("skyline.runner.sampler._PENALIZED_AT_ONCE", limit)
        found = sampler.sample(logits.clone().to(DEVICE), rows, [9] * len(rows))
        assert list(found.errors) == list(expected.errors) == [1]
        differ = torch.tensor(found.host_token_ids()) != torch.tensor(expected.host_token_ids())
        assert differ[1:].sum() <= 1  # exp differs in its last bit
        torch.testing.assert_close(found.host.wait()[1], expected.host.wait()[1], equal_nan=True)
        assert found.logprobs is not None and expected.logprobs is not None
        for one, other in zip(found.logprobs, expected.logprobs, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.ids == other.ids and one.rank == other.rank
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert penalized.sum() == 3 and sampler._counts is not None and not sampler._counts.any()


def test_kernels_that_do_not_compile_leave_it_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_large(*_: object) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    def counted(logits: Tensor, counts: Tensor, *_: object) -> None:
        counts.fill_(3)
        too_large()

    vocab, rows = 301, list(range(len(KINDS)))
    logits = torch.randn(len(KINDS), vocab, generator=torch.Generator().manual_seed(0)).mul_(3)
    monkeypatch.setattr(choose, "is_native", lambda logits: False)
    expected = make_sampler(vocab, KINDS, CPU).sample(logits.clone(), rows, [9] * len(rows))
    greedy = choose.greedy(logits)
    monkeypatch.setattr(choose, "is_triton", lambda logits: True)
    for name in ("sampling.choose_tokens", "sampling.greedy", "logits.token_statistics"):
        monkeypatch.setattr(f"skyline.kernels.triton.{name}", too_large)
    monkeypatch.setattr("skyline.kernels.triton.logits.penalize", counted)
    monkeypatch.setattr(provider, "FALLS_BACK", True)
    monkeypatch.setattr(provider, "_warned", set())
    sampler = make_sampler(vocab, KINDS, CPU)
    found = sampler.sample(logits.clone(), rows, [9] * len(rows))
    assert found.host_token_ids() == expected.host_token_ids() and found.logprobs == expected.logprobs
    assert all(map(torch.equal, choose.greedy(logits), greedy))
    assert sampler._counts is not None and not sampler._counts.any()
    assert len(caplog.records) == 4


def test_greedy_rows_from_what_was_computed_before() -> None:
    sampler = make_sampler(
        50, [GREEDY, SamplingParams(temperature=1.0), GREEDY, MIXED[-1], SamplingParams(top_k=1)], CPU
    )
    assert sampler.greedy_only([0, 2]) and sampler.greedy_only([])
    assert not any(sampler.greedy_only([0, slot]) for slot in (1, 3))
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    logits[1, 3] = math.nan
    tops, tokens = logits.max(-1)
    found, expected = sampler.sample_greedy(tokens, tops, [2, 0]), sampler.sample(logits, [2, 0], [9, 9])
    assert found.host_token_ids()[0] == expected.host_token_ids()[0] and found.token_ids is tokens
    assert list(found.errors) == list(expected.errors) == [0] and found.logprobs is None
