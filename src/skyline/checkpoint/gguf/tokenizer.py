"""tokenizer.json and tokenizer_config.json out of the metadata of a GGUF file.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer. Two kinds of tokenizers: "gpt2", byte-level
BPE, and "llama", SentencePiece's BPE, whose merges follow from the scores of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skyline.checkpoint.fields import Fields
from skyline.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer

MAX_TOKENS = 1 << 21
MAX_PIECE = 512  # characters of a token of SentencePiece, whose own limit is 16 unless told otherwise
MAX_PIECES = 1 << 22  # characters of all of them together; Gemma's have less than half of that

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_PREFIX = "tokenizer.ggml."
_SPECIAL = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unknown": "unk", "padding": "pad"}
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}  # where the file does not say
_SPACE = "\u2581"  # SentencePiece's stand-in for a space

# Tokens that end an answer whatever the file says of them, as in llama.cpp.
_ENDS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<EOT>",
        "[EOT]",
        "[EOS]",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "[e~[",
    ]
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, without the unused ones at the end, which only fill up the embedding."""

    tokens: list[str]
    kinds: list[int]
    special_ids: dict[str, int]  # "bos_token" and so on

    def ends(self) -> list[int]:
        """The ids that end an answer, the one that the file names as eos first."""
        named = [self.special_ids[name] for name in ("eos_token", "eot_token", "eom_token") if name in self.special_ids]
        by_text = {text: number for number, text in enumerate(self.tokens) if text in _ENDS}
        if "<|return|>" in by_text and "<|call|>" in by_text:
            # There it ends a message, not the answer (https://cookbook.openai.com/articles/openai-harmony).
            by_text.pop("<|end|>", None)
        return list(dict.fromkeys([*named, *by_text.values()]))


def read_vocabulary(metadata: Mapping[str, Any], where: str) -> Vocabulary:
    """CheckpointError if there is none, or it is not well formed."""
    fields = Fields(metadata, where)
    tokens = _strings(fields, "tokens")
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise fields.error(_PREFIX + "tokens", f"holds {len(tokens)} tokens, not 1 to {MAX_TOKENS}")
    kinds = np.full(len(tokens), _NORMAL)
    if _PREFIX + "token_type" in fields:
        kinds = _numbers(fields, "token_type", len(tokens))
    used = np.flatnonzero(kinds != _UNUSED)
    count = int(used[-1]) + 1 if used.size else 0
    tokens = tokens[:count]
    if len(set(tokens)) != count:
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise fields.error(_PREFIX + "tokens", f"holds {twice!r} twice")
    special = {}
    defaults = _SENTENCEPIECE_IDS if fields.text(_PREFIX + "model") == "llama" else {}
    for key, name in _SPECIAL.items():
        number = fields.integer(f"{_PREFIX}{key}_token_id", 0, 2**32 - 1, defaults.get(key, count))
        # Files without such a token are known to say 2**32 - 1.
        if number < count:
            special[f"{name}_token"] = number
    return Vocabulary(tokens, kinds[:count].tolist(), special)


def make_tokenizer(metadata: Mapping[str, Any], where: str, vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json. CheckpointError for a tokenizer that is not supported, or if a key is missing or wrong."""
    fields = Fields(metadata, where)
    kind = fields.text(_PREFIX + "model")
    if kind == "gpt2":
        parts, add_bos = _byte_level(fields, vocabulary)
    elif kind == "llama":
        parts, add_bos = _sentencepiece(fields, vocabulary), True
    else:
        raise fields.error(_PREFIX + "model", f"{kind!r} is not supported; supported are gpt2 and llama")
    add_bos = fields.boolean(_PREFIX + "add_bos_token", add_bos)
    add_eos = fields.boolean(_PREFIX + "add_eos_token", False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        **parts,
        "post_processor": _template(vocabulary, add_bos, add_eos),
    }


def make_tokenizer_config(metadata: Mapping[str, Any], where: str, vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer_config.json: special tokens and chat templates."""
    fields = Fields(metadata, where)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: vocabulary.tokens[vocabulary.special_ids[name]] for name in names if name in vocabulary.special_ids},
    }
    template = fields.text("tokenizer.chat_template", "")
    others = metadata.get("tokenizer.chat_templates", [])
    if not isinstance(others, list):
        raise fields.error("tokenizer.chat_templates", "must be an array of names")
    named = {name: fields.text(f"tokenizer.chat_template.{name}") for name in others}
    if template and named:
        entries = {"default": template, **named}
        config["chat_template"] = [{"name": name, "template": text} for name, text in entries.items()]
    elif template:
        config["chat_template"] = template
    return config


