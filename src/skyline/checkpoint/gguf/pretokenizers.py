"""How the byte-level tokenizers cut text into words before merging: by the name in `tokenizer.ggml.pre`.

The names are those of llama.cpp's convert_hf_to_gguf.py; the regular expressions those of the models' tokenizer.json.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """splits: one after the other, each cuts the pieces of the one before.

    ignore_merges: a whole word that is in the vocabulary is a token, even if no merges lead there.
    add_bos: whether a text begins with the bos token where the file does not say.
    nfc: whether text is normalized to NFC first.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# After cl100k_base of tiktoken, which takes up to three digits together; Qwen takes one.
_CL100K = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = _CL100K.replace("{1,3}", "")
# After o200k_base of tiktoken: a word is capital letters, then small ones; one of the two may be missing.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE, _AFTER = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_O200K = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_SUFFIXES}?|{_BEFORE}{_UPPER}+{_LOWER}*{_SUFFIXES}?"
    rf"|\p{{N}}{{1,3}}|{_AFTER}|{_SPACES}"
)
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_AFTER}|{_SPACES}"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")

_LLAMA3 = PreTokenizer((_CL100K,), ignore_merges=True, add_bos=True)
_QWEN = PreTokenizer((_QWEN2,), nfc=True)
_GPT_4O = PreTokenizer((_O200K,))
_DIGITS = PreTokenizer((r"\p{N}", _GPT2))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": PreTokenizer((_CL100K,)),
    "dbrx": PreTokenizer((_CL100K,)),
    "chatglm-bpe": PreTokenizer((_CL100K,)),
    "glm4": PreTokenizer((_CL100K,), ignore_merges=True),
    "glm5": PreTokenizer((_CL100K,), ignore_merges=True),
    "qwen2": _QWEN,
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,)),
    "gpt-4o": _GPT_4O,
    "llama4": _GPT_4O,
    "minimax-m2": _GPT_4O,
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "deepseek-v3": PreTokenizer(_DEEPSEEK_V3),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
    "gpt-2": PreTokenizer((_GPT2,)),
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "smollm": _DIGITS,
    "command-r": PreTokenizer(_DIGITS.splits, nfc=True),
}
