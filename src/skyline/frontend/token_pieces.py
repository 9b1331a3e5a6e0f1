"""What each token adds to the text, for tokenizers whose decoder looks at one token at a time."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any, NamedTuple

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Decoder(NamedTuple):
    """A tokenizer's decoder, as far as a table can express it."""

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strip_space: bool = False  # one leading space of the whole text
    metaspace: str = ""  # the character that is dropped, not turned into a space, in the first token


def _describe(backend: Any) -> Decoder | None:
    """What the tokenizer's decoder does, or None where the table cannot express it."""
    if backend.decoder is None:
        return None
    parts = [json.loads(backend.decoder.__getstate__())]
    while any(part["type"] == "Sequence" for part in parts):
        parts = [inner for part in parts for inner in part.get("decoders", [part])]
    if [part["type"] for part in parts] == ["ByteLevel"]:
        return Decoder(byte_level=True)
    found = Decoder()
    phase = 0  # the parts must come in this order, or they would work on each other's results
    for part in parts:
        kind = part["type"]
        if kind == "Replace" and "String" in part["pattern"] and phase == 0:
            pair = (part["pattern"]["String"], part["content"])
            found = found._replace(replacements=(*found.replacements, pair))
        elif kind == "Metaspace" and phase == 0 and not found.replacements:
            found = found._replace(replacements=((part["replacement"], " "),))
            if part["prepend_scheme"] != "never":
                found = found._replace(metaspace=part["replacement"])
        elif kind == "ByteFallback" and phase <= 1:
            found, phase = found._replace(byte_fallback=True), 1
        elif kind == "Fuse" and phase <= 2:
            phase = 2
        elif kind == "Strip" and phase == 2 and (part["content"], part["start"], part["stop"]) == (" ", 1, 0):
            found, phase = found._replace(strip_space=True), 3
        else:
            return None
    return found


class PieceTable(dict[int, str | bytes]):
    """Token id -> its text; bytes where they are not whole characters (or are a byte-fallback token)."""

    def __init__(self, backend: Any, skip_special_tokens: bool, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self._token = backend.id_to_token
        self._skipped: set[str] = set()
        if skip_special_tokens:
            self._skipped = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}

    def __missing__(self, token_id: int) -> str | bytes:
        piece = self[token_id] = self._compute(token_id)
        return piece

    def _compute(self, token_id: int) -> str | bytes:
        token = self._token(token_id)
        if token is None or token in self._skipped:
            return ""
        if self.decoder.byte_level:
            raw = _byte_level_bytes(token)
            try:
                return raw.decode()
            except UnicodeDecodeError:
                return raw
        if self.decoder.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        for old, new in self.decoder.replacements:
            token = token.replace(old, new)
        return str(token)

    def first(self, token_id: int) -> str:
        """The text of a token that opens the sequence under a Metaspace decoder."""
        return str(self._token(token_id)).replace(self.decoder.metaspace, "")


@lru_cache(maxsize=16)
def piece_table(backend: Any, skip_special_tokens: bool) -> PieceTable | None:
    """The table of a `tokenizers.Tokenizer`, shared by all its streams; None if its decoder needs more than a table."""
    decoder = _describe(backend)
    return None if decoder is None else PieceTable(backend, skip_special_tokens, decoder)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return alphabet | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode()  # an added token, which is stored as plain text
