from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyline.bench.load.prompts import PromptSource, TokenCounter
from skyline.bench.suite import SuiteError


@pytest.fixture(scope="module")
def counter() -> TokenCounter:
    return TokenCounter("demo")


@pytest.fixture(scope="module", params=[True, False], ids=["chat", "text"])
def source(counter: TokenCounter, request: pytest.FixtureRequest) -> tuple[PromptSource, bool]:
    return PromptSource.calibrate(counter, request.param, salt=99), request.param


@given(index=st.integers(0, 10**6), tokens=st.integers(20, 3000))
@settings(max_examples=60, deadline=None)
def test_inputs_have_exactly_the_asked_number_of_tokens(
    counter: TokenCounter, source: tuple[PromptSource, bool], index: int, tokens: int
) -> None:
    prompts, chat = source
    assert counter.prompts([prompts.content(index, tokens)], chat) == [tokens]


def test_no_two_prompts_begin_alike(counter: TokenCounter) -> None:
    prompts = PromptSource.calibrate(counter, True, salt=1)
    texts = [prompts.content(i, 64) for i in range(2000)]
    assert len({text[:40] for text in texts}) == 2000
    assert prompts.repeated == 0
    prompts.content(7, 80)
    assert prompts.repeated == 1, "a repetition is noticed"


def test_another_salt_is_another_text(counter: TokenCounter) -> None:
    one, two = (PromptSource.calibrate(counter, True, salt) for salt in (1, 2))
    assert one.content(0, 64) == PromptSource.calibrate(counter, True, 1).content(0, 64)
    assert one.content(0, 64)[:30] != two.content(0, 64)[:30]


def test_inputs_shorter_than_the_template_are_refused(counter: TokenCounter) -> None:
    with pytest.raises(SuiteError, match="chat template takes"):
        PromptSource.calibrate(counter, True, 1).content(0, 5)


def test_no_tokenizer() -> None:
    with pytest.raises(SuiteError, match="no tokenizer to make prompts with"):
        TokenCounter("/nowhere/at/all")
