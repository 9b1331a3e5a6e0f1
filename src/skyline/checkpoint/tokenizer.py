"""tokenizer.json and the files beside it.

Formats: https://huggingface.co/docs/tokenizers (tokenizer.json), and transformers' tokenizer_config.json,
special_tokens_map.json, chat_template.jinja and chat_template.json. tokenizer.json decides how text is split; the
others only name special tokens and hold the chat template.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

# Set before the library is loaded: its thread pool does not survive a fork, and requests already arrive in parallel.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers

from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.fields import Fields, read_bytes, read_json_object

MAX_TOKENIZER_BYTES = 256 * 1024 * 1024
MAX_TEMPLATE_BYTES = 1024 * 1024
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

_SURROGATES = re.compile("[\ud800-\udfff]")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Text to token ids and back, for one checkpoint folder. Safe to use from several threads.

    Raises CheckpointError if tokenizer.json is missing, above 256 MiB or invalid. Truncation and padding that
    tokenizer.json asks for are switched off.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tokenizer.json"
        if not self.path.is_file():
            raise CheckpointError(
                f"{folder} holds no tokenizer.json; write one with transformers "
                "(AutoTokenizer.from_pretrained, then save_pretrained) and put it there"
            )
        try:
            self.backend = tokenizers.Tokenizer.from_str(self.json)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{self.path} is not a valid tokenizer: {error}") from error
        self.backend.no_truncation()
        self.backend.no_padding()

        settings = _optional_json(folder / "tokenizer_config.json")
        names = {**_optional_json(folder / "special_tokens_map.json"), **settings}
        # Name to text of the special tokens that the vocabulary has: {"eos_token": "<|im_end|>", ...}.
        self.special_tokens: dict[str, str] = {}
        for name in SPECIAL_TOKEN_NAMES:
            text = _token_text(names.get(name))
            if text is not None and self.backend.token_to_id(text) is not None:
                self.special_tokens[name] = text
        self._mark_special(names.get("additional_special_tokens"))
        # Name to source; "default" is for every request, "tool_use" (in some checkpoints) for requests with tools.
        self.chat_templates = _chat_templates(folder, settings)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in the text count as such; lone surrogates become U+FFFD.

        `add_special_tokens` adds what the checkpoint puts around a plain prompt (such as bos). Text from a chat
        template already has it.
        """
        ids: list[int] = self.backend.encode(_encodable(text), add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text."""
        inputs = [_encodable(text) for text in texts]
        encodings = self.backend.encode_batch(inputs, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Incomplete UTF-8 becomes U+FFFD; ids outside the vocabulary are left out."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; b"" outside the vocabulary. A token may hold part of a character."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece: str | None = self.backend.id_to_token(token_id)
        if piece is None:
            return b""
        if "ByteLevel" in self._decoders:
            try:
                return bytes(map(_BYTE_OF_CHAR.__getitem__, piece))
            except KeyError:
                return piece.encode()
        if "ByteFallback" in self._decoders and (match := _BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(match[1])
        if "Metaspace" in self._decoders or "Replace" in self._decoders:
            return piece.replace("\u2581", " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for what is not a whole character."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_id(self, text: str) -> int | None:
        """The id of the token whose vocabulary entry is exactly `text`, if there is one."""
        token: int | None = self.backend.token_to_id(text)
        return token

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model's embedding may have more rows."""
        size: int = self.backend.get_vocab_size(with_added_tokens=True)
        return size

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self.token_id(self.eos_token)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self.token_id(self.bos_token)

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out by default."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @property
    def chat_template(self) -> str | None:
        """Source of the default chat template, or None."""
        return self.chat_templates.get("default")

    @cached_property
    def json(self) -> str:
        """The text of tokenizer.json."""
        try:
            return read_bytes(self.path, MAX_TOKENIZER_BYTES).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path} is not UTF-8 text: {error}") from error

    @cached_property
    def _added(self) -> dict[int, str]:
        return {i: token.content for i, token in self.backend.get_added_tokens_decoder().items()}

    @cached_property
    def _decoders(self) -> frozenset[str]:
        """Type names of the decoder and of its parts."""
        if self.backend.decoder is None:
            return frozenset()
        state = json.loads(self.backend.decoder.__getstate__())
        return frozenset(part["type"] for part in state.get("decoders", [state]))

    def _mark_special(self, additional: Any) -> None:
        # As in transformers: a token that the configuration names is never split, whatever tokenizer.json says of it.
        texts = [_token_text(token) for token in additional] if isinstance(additional, list) else []
        known = {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        for text in (*self.special_tokens.values(), *texts):
            if text is not None and text not in known and self.backend.token_to_id(text) is not None:
                self.backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True)])


def _encodable(text: str) -> str:
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _token_text(token: Any) -> str | None:
    """A special token is written as its text, or as an object with the text under "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _chat_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """A file of its own goes before tokenizer_config.json, as in transformers."""
    jinja, in_json = folder / "chat_template.jinja", folder / "chat_template.json"
    if jinja.exists():
        try:
            return {"default": read_bytes(jinja, MAX_TEMPLATE_BYTES).decode()}
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{jinja} is not UTF-8 text: {error}") from error
    source = settings.get("chat_template")
    where = str(folder / "tokenizer_config.json")
    if in_json.exists():
        source, where = read_json_object(in_json).get("chat_template"), str(in_json)
    if source is None:
        return {}
    if isinstance(source, str):
        return {"default": source}
    if not isinstance(source, list) or not all(isinstance(entry, dict) for entry in source):
        raise CheckpointError(f"{where}: chat_template must be a string, or a list of objects with name and template")
    entries = [Fields(entry, f"{where}: chat_template") for entry in source]
    return {entry.text("name"): entry.text("template") for entry in entries}


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's stand-ins: printable Latin-1 characters are themselves, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_level_alphabet()
