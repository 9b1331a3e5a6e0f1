"""From token ids to text, one token at a time, exactly as `tokenizers` would decode the whole sequence.

The two decoders that language models use are functions of the tokens' bytes, so each token's share of the text is
looked up in a table instead of being decoded again:

- ByteLevel (GPT-2, Llama 3, Qwen, DeepSeek): the text is the UTF-8 decoding of all bytes together, with U+FFFD for each
  maximal invalid part (Unicode 15, section 3.9). At most three bytes of an unfinished character wait.
- Replace or Metaspace, ByteFallback, Fuse, Strip (SentencePiece: Llama 2, Mistral, Gemma): a run of `<0x..>` tokens is
  text if the whole run is valid UTF-8, otherwise one U+FFFD a byte.

Every other decoder is asked again about a window of the latest tokens.
"""

from __future__ import annotations

import codecs
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Protocol

from skyline.frontend.token_pieces import PieceTable, piece_table

REPLACEMENT = "\ufffd"

# A byte-fallback run waits for its end, since one invalid byte turns all of it into U+FFFD. A run this long is released
# as soon as its last character is whole, and what follows counts as a new run: the stream must not stall.
MAX_RUN_BYTES = 32

# Unknown decoders: text ending in U+FFFD may still become a character, but not after this many tokens.
MAX_UNDECIDED_TOKENS = 8


class TokenText(Protocol):
    """The text of a growing sequence of tokens. `offsets[i]` is where the text of the i-th pushed token begins.

    Tokens that together make one character share its offset. The offset of a token whose text is still waiting may
    change until that text is returned.
    """

    offsets: list[int]

    def push(self, token_id: int) -> str:
        """Add a token; return the text that it made certain."""

    def flush(self) -> str:
        """End the sequence; return the text that was waiting."""


def token_text(backend: Any, prompt_ids: Sequence[int], skip_special_tokens: bool) -> TokenText:
    """The text that follows a prompt: decode(prompt + output) without the beginning it shares with decode(prompt).

    `backend` is a `tokenizers.Tokenizer` that no longer changes. Ids outside the vocabulary have no text.
    """
    table = piece_table(backend, skip_special_tokens)
    if table is None:
        return _WindowText(backend, prompt_ids, skip_special_tokens)
    stream = _ByteFallbackText(table) if table.decoder.byte_fallback else _PieceText(table)
    stream.start_after(prompt_ids)
    return stream


class _PieceText:
    """Table look-up, with the bytes of an unfinished character in `_pending`."""

    def __init__(self, table: PieceTable) -> None:
        self.offsets: list[int] = []
        self._table = table
        self._length = 0
        self._pending = b""
        self._strip = table.decoder.strip_space
        self._first = bool(table.decoder.metaspace)
        self._echo = ""  # text that the prompt's unfinished end may still turn out to be; not part of the output
        self._plain = False  # nothing pending and nothing special about the start: a piece is its text

    def start_after(self, prompt_ids: Sequence[int]) -> None:
        """Take over the state that the prompt leaves behind."""
        start = len(prompt_ids)
        while start > 0:
            start -= 1
            piece = self._table[prompt_ids[start]]
            if piece and isinstance(piece, str):
                self._strip = self._first = False
                start += 1
                break
        for token_id in prompt_ids[start:]:
            self.push(token_id)
        self._echo = self._waiting()
        if self._strip:
            self._echo = self._echo.removeprefix(" ")
        self._length = 0
        self.offsets.clear()
        self._settle()

    def push(self, token_id: int) -> str:
        piece = self._table[token_id]
        if isinstance(piece, str):
            if self._plain:
                self.offsets.append(self._length)
                self._length += len(piece)
                return piece
            return self._push_text(token_id, piece)
        text = self._trim(self._push_bytes(piece))
        self._first = False
        self._settle()
        return text

    def flush(self) -> str:
        return self._trim(self._end_bytes())

    def _push_text(self, token_id: int, piece: str) -> str:
        if not piece:
            self._push_nothing()
            return ""
        if self._first:
            self._first, piece = False, self._table.first(token_id)
        head = self._end_bytes()
        self.offsets.append(self._length)
        self._length += len(piece)
        text = self._trim(head + piece)
        self._settle()
        return text

    def _push_nothing(self) -> None:
        """Add a token without text. It does not end a character or a run."""
        self.offsets.append(self._length)

    def _push_bytes(self, piece: bytes) -> str:
        """Add bytes, the token's offset, and the length of the text returned."""
        waiting = self._pending
        joins = not waiting or _begins_character(waiting + piece[:1])
        self.offsets.append(self._length if joins else self._length + 1)
        text, self._pending = _decode_utf8(waiting + piece)
        self._length += len(text)
        return text

    def _end_bytes(self) -> str:
        """No byte follows directly: return what was pending, and count it."""
        text = self._waiting()
        self._pending = b""
        self._length += len(text)
        return text

    def _waiting(self) -> str:
        """The text of the pending bytes if nothing else came. An unfinished character is one maximal invalid part."""
        return REPLACEMENT if self._pending else ""

    def _trim(self, text: str) -> str:
        """Take off the stripped space and the prompt's own end, both of which can only be the first text to come."""
        if not text or not (self._strip or self._echo):
            return text
        begin = 0
        if self._strip:
            self._strip = False
            begin = int(text[0] == " ")
        dropped = begin
        while self._echo and dropped < len(text) and text[dropped] == self._echo[0]:
            self._echo = self._echo[1:]
            dropped += 1
        if dropped < len(text):
            self._echo = ""
        self._length -= dropped
        self.offsets[:] = [max(0, offset - dropped) for offset in self.offsets]
        return text[dropped:]

    def _settle(self) -> None:
        self._plain = not (self._pending or self._strip or self._first or self._echo)


