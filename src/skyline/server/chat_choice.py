"""One choice of a chat completion: from pieces of text to content, reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from skyline.checkpoint import Tokenizer
from skyline.engine.messages import TokenLogprobs
from skyline.frontend.async_llm import Update
from skyline.frontend.parsers import (
    ContentDelta,
    Event,
    Parser,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallInvalid,
    ToolCallStart,
)
from skyline.server.logprobs import chat_logprobs
from skyline.server.responses import (
    ChatChoice,
    ChatLogprobs,
    ChatMessageOut,
    Delta,
    FinishReason,
    Function,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)


class ChoiceState:
    """Turns updates into deltas; `parser` None means that all text is content."""

    def __init__(self, parser: Parser | None, reasoning_end: int | None, parallel_calls: bool) -> None:
        self.tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | UnsetType = UNSET
        self.calls = 0
        self.broken_calls: set[int] = set()  # announced, but not calls after all
        self._parser = parser
        self._parallel = parallel_calls
        self._fresh = True  # the role has not been sent
        self._reasoning_end = reasoning_end
        self._thinking = reasoning_end is not None
        self._thought_tokens = 0
        self._has_reasoning = False

    @property
    def reasoning_tokens(self) -> int:
        return self._thought_tokens if self._has_reasoning else 0

    def delta(self, update: Update) -> Delta:
        """What a client hears of this update."""
        self.tokens += len(update.token_ids)
        if self._thinking:
            self._count_reasoning(update.token_ids)
        delta = Delta()
        if self._fresh:
            self._fresh = False
            delta.role = "assistant"
            if self._parser is None:
                delta.content = ""
        if self._parser is None:
            if update.text:
                delta.content = update.text
        else:
            events = self._parser.push(update.text)
            if update.finish_reason is not None:
                events += self._parser.finish()
            for event in events:
                self._apply(delta, event)
        if update.finish_reason is not None:
            called = self.calls > 0 and update.finish_reason == "stop"
            self.finish_reason = "tool_calls" if called else update.finish_reason
        return delta

    def note_stop(self, update: Update, stop_token_ids: Sequence[int]) -> None:
        """Say what ended the choice, if it is something that the request named (and not EOS)."""
        reason = update.stop_reason
        if isinstance(reason, str) or (reason is not None and reason in stop_token_ids):
            self.stop_reason = reason

    def _count_reasoning(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            self._thought_tokens += 1
            if token == self._reasoning_end:
                self._thinking = False
                return

    def _apply(self, delta: Delta, event: Event) -> None:
        match event:
            case ContentDelta(text):
                delta.content = (delta.content or "") + text
            case ReasoningDelta(text):
                self._has_reasoning = True
                delta.reasoning_content = delta.reasoning = (delta.reasoning or "") + text
            case ToolCallStart(index, call_id, name) if self._parallel or index == 0:
                self.calls += 1
                call = ToolCallDelta(index, FunctionDelta("", name), call_id, "function")
                delta.tool_calls = [*(delta.tool_calls or []), call]
            case ToolCallArguments(index, text) if self._parallel or index == 0:
                calls = delta.tool_calls = delta.tool_calls or []
                if calls and calls[-1].index == index:
                    calls[-1].function.arguments += text
                else:
                    calls.append(ToolCallDelta(index, FunctionDelta(text)))
            case ToolCallInvalid(index) if self._parallel or index == 0:
                self.calls -= 1
                self.broken_calls.add(index)
                delta.tool_calls = [call for call in delta.tool_calls or () if call.index != index] or None


class MessageBuilder:
    """Collects the deltas of a choice into a whole message."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, tuple[str, str, list[str]]] = {}
        self._logprobs: list[TokenLogprobs] = []

    def add(self, delta: Delta, update: Update) -> None:
        if delta.content:
            self._content.append(delta.content)
        if delta.reasoning:
            self._reasoning.append(delta.reasoning)
        for call in delta.tool_calls or ():
            if call.id is not None:
                self._calls[call.index] = call.id, call.function.name or "", []
            self._calls[call.index][2].append(call.function.arguments)
        if update.logprobs is not None:
            self._logprobs += update.logprobs

    def choice(self, index: int, state: ChoiceState, tokenizer: Tokenizer, with_logprobs: bool) -> ChatChoice:
        for broken in state.broken_calls:
            self._calls.pop(broken, None)
        content = "".join(self._content)
        message = ChatMessageOut(content if content or not self._calls else None)
        if self._reasoning:
            message.reasoning_content = message.reasoning = "".join(self._reasoning)
        if self._calls:
            message.tool_calls = [
                ToolCall(call_id, Function(name, "".join(arguments)))
                for call_id, name, arguments in self._calls.values()
            ]
        logprobs: ChatLogprobs | None = chat_logprobs(tokenizer, self._logprobs) if with_logprobs else None
        return ChatChoice(index, message, logprobs, state.finish_reason, state.stop_reason)
