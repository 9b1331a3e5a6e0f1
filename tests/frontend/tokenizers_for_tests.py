"""Small tokenizers with the decoders that real models have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "the quick brown fox jumps over the lazy dog, and stops. STOP! </s> ## end\n\n",
    "naïve café, 你好世界, привет, 😀👩‍👩‍👧 mixed with numbers 12345 and code: def f(x): return x\n    pass",
] * 20
SPECIAL = ["<s>", "</s>", "<|im_end|>"]


class WithBackend:
    """What the detokenizer needs of `skyline.checkpoint.tokenizer.Tokenizer`."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def encode(self, text: str) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def ids(self, *tokens: str) -> list[int]:
        return [self.backend.token_to_id(token) for token in tokens]

    @property
    def size(self) -> int:
        return int(self.backend.get_vocab_size())


@cache
def byte_level() -> WithBackend:
    """As in Llama 3 and Qwen."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    # Added tokens are stored as text, not in the byte alphabet; "é" alone is ambiguous between the two.
    backend.add_tokens([AddedToken("<tool call>"), AddedToken("日本"), AddedToken("é")])
    return WithBackend(backend)


def _byte_fallback(decoder: Any) -> WithBackend:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoder
    tokens = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=tokens, show_progress=False)
    backend.train_from_iterator(["▁" + TEXTS[0].replace(" ", "▁"), "▁▁▁▁a ▁▁b"] * 10, trainer)
    # The trainer makes the byte tokens special, which they are not in a checkpoint.
    rebuilt = Tokenizer.from_str(_only_named_special(backend.to_str()))
    return WithBackend(rebuilt)


def _only_named_special(described: str) -> str:
    content = json.loads(described)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    return json.dumps(content)


@cache
def llama2() -> WithBackend:
    return _byte_fallback(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    )


@cache
def gemma() -> WithBackend:
    return _byte_fallback(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


@cache
def metaspace() -> WithBackend:
    return _byte_fallback(decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()]))


@cache
def word_piece() -> WithBackend:
    """A decoder that the look-up table cannot express."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=250, special_tokens=["[UNK]", *SPECIAL], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return WithBackend(backend)


def pushes(ids: Sequence[int], cuts: Sequence[int]) -> list[list[int]]:
    bounds = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [list(ids[a:b]) for a, b in pairwise(bounds)]
