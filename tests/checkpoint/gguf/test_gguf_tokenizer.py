"""Tokenizers made of metadata, against the tokenizer.json that the metadata come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from skyline.checkpoint import CheckpointError
from skyline.checkpoint.chat_template import load_chat_template
from skyline.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS
from skyline.checkpoint.gguf.reader import GGUFFile
from skyline.checkpoint.gguf.tokenizer import make_tokenizer, make_tokenizer_config, read_vocabulary
from skyline.checkpoint.tokenizer import Tokenizer
from tests.checkpoint.gguf.convert import add, add_tokenizer, finish
from tests.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS

TEXTS = [
    "Hello world, it's 2024! I'LL go; you've 1234567 of 3.14, HTTPServer camelCase don'T",
    "def f(x):\n    return {'a': [x, 1]}\n\n\n\tpass  # done   \n\r\n \n  x",
    "日本語のテキスト, 中文字符。 한국어 ひらがなカタカナ",
    "Grüße aus Köln, e\u0301 naïve ДОБРЫЙ день ΑΒΓ αβγ हिन्दी",
    "🙂🙃 👨\u200d👩\u200d👧 \u00a0x\u2028y ½ ² Ⅷ ٣٤٥",
    "   leading and trailing   ",
    "///path/to/file.txt ===>>> $x_y+=1; a/\n//b",
    "<|im_start|>user\nhi<|im_end|>\n<tool> x</tool>",
    "",
]

# As the models' own tokenizer.json files have them: written out here, independently of the table.
SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENDING = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
SPLITS = {
    "gpt-2": None,
    "llama-bpe": [
        SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + ENDING,
    ],
    "qwen2": [SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + ENDING],
    "gpt-4o": [
        f"{UPPER_LOWER}{SUFFIXES}?|{UPPER}{SUFFIXES}?" + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + ENDING,
    ],
    "tekken": [f"{UPPER_LOWER}|{UPPER}" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + ENDING],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
        + ENDING,
    ],
}
NFC = {"qwen2"}


def byte_level(folder: Path, pre: str) -> Backend:
    """Trains a tokenizer with the pre-tokenizer `pre` and writes what a checkpoint has of it."""
    tokenizer = Backend(models.BPE(ignore_merges=PRE_TOKENIZERS[pre].ignore_merges))
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in SPLITS[pre] or []]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=SPLITS[pre] is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizers.NFC() if pre in NFC else None
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def from_metadata(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    folder.mkdir()
    vocabulary = read_vocabulary(metadata, "m.gguf")
    (folder / "tokenizer.json").write_text(json.dumps(make_tokenizer(metadata, "m.gguf", vocabulary)))
    (folder / "tokenizer_config.json").write_text(json.dumps(make_tokenizer_config(metadata, "m.gguf", vocabulary)))
    return Tokenizer(folder)


def converted(folder: Path, pre: str, **keys: Any) -> Tokenizer:
    """The tokenizer in `folder`, by way of a GGUF file."""
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    add_tokenizer(writer, folder, 768, pre)
    for name, value in keys.items():
        add(writer, f"tokenizer.{name.replace('__', '.')}", value)
    writer.add_tensor("x", np.zeros(1, np.float32))
    finish(writer)
    return from_metadata(folder / "made", GGUFFile(folder / "m.gguf").metadata)


@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level_tokenizers(tmp_path: Path, pre: str) -> None:
    original = byte_level(tmp_path, pre)
    made = converted(tmp_path, pre)
    for text in TEXTS:
        ids = original.encode(text).ids
        assert made.encode(text, add_special_tokens=False) == ids
        for skip in (True, False):
            assert made.decode(ids, skip) == original.decode(ids, skip_special_tokens=skip)
    assert made.vocab_size == original.get_vocab_size()
    special = {i for i, token in original.get_added_tokens_decoder().items() if token.special}
    assert made.special_token_ids == special


def test_special_tokens_and_chat_template(tmp_path: Path) -> None:
    byte_level(tmp_path, "gpt-2")
    keys = {"chat_templates": ["tool_use"], "chat_template__tool_use": "TOOLS", "ggml__eot_token_id": 0}
    made = converted(tmp_path, "gpt-2", **keys)
    assert made.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert made.chat_templates == {"default": CHAT_TEMPLATE, "tool_use": "TOOLS"}
    template = load_chat_template(made)
    assert template is not None
    messages = [{"role": "user", "content": "hi"}]
    assert template.render(messages) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    assert read_vocabulary(metadata, "m.gguf").ends() == [2, 0]


@pytest.mark.parametrize(
    ("pre", "keys", "before", "after"),
    [
        ("gpt-2", {}, [], []),
        ("llama-bpe", {}, [1], []),
        ("llama-bpe", {"ggml__add_bos_token": False}, [], []),
        ("gpt-2", {"ggml__add_bos_token": True, "ggml__add_eos_token": True}, [1], [2]),
    ],
)
def test_what_stands_around_a_prompt(
    tmp_path: Path, pre: str, keys: dict[str, Any], before: list[int], after: list[int]
) -> None:
    byte_level(tmp_path, pre)
    made = converted(tmp_path, pre, ggml__bos_token_id=1, **keys)
    plain = made.encode("hi", add_special_tokens=False)
    assert made.encode("hi") == [*before, *plain, *after]


def test_the_end_of_a_message_is_not_the_end_of_an_answer() -> None:
    tokens = ["a", "<|return|>", "<|call|>", "<|end|>", "<|endoftext|>"]
    metadata: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens}
    metadata |= {"tokenizer.ggml.eos_token_id": 1}
    assert read_vocabulary(metadata, "m.gguf").ends() == [1, 2, 4]
    metadata["tokenizer.ggml.tokens"] = ["a", "b", "c", "<|end|>", "<|endoftext|>"]
    assert read_vocabulary(metadata, "m.gguf").ends() == [1, 3, 4]


PIECES = ["\u2581", "a", "b", "c", "\u2581a", "ab", "bc", "\u2581ab", "abc", "\u2581abc", "é", "\u2581\u2581", "<sep>"]


def sentencepiece(add_space: bool) -> tuple[Backend, dict[str, Any]]:
    """A tokenizer like Llama 2's, as the library makes one, and its metadata. Merges by hand, best token first."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(PIECES) - 1), 4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES))]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("\u2581", "a"), ("a", "b"), ("b", "c"), ("\u2581a", "b"), ("\u2581", "ab"), ("ab", "c"), ("a", "bc")]
    merges += [("\u2581ab", "c"), ("\u2581a", "bc"), ("\u2581", "abc"), ("\u2581", "\u2581")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prepend = [normalizers.Prepend("\u2581")] if add_space else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if add_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens([AddedToken("<sep>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
    }
    return backend, metadata if add_space else {**metadata, "tokenizer.ggml.add_space_prefix": False}


@pytest.mark.parametrize("add_space", [True, False])
def test_sentencepiece_tokenizers(tmp_path: Path, add_space: bool) -> None:
    original, metadata = sentencepiece(add_space)
    made = from_metadata(tmp_path / "made", metadata)
    for text in [*TEXTS, "abc ab", "  abc<sep>abc </s> x", "aabbcc é bcbc"]:
        ids = original.encode(text).ids
        assert made.encode(text) == ids and ids[0] == 1
        assert made.decode(ids) == original.decode(ids)
    assert made.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_a_vocabulary_that_would_take_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    _, metadata = sentencepiece(True)
    monkeypatch.setattr("skyline.checkpoint.gguf.tokenizer.MAX_PIECES", 20)
    with pytest.raises(CheckpointError, match="holds more than 20 characters"):
        make_tokenizer(metadata, "m.gguf", read_vocabulary(metadata, "m.gguf"))


def test_merges_are_in_the_order_of_transformers(tmp_path: Path) -> None:
    """Also where scores are equal, which SentencePiece's own models do not have."""
    from transformers.convert_slow_tokenizer import generate_merges

    tokens = ["<unk>", "<s>", "</s>", *PIECES[:-1]]
    scores = np.array([0, 0, 0, *(-(i // 3) for i in range(len(PIECES) - 1))], np.float32)
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores}
    metadata["tokenizer.ggml.token_type"] = np.array([2, 3, 3, *[1] * (len(PIECES) - 1)], np.int32)
    made = make_tokenizer(metadata, "m.gguf", read_vocabulary(metadata, "m.gguf"))
    vocab = {token: i for i, token in enumerate(tokens)}
    expected = generate_merges(vocab, {token: float(score) for token, score in zip(tokens, scores, strict=True)})
    assert [tuple(merge) for merge in made["model"]["merges"]] == expected
