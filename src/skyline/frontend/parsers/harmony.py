"""The harmony format of gpt-oss: messages with a header each, on channels for reasoning, answers and tool calls.

Format: https://cookbook.openai.com/articles/openai-harmony. `<|start|>ROLE<|channel|>CHANNEL<|message|>TEXT<|end|>`,
where the prompt ends with `<|start|>assistant`; `<|return|>` and `<|call|>` end the last message. A message to a
function has `to=functions.NAME` after its role or its channel; `<|constrain|>json` may end its header.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from enum import Enum, auto

from skyline.frontend.parsers.call_block import BlockState, Functions
from skyline.frontend.parsers.events import ContentDelta, Event, ReasoningDelta, ToolCallInvalid
from skyline.frontend.parsers.markers import WHITESPACE, Markers
from skyline.frontend.parsers.named_block import ArgumentsBlock
from skyline.frontend.parsers.spaced_text import SpacedText

MAX_HEADER_CHARS = 512

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_IN_HEADER = Markers(_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS)
_AFTER_TEXT = Markers(_START, *_ENDS)
_FIRST_WORDS = ("to=", "assistant")  # of a header whose first marker the prompt holds, or the model forgot
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL_NAME = re.compile(re.escape(_CHANNEL) + r"\s*(\w+)")
_NAMESPACE = "functions."


def forced_header(prompt: str, function: str | None) -> str:
    """The header to add to a prompt if a grammar constrains what follows: of a call of the function, or of an answer.

    Empty if the prompt is not harmony, or says itself what comes.
    """
    if not prompt.endswith(f"{_START}assistant"):
        return ""
    if function is None:
        return f"{_CHANNEL}final{_MESSAGE}"
    return f"{_CHANNEL}commentary to={_NAMESPACE}{function} {_CONSTRAIN}json{_MESSAGE}"


class _State(Enum):
    HEADER = auto()
    REASONING = auto()
    CONTENT = auto()
    CALL = auto()


class HarmonyParser:
    """Reads the text in any pieces; all events' texts joined do not depend on how it was cut. Never raises.

    - The channel "analysis" is reasoning (content, if `reasoning` is false), every other one content, commentary
      without a recipient included. Messages of one kind are joined by a newline.
    - A message with a recipient, on whatever channel, is a call of the function. It is reported, and becomes content if
      it is not valid or `tools` is false, as in OutputParser; its header then counts as part of it.
    - Text where a header ought to be is content, but an unfinished header at the end is dropped.

    `prompt` is what the model goes on from: its last message may have begun.
    """

    def __init__(
        self,
        reasoning: bool,
        tools: bool,
        allowed_tools: Collection[str] | None = None,
        *,
        new_call_id: Callable[[], str],
        prompt: str = "",
    ) -> None:
        self._splits_reasoning = reasoning
        self._tools = tools
        self._functions = Functions(None if allowed_tools is None else frozenset(allowed_tools), {}, new_call_id)
        self._state = _State.HEADER
        self._rest = ""  # text not decided yet
        self._header = ""
        self._reasoning = SpacedText(skip_space=True)
        self._content = SpacedText(skip_space=False)
        self._block: ArgumentsBlock | None = None
        self._num_calls = 0
        self._events: list[Event] = []
        self._steps = {
            _State.HEADER: self._in_header,
            _State.REASONING: self._in_text,
            _State.CONTENT: self._in_text,
            _State.CALL: self._in_call,
        }
        open_message = prompt[max(prompt.rfind(_START), 0) :]
        if _CHANNEL in open_message or _MESSAGE in open_message:
            self.push(open_message)
            self._content.take_waiting()
            self._reasoning.take_waiting()

    def push(self, text: str) -> list[Event]:
        """Take in more text; return what is now certain."""
        text = self._rest + text
        position = 0
        while position < len(text):
            state = self._state
            begin, position = position, self._steps[state](text, position)
            if position == begin and self._state is state:
                break
        self._rest = text[position:]
        return self._take_events()

    def finish(self) -> list[Event]:
        """The text ends here; return what was held back."""
        text, self._rest = self._rest, ""
        if self._state is _State.HEADER:
            header = self._take_header() + text
            if header.strip(WHITESPACE) and not header.lstrip(WHITESPACE).startswith("<|"):
                self._begin_content(header)
        elif self._state is _State.CALL:
            self._fail_call(text)
        else:
            self._add_text(text)
        if not self._content.skip_space:
            self._append_content(self._content.take_waiting())
        self._state = _State.HEADER
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # --- one step of each state: use text from `position`, return the new position; no progress means: wait for more

    def _in_header(self, text: str, position: int) -> int:
        end, marker = _IN_HEADER.find(text, position)
        self._header += text[position:end]
        begun = self._header.lstrip(WHITESPACE)
        if len(self._header) > MAX_HEADER_CHARS or not _may_be_header(begun):
            self._begin_content(self._take_header())
            return end
        if marker is None:
            return end
        if marker == _START or marker in _ENDS:
            header = self._take_header()
            if begun:
                self._begin_content(header)
                self._state = _State.HEADER
        if marker not in _ENDS:
            self._header += marker
        if marker == _MESSAGE:
            self._begin_message(self._take_header())
        return end + len(marker)

    def _in_text(self, text: str, position: int) -> int:
        end, marker = _AFTER_TEXT.find(text, position)
        self._add_text(text[position:end])
        if marker is None:
            return end
        self._state = _State.HEADER
        return end if marker == _START else end + len(marker)

    def _in_call(self, text: str, position: int) -> int:
        assert self._block is not None
        state, position = self._block.push(text, position, self._events)
        if state is BlockState.INVALID:
            self._fail_call("")
        elif state is BlockState.CALL:
            self._num_calls += 1
            self._block = None
            self._content.skip_space = True
            self._state = _State.CONTENT
        return position

    # --- parts of the steps

    def _begin_message(self, header: str) -> None:
        recipient = _RECIPIENT.search(header)
        if recipient is not None:
            self._begin_call(header, recipient[1].removeprefix(_NAMESPACE))
            return
        channels = _CHANNEL_NAME.findall(header)
        if self._splits_reasoning and channels and channels[-1] == "analysis":
            self._state = _State.REASONING
            if self._reasoning.begun:
                self._add_text("\n")
        else:
            self._begin_content("")

    def _begin_content(self, text: str) -> None:
        self._state = _State.CONTENT
        self._content.skip_space = False
        self._add_content("\n" + text if self._content.begun else text)

    def _begin_call(self, header: str, name: str) -> None:
        self._block = ArgumentsBlock(self._functions, self._num_calls, header)
        self._state = _State.CALL
        if not self._tools or not self._block.take_name(name):
            self._fail_call("")

    def _fail_call(self, rest: str) -> None:
        assert self._block is not None
        if self._block.announced:
            self._events.append(ToolCallInvalid(self._num_calls))
            self._num_calls += 1  # its index is used up
        self._begin_content(self._block.raw + rest)
        self._block = None

    def _take_header(self) -> str:
        header, self._header = self._header, ""
        return header

    def _add_text(self, text: str) -> None:
        if self._state is not _State.REASONING:
            self._add_content(text)
        elif text := self._reasoning.push(text):
            self._events.append(ReasoningDelta(text))

    def _add_content(self, text: str) -> None:
        self._append_content(self._content.push(text))

    def _append_content(self, text: str) -> None:
        if text:
            self._events.append(ContentDelta(text))


def _may_be_header(begun: str) -> bool:
    """Whether a header may begin so. Markers in it are whole: half of one is not handed in."""
    return begun.startswith("<|") or any(word.startswith(begun[: len(word)]) for word in _FIRST_WORDS)
