from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from skyline.frontend.detokenizer import IncrementalDetokenizer
from skyline.frontend.token_text import MAX_RUN_BYTES, MAX_UNDECIDED_TOKENS
from tests.frontend import tokenizers_for_tests as make
from tests.frontend.tokenizers_for_tests import WithBackend, pushes

TABLE_TOKENIZERS = [make.byte_level, make.llama2, make.gemma, make.metaspace]
ALL_TOKENIZERS = [*TABLE_TOKENIZERS, make.word_piece]


def common_prefix(first: str, second: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def expected_text(tokenizer: WithBackend, prompt: Sequence[int], output: Sequence[int], skip: bool) -> str:
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    after = tokenizer.decode([*prompt, *output], skip_special_tokens=skip)
    return after[len(common_prefix(before, after)) :]


@st.composite
def token_lists(draw: st.DrawFn, tokenizer: WithBackend, max_size: int = 25) -> list[int]:
    """Random ids, many of them bytes, some outside the vocabulary; or text."""
    size = tokenizer.size
    some_id = st.integers(0, size + 5) | st.integers(0, min(size, 262))
    text = st.text(alphabet="aé你😀 \n", max_size=6).map(tokenizer.encode)
    parts = draw(st.lists(some_id.map(lambda token: [token]) | text, max_size=max_size))
    return [token for part in parts for token in part]


@pytest.mark.parametrize("make_tokenizer", TABLE_TOKENIZERS)
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=120, deadline=None)
def test_any_pushes_give_the_text_of_the_whole(make_tokenizer, data, skip):
    tokenizer = make_tokenizer()
    prompt = data.draw(token_lists(tokenizer, max_size=6))
    output = data.draw(token_lists(tokenizer))
    cuts = data.draw(st.lists(st.integers(0, 100), max_size=8))
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip)
    released = [detokenizer.push(part) for part in pushes(output, cuts)]
    released.append(detokenizer.finish())

    assert "".join(released) == expected_text(tokenizer, prompt, output, skip) == detokenizer.text
    assert detokenizer.num_tokens == len(output) == len(detokenizer.token_offsets)
    offsets = detokenizer.token_offsets
    assert offsets == sorted(offsets)
    assert all(0 <= offset <= len(detokenizer.text) for offset in offsets)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_other_decoders_through_the_window(data):
    tokenizer = make.word_piece()
    ids = st.lists(st.integers(0, tokenizer.size - 1), max_size=20)
    prompt, output = data.draw(ids), data.draw(ids)
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    released = "".join(detokenizer.push([token]) for token in output) + detokenizer.finish()
    assert released == expected_text(tokenizer, prompt, output, True)


def test_window_after_a_prompt_that_ends_in_many_special_tokens():
    tokenizer = make.word_piece()
    prompt = [*tokenizer.encode("the fox"), *tokenizer.ids("<s>") * 50]
    output = tokenizer.encode("stops")
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    assert detokenizer.push(output) + detokenizer.finish() == " stops"


@pytest.mark.parametrize("make_tokenizer", TABLE_TOKENIZERS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_offsets_are_where_the_token_begins(make_tokenizer, data):
    tokenizer = make_tokenizer()
    output = data.draw(token_lists(tokenizer, max_size=10))
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    detokenizer.push(output)
    detokenizer.finish()
    whole = detokenizer.text
    for index, offset in enumerate(detokenizer.token_offsets):
        before = tokenizer.decode(output[:index])
        # Not where a later byte changed what stood before, nor where the stripped space is all that did.
        if before and "\ufffd" not in before and whole.startswith(before):
            assert offset == len(before)


def test_tokens_of_one_character_share_its_offset():
    tokenizer = make.byte_level()
    bytes_of = tokenizer.ids("a", "ð", "Ł", "ĺ", "Ģ", "b")  # a, the four bytes of an emoji, b
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    assert [detokenizer.push([token]) for token in bytes_of] == ["a", "", "", "", "😀", "b"]
    assert detokenizer.token_offsets == [0, 1, 1, 1, 1, 2]

    run = make.llama2().ids("<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0x41>", "</s>")
    detokenizer = IncrementalDetokenizer(make.llama2(), [])
    assert detokenizer.push(run) + detokenizer.finish() == "😀A"
    assert detokenizer.token_offsets[:5] == [0, 0, 0, 0, 1]


def test_unfinished_character_becomes_a_replacement_character_at_the_end():
    for tokenizer, half in ((make.byte_level(), ["ð", "Ł"]), (make.llama2(), ["<0xF0>"])):
        detokenizer = IncrementalDetokenizer(tokenizer, tokenizer.encode("the"))
        assert detokenizer.push(tokenizer.ids(*half)) == ""
        assert detokenizer.finish() == "\ufffd"
        assert detokenizer.text == "\ufffd"


def test_leading_space_belongs_to_the_output_only_after_a_prompt():
    tokenizer = make.llama2()
    word = tokenizer.encode("the")
    assert IncrementalDetokenizer(tokenizer, []).push(word) == "the"
    assert IncrementalDetokenizer(tokenizer, tokenizer.ids("<s>")).push(word) == "the"
    assert IncrementalDetokenizer(tokenizer, tokenizer.encode("fox")).push(word) == " the"


@pytest.mark.parametrize("make_tokenizer", [make.byte_level, make.llama2, make.metaspace])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_invalid_bytes_never_hold_text_back_for_long(make_tokenizer, data):
    tokenizer = make_tokenizer()
    if make_tokenizer is make.byte_level:
        names, limit = list("ðŁĺĢä½"), 4
    else:
        names, limit = [f"<0x{byte:02X}>" for byte in (0xF0, 0x9F, 0x98, 0x80, 0xE4, 0xFF, 0x41)], MAX_RUN_BYTES + 4
    ids = data.draw(st.lists(st.sampled_from(tokenizer.ids(*names)), min_size=limit + 5, max_size=200))
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    silent = 0
    for token in ids:
        silent = 0 if detokenizer.push([token]) else silent + 1
        assert silent < limit


def test_valid_run_of_byte_tokens_is_released_in_lumps():
    """Where it goes beyond MAX_RUN_BYTES, a later invalid byte no longer turns the released part into U+FFFD."""
    tokenizer = make.llama2()
    letters = tokenizer.ids("<0x41>") * (MAX_RUN_BYTES + 3)
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    assert detokenizer.push(letters) == "A" * MAX_RUN_BYTES
    assert detokenizer.push(tokenizer.ids("<0xFF>")) == "\ufffd" * 4


def test_window_does_not_wait_for_ever():
    tokenizer = make.byte_level()
    tokenizer = WithBackend(type(tokenizer.backend).from_str(tokenizer.backend.to_str()))
    tokenizer.backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("~", 0, 1)])
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    released = [detokenizer.push(tokenizer.ids("ð")) for _ in range(4 * MAX_UNDECIDED_TOKENS)]
    assert "".join(released).count("\ufffd") >= 3 * MAX_UNDECIDED_TOKENS
    assert detokenizer.push(tokenizer.encode("a fox")).endswith("a fox")


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_streams_of_one_tokenizer_do_not_meet(data):
    tokenizer = make.byte_level()
    outputs = [data.draw(token_lists(tokenizer)) for _ in range(3)]
    assume(any(outputs))
    streams = [IncrementalDetokenizer(tokenizer, []) for _ in outputs]
    for step in range(max(map(len, outputs))):
        for stream, output in zip(streams, outputs, strict=True):
            stream.push(output[step : step + 1])
    for stream, output in zip(streams, outputs, strict=True):
        stream.finish()
        assert stream.text == tokenizer.decode(output)
