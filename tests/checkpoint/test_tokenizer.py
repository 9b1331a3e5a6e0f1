"""Tokenizers trained here in the styles of GPT-2/Qwen, Llama 3 and Mistral: equal to transformers', and byte-exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from skyline.checkpoint import CheckpointError, Tokenizer
from skyline.checkpoint.chat_template import load_chat_template

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "def f(x):\n    return x + 1\n",
    "Übergröße naïve 数字 42",
]
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def save(backend: Any, folder: Path, **special: Any) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def qwen_style(folder: Path) -> Path:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens(["<think>", "</think>"])
    return save(backend, folder, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE)


def llama3_style(folder: Path) -> Path:
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    bos = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(f"{bos[0]} $A", f"{bos[0]} $A {bos[0]} $B", [bos]),
        ]
    )
    return save(backend, folder, bos_token=bos[0], eos_token="<|eot_id|>")


def mistral_style(folder: Path) -> Path:
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    backend = tokenizers.Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(special[:3])
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return save(backend, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram_style(folder: Path) -> Path:
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=420, special_tokens=special, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    vocabulary = [tuple(entry) for entry in json.loads(trained.to_str())["model"]["vocab"]]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens(special[:3])
    return save(backend, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


STYLES = {"qwen": qwen_style, "llama3": llama3_style, "mistral": mistral_style, "unigram": unigram_style}
Pair = tuple[Tokenizer, Any]


@pytest.fixture(scope="module", params=STYLES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Our tokenizer and transformers' of the same folder."""
    folder = STYLES[request.param](tmp_path_factory.mktemp(request.param))
    return Tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)


TEXTS = [
    "",
    " ",
    "The quick brown fox",
    "  leading and   inner spaces \n\n\ttabs",
    "Ünïcødé 数字 🎉👩‍👩‍👧 ﬁ e\u0301",
    "<|im_start|>user\nHi<|im_end|> </s><s> <|eot_id|> <think>x</think>",
    "\x00\x01\x7f\u200b\ufffd",
]


def check_equal(pair: Pair, text: str) -> None:
    ours, theirs = pair
    for special in (True, False):
        ids = ours.encode(text, add_special_tokens=special)
        assert ids == theirs.encode(text, add_special_tokens=special)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", TEXTS)
def test_equal_to_transformers(pair: Pair, text: str) -> None:
    check_equal(pair, text)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_any_text_equal_to_transformers(pair: Pair, text: str) -> None:
    check_equal(pair, text)


def test_batch_equals_single(pair: Pair) -> None:
    assert pair[0].encode_batch(TEXTS) == [pair[0].encode(text) for text in TEXTS]
    assert pair[0].encode_batch([]) == []


def test_vocabulary_and_special_tokens_equal_to_transformers(pair: Pair) -> None:
    ours, theirs = pair
    assert ours.vocab_size == len(theirs)
    assert ours.special_token_ids == frozenset(theirs.all_special_ids) | {
        i for i, token in theirs.added_tokens_decoder.items() if token.special
    }
    assert ours.special_tokens == {k: v for k, v in theirs.special_tokens_map.items() if isinstance(v, str)}
    assert (ours.eos_token, ours.eos_token_id) == (theirs.eos_token, theirs.eos_token_id)
    assert (ours.bos_token, ours.bos_token_id) == (theirs.bos_token, theirs.bos_token_id)


@pytest.mark.parametrize("text", ["The quick", "naïve 数字 🎉", "a\n  b <|im_end|>"])
def test_token_bytes_join_to_the_text(pair: Pair, text: str) -> None:
    ours, _ = pair
    joined = b"".join(map(ours.token_bytes, ours.encode(text, add_special_tokens=False)))
    # SentencePiece-style tokenizers put a space before the first word.
    assert joined.decode().removeprefix(" ") == text


def test_token_bytes_edges(pair: Pair) -> None:
    ours, _ = pair
    for outside in (ours.vocab_size, 10**6):
        assert ours.token_bytes(outside) == b"" and ours.token_text(outside) == ""
    assert ours.eos_token_id is not None and ours.token_bytes(ours.eos_token_id).decode() == ours.eos_token
    first = ours.token_bytes(ours.encode("🎉", add_special_tokens=False)[-1])
    assert first == b"\x89" and ours.token_text(ours.encode("🎉")[-1]) == "\ufffd"


def test_lone_surrogates_do_not_raise(pair: Pair) -> None:
    assert pair[0].encode("a\ud800b") == pair[0].encode("a\ufffdb") == pair[0].encode_batch(["a\udfffb"])[0]


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, **changes}))


def test_truncation_and_padding_are_off(tmp_path: Path) -> None:
    qwen_style(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert 2 < len(tokenizer.encode("The quick brown fox jumps")) < 64
    assert json.loads(tokenizer.json)["truncation"]["max_length"] == 2, "json is the file as it is"


def test_named_token_that_is_not_marked_special(tmp_path: Path) -> None:
    qwen_style(tmp_path)
    token = {"__type": "AddedToken", "content": "<think>"}
    edit(tmp_path / "tokenizer_config.json", eos_token=token, bos_token="<not in the vocabulary>")
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_token == "<think>" and tokenizer.eos_token_id in tokenizer.special_token_ids
    assert tokenizer.bos_token is None and tokenizer.bos_token_id is None
    assert tokenizer.decode(tokenizer.encode("a<think>b")) == "ab"


def test_special_tokens_map(tmp_path: Path) -> None:
    qwen_style(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer(tmp_path).eos_token is None
    edit(
        tmp_path / "special_tokens_map.json", eos_token={"content": "<|im_end|>"}, additional_special_tokens=["<think>"]
    )
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.token_id("<think>") in tokenizer.special_token_ids


def test_chat_template_places(tmp_path: Path) -> None:
    qwen_style(tmp_path)
    jinja = tmp_path / "chat_template.jinja"
    assert jinja.read_text() == TEMPLATE, "transformers 5 writes it there"
    template = load_chat_template(Tokenizer(tmp_path))
    assert template is not None and template.render([{"role": "user", "content": "x"}]) == "x<|im_end|>"
    jinja.unlink()
    assert load_chat_template(Tokenizer(tmp_path)) is None and Tokenizer(tmp_path).chat_template is None

    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    edit(tmp_path / "tokenizer_config.json", chat_template=named)
    template = load_chat_template(Tokenizer(tmp_path))
    assert template is not None and (template.render([]), template.render([], tools=[{}])) == ("d", "t")
    edit(tmp_path / "tokenizer_config.json", chat_template="in config")
    assert Tokenizer(tmp_path).chat_template == "in config"
    edit(tmp_path / "chat_template.json", chat_template="in json")
    assert Tokenizer(tmp_path).chat_template == "in json"

    for broken, message in ((3, "must be a string"), ([{"name": "x"}], "template is missing"), ("{% if", "compile")):
        edit(tmp_path / "chat_template.json", chat_template=broken)
        with pytest.raises(CheckpointError, match=message):
            load_chat_template(Tokenizer(tmp_path))
    jinja.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        Tokenizer(tmp_path)


def test_unreadable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tokenizer.json; write one"):
        Tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    for content in (b"", b"{}", b'{"model": 3}', b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a valid tokenizer"):
            Tokenizer(tmp_path)
    path.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        Tokenizer(tmp_path)
    qwen_style(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        Tokenizer(tmp_path)
