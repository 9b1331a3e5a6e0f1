from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyline.frontend.detokenizer import IncrementalDetokenizer, StopStrings
from tests.frontend import tokenizers_for_tests as make
from tests.frontend.tokenizers_for_tests import pushes


def first_stop(chunks: Sequence[str], stops: Sequence[str], min_chunks: int) -> tuple[int, str] | None:
    """(begin, stop string): the naive search, over every end in turn."""
    text = "".join(chunks)
    unarmed = len("".join(chunks[: max(min_chunks - 1, 0)]))
    if len(chunks) < min_chunks:
        return None
    for end in range(1, len(text) + 1):
        if end <= unarmed:
            continue
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return end - len(stop), stop
    return None


@given(
    chunks=st.lists(st.text(alphabet="ab.", max_size=4), max_size=20),
    stops=st.lists(st.text(alphabet="ab.", min_size=1, max_size=5), min_size=1, max_size=4),
    min_chunks=st.integers(0, 5),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_equal_naive_search(chunks, stops, min_chunks):
    search = StopStrings(stops)
    text = "".join(chunks)
    released = ""
    for number, chunk in enumerate(chunks, 1):
        released += search.push(chunk, armed=number >= min_chunks)
        if search.found:
            break
        held = len("".join(chunks[:number])) - len(released)
        assert held < max(map(len, stops))
        tail = text[len(released) : len(released) + held]
        assert not tail or any(stop.startswith(tail) for stop in stops)
    released += search.flush()
    expected = first_stop(chunks, stops, min_chunks)
    if expected is None:
        assert search.found is None and released == text
    else:
        assert (len(released), search.found) == expected
        assert released == text[: expected[0]]


@given(data=st.data(), include=st.booleans(), min_tokens=st.integers(0, 6))
@settings(max_examples=100, deadline=None)
def test_stop_strings_in_any_pushes(data, include, min_tokens):
    tokenizer = data.draw(st.sampled_from([make.byte_level(), make.gemma()]))
    output = tokenizer.encode(data.draw(st.text(alphabet="the fox你.", min_size=1, max_size=40)))
    stops = data.draw(st.lists(st.text(alphabet="the fox你.", min_size=1, max_size=4), min_size=1, max_size=3))
    cuts = data.draw(st.lists(st.integers(0, 100), max_size=6))

    def run(parts: list[list[int]]) -> tuple[object, ...]:
        detokenizer = IncrementalDetokenizer(
            tokenizer, [], stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens
        )
        text = "".join(detokenizer.push(part) for part in parts) + detokenizer.finish()
        assert text == detokenizer.text
        assert len(detokenizer.token_offsets) == detokenizer.num_tokens
        return text, detokenizer.stop_reason, detokenizer.num_tokens

    text, reason, count = run(pushes(output, cuts))
    assert (text, reason, count) == run([[token] for token in output])
    plain = IncrementalDetokenizer(tokenizer, [])
    chunks = [plain.push([token]) for token in output] + [plain.finish()]
    expected = first_stop([chunk for chunk in chunks if chunk], stops, 0) if min_tokens <= 1 else None
    if min_tokens <= 1:
        assert reason == (expected[1] if expected else None)
        whole = "".join(chunks)
        end = len(whole) if expected is None else expected[0] + (len(expected[1]) if include else 0)
        assert text == whole[:end]
    elif reason is not None:
        assert count >= min_tokens


def test_stop_string_across_tokens_of_one_push():
    tokenizer = make.byte_level()
    ids = [token for letter in "the foxSTOPPED" for token in tokenizer.encode(letter)]
    detokenizer = IncrementalDetokenizer(tokenizer, [], stop=["STOP"])
    assert detokenizer.push(ids) == "the fox"
    assert (detokenizer.stop_reason, detokenizer.num_tokens) == ("STOP", 11)
    assert detokenizer.push(ids) == detokenizer.finish() == ""
    assert detokenizer.num_tokens == 11

    included = IncrementalDetokenizer(tokenizer, [], stop=["STOP"], include_stop_str_in_output=True)
    assert [included.push([token]) for token in ids][-7:] == ["", "", "", "STOP", "", "", ""]


def test_beginning_of_a_stop_string_is_released_at_the_end():
    tokenizer = make.byte_level()
    detokenizer = IncrementalDetokenizer(tokenizer, [], stop=["STOP"])
    assert detokenizer.push([token for letter in "aSTO" for token in tokenizer.encode(letter)]) == "a"
    assert detokenizer.finish() == "STO"
    assert detokenizer.stop_reason is None


def test_stop_string_that_the_end_of_the_text_completes():
    tokenizer = make.llama2()
    detokenizer = IncrementalDetokenizer(tokenizer, [], stop=["你"])
    assert detokenizer.push(tokenizer.ids("<0x41>", "<0xE4>", "<0xBD>", "<0xA0>")) == ""
    assert detokenizer.finish() == "A"
    assert detokenizer.stop_reason == "你"


def test_min_tokens_ignores_what_was_complete_before():
    tokenizer = make.byte_level()
    ids = [token for letter in "a.b.c." for token in tokenizer.encode(letter)]
    for min_tokens, text in ((0, "a"), (2, "a"), (3, "a.b"), (4, "a.b"), (5, "a.b.c"), (7, "a.b.c.")):
        detokenizer = IncrementalDetokenizer(tokenizer, [], stop=["."], min_tokens=min_tokens)
        assert detokenizer.push(ids) + detokenizer.finish() == text


def test_work_on_held_text_stays_linear(monkeypatch):
    """A hostile stop string of 1,024 letters against the same letters: places are given up once."""
    calls = 0

    class Counting(str):
        def startswith(self, *args: object) -> bool:
            nonlocal calls
            calls += 1
            return str.startswith(self, *args)  # type: ignore[arg-type]

    stop = "a" * 1023 + "b"
    search = StopStrings([stop])
    search._stops = [Counting(stop)]
    letters = ("a" * 1500 + "c") * 4
    for letter in letters:
        search.push(letter)
    assert calls <= 4 * len(letters)


def test_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