def _byte_level(fields: Fields, vocabulary: Vocabulary) -> tuple[dict[str, Any], bool]:
    """The parts of tokenizer.json, and whether a text begins with bos."""
    name = fields.text(_PREFIX + "pre", "")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        said = f"{name!r} is not supported" if name else "is missing: the file is too old, convert the model again"
        raise fields.error(_PREFIX + "pre", f"{said}; supported are {', '.join(PRE_TOKENIZERS)}")
    merges = []
    for merge in _strings(fields, "merges"):
        space = merge.find(" ", 1)
        if space < 0:
            raise fields.error(_PREFIX + "merges", f"holds {merge[:40]!r}, which is not two parts")
        merges.append([merge[:space], merge[space + 1 :]])
    return {
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": _pre_tokenizer(pre),
        "decoder": _BYTE_LEVEL,
        "model": _bpe(vocabulary, merges, ignore_merges=pre.ignore_merges),
    }, pre.add_bos


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _pre_tokenizer(pre: PreTokenizer) -> dict[str, Any]:
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in pre.splits
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, _BYTE_LEVEL]}


def _bpe(vocabulary: Vocabulary, merges: Sequence[Sequence[str]], **settings: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        **settings,
        "vocab": {token: number for number, token in enumerate(vocabulary.tokens)},
        "merges": merges,
    }


def _sentencepiece(fields: Fields, vocabulary: Vocabulary) -> dict[str, Any]:
    """As transformers converts such a tokenizer: spaces become U+2581, unknown characters their bytes."""
    prefix = fields.boolean(_PREFIX + "add_space_prefix", True)
    scores = _numbers(fields, "scores", len(vocabulary.tokens))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = vocabulary.special_ids.get("unk_token")
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": _bpe(
            vocabulary,
            _merges(fields, vocabulary, scores),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=False,
        ),
    }


def _merges(fields: Fields, vocabulary: Vocabulary, scores: np.ndarray[Any, Any]) -> list[tuple[str, str]]:
    """Every way to make a token out of two, the best token first: SentencePiece merges what gives the best score.

    Ties are ordered as in transformers' generate_merges, because that is what tokenizer.json files hold.
    """
    numbers = {token: i for i, token in enumerate(vocabulary.tokens) if vocabulary.kinds[i] in (_NORMAL, _USER)}
    if sum(map(len, numbers)) > MAX_PIECES:
        raise fields.error(_PREFIX + "tokens", f"holds more than {MAX_PIECES} characters")
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, number in numbers.items():
        if len(token) > MAX_PIECE:
            raise fields.error(_PREFIX + "tokens", f"holds one of {len(token)} characters, above {MAX_PIECE}")
        ways = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in ways if left in numbers and right in numbers]
        known.sort(key=lambda way: (numbers[way[0]], numbers[way[1]]))
        ranked += [(float(scores[number]), len(left), len(right), left, right) for left, right in known]
    ranked.sort(key=lambda entry: entry[:3], reverse=True)
    return [(left, right) for *_, left, right in ranked]


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The tokens that are found in a text as they are, before it is split."""
    added = []
    for number, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        special = kind in (_UNKNOWN, _CONTROL) or text in _ENDS
        if text and (special or kind == _USER):
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
            added.append({"id": number, "content": text, **flags})
    return added


def _template(vocabulary: Vocabulary, add_bos: bool, add_eos: bool) -> dict[str, Any] | None:
    """What stands around a plain prompt."""
    before = [vocabulary.special_ids["bos_token"]] if add_bos and "bos_token" in vocabulary.special_ids else []
    after = [vocabulary.special_ids["eos_token"]] if add_eos and "eos_token" in vocabulary.special_ids else []
    if not before and not after:
        return None
    texts = {number: vocabulary.tokens[number] for number in (*before, *after)}

    def around(name: str, kind: int) -> list[dict[str, Any]]:
        tokens = [
            [{"SpecialToken": {"id": texts[number], "type_id": kind}} for number in part] for part in (before, after)
        ]
        return [*tokens[0], {"Sequence": {"id": name, "type_id": kind}}, *tokens[1]]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]} for number, text in texts.items()},
    }


def _strings(fields: Fields, name: str) -> list[str]:
    value = fields.values.get(_PREFIX + name)
    if not isinstance(value, list):
        raise fields.error(_PREFIX + name, "is missing or not an array of texts")
    return value


def _numbers(fields: Fields, name: str, count: int) -> np.ndarray[Any, Any]:
    """An array with a number for each token. Files may have more of them than tokens."""
    value = fields.values.get(_PREFIX + name)
    if not isinstance(value, np.ndarray) or len(value) < count:
        raise fields.error(_PREFIX + name, f"is missing or does not hold {count} numbers")
    return value[:count]