class _ByteFallbackText(_PieceText):
    """`_pending` holds the run of byte tokens; `_broken` says that the run is invalid, so each byte is U+FFFD."""

    def __init__(self, table: PieceTable) -> None:
        super().__init__(table)
        self._broken = False
        self._run_tokens: list[tuple[int, int]] = []  # of the run: (index in `offsets`, first byte in `_pending`)

    def start_after(self, prompt_ids: Sequence[int]) -> None:
        super().start_after(prompt_ids)
        self._run_tokens.clear()

    def _push_nothing(self) -> None:
        if self._pending:
            self._run_tokens.append((len(self.offsets), len(self._pending)))
        super()._push_nothing()

    def _push_bytes(self, piece: bytes) -> str:
        self.offsets.append(self._length)
        if self._broken:
            self._length += 1
            return REPLACEMENT
        self._run_tokens.append((len(self.offsets) - 1, len(self._pending)))
        self._pending += piece
        try:
            text, used = codecs.utf_8_decode(self._pending, "strict", False)
        except UnicodeDecodeError:
            self._broken = True
            return self._release(REPLACEMENT * len(self._pending))
        if used == len(self._pending) >= MAX_RUN_BYTES:
            return self._release(text)
        return ""

    def _end_bytes(self) -> str:
        self._broken = False
        return self._release(self._waiting())

    def _release(self, text: str) -> str:
        each_byte = len(text) == len(self._pending)
        begins = [position for position, byte in enumerate(self._pending) if each_byte or byte & 0xC0 != 0x80]
        for index, first_byte in self._run_tokens:
            self.offsets[index] = self._length + bisect_right([*begins, len(self._pending)], first_byte) - 1
        self._pending = b""
        self._run_tokens.clear()
        self._length += len(text)
        return text

    def _waiting(self) -> str:
        try:
            return self._pending.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(self._pending)

    def _settle(self) -> None:
        super()._settle()
        self._plain = self._plain and not self._broken


def _decode_utf8(data: bytes) -> tuple[str, bytes]:
    """(the text so far, the bytes of an unfinished character)."""
    text, used = codecs.utf_8_decode(data, "replace", False)
    rest = data[used:]
    if rest[:1] == b"\xed" and rest[1:] >= b"\xa0":
        # CPython waits for the third byte of an encoded surrogate, which is invalid from its second byte on.
        return text + REPLACEMENT * len(rest), b""
    return text, rest


def _begins_character(data: bytes) -> bool:
    """Whether the last byte goes on with the unfinished character that the others are."""
    text, rest = _decode_utf8(data)
    return not text or (len(text) == 1 and not rest)


class _WindowText:
    """Decode the latest tokens with and without the new ones; the difference is the new text.

    The technique of Hugging Face's text-generation-inference. Where the decoder looks further back than the window,
    or where invalid bytes go on for MAX_UNDECIDED_TOKENS, the text may differ from that of the whole sequence.
    """

    def __init__(self, backend: Any, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self.offsets: list[int] = []
        self._decode = backend.decode
        self._skip = skip_special_tokens
        added = backend.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = {token_id for token_id, token in added.items() if token.special}
        self._length = 0
        size = 8
        self._ids = self._visible(prompt_ids[-size:])
        while size < len(prompt_ids) and not self._text(self._ids):
            size *= 4
            self._ids = self._visible(prompt_ids[-size:])
        self._read = len(self._ids)
        self._before = self._text(self._ids)

    def push(self, token_id: int) -> str:
        self.offsets.append(self._length)
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        text = self._text(self._ids)
        undecided = text.endswith(REPLACEMENT) or len(text) <= len(self._before)
        if undecided and len(self._ids) - self._read < MAX_UNDECIDED_TOKENS:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._text(self._ids))

    def _advance(self, text: str) -> str:
        new = text[len(self._before) :]
        if new:
            self._ids = self._ids[self._read :]
            self._read = len(self._ids)
            self._before = self._text(self._ids)
        else:
            del self._ids[self._read :]
        self._length += len(new)
        return new

    def _visible(self, ids: Sequence[int]) -> list[int]:
        return [token_id for token_id in ids if token_id not in self._skipped]

    def _text(self, ids: list[int]) -> str:
        return str(self._decode(ids, skip_special_tokens=self._skip)) if ids else ""
