"""Texts of exact numbers of tokens that no prefix cache has seen.

A prompt is a short lead and then words that are each one token of the served tokenizer wherever they stand, so n more
words are n more tokens. Words are drawn at random, seeded by a salt of the run and the request's number: two prompts
agree in their first words only by an accident that `PromptSource.repeated` would find.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from skyline.bench.suite import SuiteError

LEAD = "Words:"
MAX_WORDS = 4096
MIN_WORDS = 32
# So many words at the start must differ between any two prompts: below the blocks in which engines cache prefixes.
DISTINCT_WORDS = 6

_WORD = re.compile(r"^[Ġ▁]([a-z]{2,12})$")


class TokenCounter:
    """Counts tokens as the server will: with the model's own tokenizer and chat template.

    `tokenizer` is a folder, a name on the hub, or "demo". Raises SuiteError if there is none.
    """

    def __init__(self, tokenizer: str) -> None:
        from skyline.checkpoint import CheckpointError
        from skyline.checkpoint.chat_template import load_chat_template
        from skyline.checkpoint.hub import resolve
        from skyline.checkpoint.tokenizer import Tokenizer

        if tokenizer == "demo":
            from skyline.demo import DEMO_PATH

            tokenizer = str(DEMO_PATH)
        try:
            self._tokenizer = Tokenizer(resolve(tokenizer, weights=False))
            self._template = load_chat_template(self._tokenizer)
        except CheckpointError as error:
            why = f"no tokenizer to make prompts with: {error}. Name one with the model's `tokenizer`"
            raise SuiteError(why) from None

    def text(self, text: str) -> int:
        """Tokens of generated text."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def prompts(self, contents: Sequence[str], chat: bool) -> list[int]:
        """Input tokens of requests with these contents: one user message, or the prompt of a completion."""
        if chat:
            contents = [self._render([{"role": "user", "content": content}]) for content in contents]
        return [len(ids) for ids in self._tokenizer.encode_batch(contents, add_special_tokens=not chat)]

    def opening(self, messages: list[dict[str, str]]) -> int:
        """How many input tokens these messages add in front of a user's."""
        user = [{"role": "user", "content": LEAD}]
        texts = [self._render(messages + user), self._render(user)]
        whole, alone = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return len(whole) - len(alone)

    def _render(self, messages: list[dict[str, str]]) -> str:
        if self._template is None:
            raise SuiteError("the tokenizer has no chat template: say `chat: false` in the scenario")
        return self._template.render(messages)

    def words(self) -> list[str]:
        """Words that are one token each after a space, in a fixed random order, at most MAX_WORDS."""
        vocabulary = self._tokenizer.backend.get_vocab(with_added_tokens=False)
        found = sorted(match.group(1) for token in vocabulary if (match := _WORD.match(token)))
        np.random.default_rng(0).shuffle(found)
        found = found[: 2 * MAX_WORDS]
        counts = self._tokenizer.encode_batch([f"{LEAD} {word} {word}" for word in found], add_special_tokens=False)
        base = self.text(LEAD)
        kept = [word for word, ids in zip(found, counts, strict=True) if len(ids) == base + 2][:MAX_WORDS]
        if len(kept) < MIN_WORDS:
            raise SuiteError(f"the tokenizer has only {len(kept)} words of one token, too few to make prompts of")
        return kept


@dataclass
class PromptSource:
    """Makes the contents of prompts. `overhead` is the number of tokens that are not words: lead and chat template."""

    words: list[str]
    overhead: int
    salt: int
    _heads: set[bytes] = field(default_factory=set)
    repeated: int = 0

    @classmethod
    def calibrate(cls, counter: TokenCounter, chat: bool, salt: int) -> PromptSource:
        """Measures the overhead and proves on samples that n more words are n more tokens. Raises SuiteError if not."""
        words = counter.words()
        probe = cls(words, 0, salt=12345)
        sizes = [1, 2, 3, 17, 64, 257, 1024]
        contents = [probe._text(index, size) for index, size in enumerate(sizes)]
        overheads = {count - size for count, size in zip(counter.prompts(contents, chat), sizes, strict=True)}
        if len(overheads) != 1:
            raise SuiteError("prompts of exact length cannot be made: this tokenizer does not keep to words")
        return cls(words, overheads.pop(), salt)

    def content(self, index: int, tokens: int) -> str:
        """The content of request number `index` whose whole input has `tokens` tokens. Raises SuiteError if those are
        too few."""
        count = tokens - self.overhead
        if count < 1:
            raise SuiteError(
                f"an input of {tokens} tokens is not longer than what the chat template takes ({self.overhead}): "
                "ask for more, or say `chat: false`"
            )
        text = self._text(index, count)
        if count > DISTINCT_WORDS:
            head = " ".join(text.split(" ", DISTINCT_WORDS + 1)[: DISTINCT_WORDS + 1]).encode()
            if head in self._heads:
                self.repeated += 1
            self._heads.add(head)
        return text

    def _text(self, index: int, count: int) -> str:
        picks = np.random.default_rng((self.salt, index)).integers(0, len(self.words), count)
        words = self.words
        return " ".join([LEAD, *[words[pick] for pick in picks.tolist()]])
