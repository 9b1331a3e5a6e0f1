"""Chat templates: a conversation becomes the prompt text that the model was trained on.

Format: the jinja2 templates of https://huggingface.co/docs/transformers/chat_templating, rendered with transformers'
settings and variables, in a sandbox that bounds time and memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.template_budget import Budget, ChatTemplateError, current_budget
from skyline.checkpoint.template_sandbox import TemplateEnvironment
from skyline.checkpoint.tokenizer import MAX_TEMPLATE_BYTES, Tokenizer

__all__ = ["RESERVED_VARIABLES", "ChatTemplate", "ChatTemplateError", "load_chat_template"]

RESERVED_VARIABLES = frozenset(["messages", "tools", "documents", "add_generation_prompt", "continue_final_message"])
WORK_FACTOR = 16  # characters of values that a template may create, for each character that it may put out

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled chat template. Safe to use from several threads.

    `special_tokens` are variables such as bos_token. One rendering may take `max_seconds` of processor time and put out
    `max_characters`, and may create 16 times as many on the way. ChatTemplateError if the source does not compile.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        tool_use_source: str | None = None,
        max_seconds: float = 2.0,
        max_characters: int = 4_000_000,
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self.max_seconds = max_seconds
        self.max_characters = max_characters
        self._environment = TemplateEnvironment()
        self._default = self._compile(source)
        self._tool_use = self._default if tool_use_source is None else self._compile(tool_use_source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt for `messages`, to be tokenized with add_special_tokens=False.

        All arguments are plain JSON data. Content that is a list of {"type": "text", "text": ...} parts is joined with
        newlines into a string; other parts are refused. `add_generation_prompt` appends what makes the model answer;
        `continue_final_message` instead leaves the last message open for the model to go on with. `kwargs` are further
        variables of the template, such as enable_thinking; those in RESERVED_VARIABLES are refused.

        ChatTemplateError: the template refuses the conversation (its raise_exception), fails, or exceeds its limits.
        """
        if reserved := RESERVED_VARIABLES & kwargs.keys():
            raise ChatTemplateError(f"{min(reserved)} cannot be set as a variable of the chat template")
        if continue_final_message and add_generation_prompt:
            raise ChatTemplateError("continue_final_message and add_generation_prompt exclude each other")
        chat = [_message(message) for message in messages]
        final = _open_final_message(chat) if continue_final_message else ""
        variables = {
            **self.special_tokens,
            **_plain(kwargs),
            "messages": chat,
            "tools": None if tools is None else _plain(tools),
            "documents": None if documents is None else _plain(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._render(variables, with_tools=tools is not None)
        return _cut_at_tag(text, final) if continue_final_message else text

    def _budget(self) -> Budget:
        return Budget(self.max_seconds, WORK_FACTOR * self.max_characters)

    def _compile(self, source: str) -> Any:
        if len(source) > MAX_TEMPLATE_BYTES:
            raise ChatTemplateError(f"the chat template is longer than {MAX_TEMPLATE_BYTES} characters")
        # Compiling already computes constant expressions.
        token = current_budget.set(self._budget())
        try:
            return self._environment.from_string(source)
        except ChatTemplateError:
            raise
        except Exception as error:
            raise ChatTemplateError(f"the chat template does not compile: {error}") from error
        finally:
            current_budget.reset(token)

    def _render(self, variables: dict[str, Any], with_tools: bool) -> str:
        budget = self._budget()
        token = current_budget.set(budget)
        pieces: list[str] = []
        size = 0
        try:
            budget.keep(variables)
            for piece in (self._tool_use if with_tools else self._default).generate(variables):
                pieces.append(piece)
                size += len(piece)
                if size > self.max_characters:
                    raise ChatTemplateError(
                        f"the chat template makes more than {self.max_characters} characters of this conversation"
                    )
        except ChatTemplateError:
            raise
        except Exception as error:  # a template can fail in any way that Python can
            raise ChatTemplateError(f"the chat template failed: {str(error) or type(error).__name__}") from error
        finally:
            current_budget.reset(token)
        return "".join(pieces)


def load_chat_template(tokenizer: Tokenizer, source: str | None = None) -> ChatTemplate | None:
    """The chat template of a checkpoint, or None if it has none; `source` is used in its place.

    CheckpointError if it does not compile.
    """
    tool_use = tokenizer.chat_templates.get("tool_use") if source is None else None
    source = tokenizer.chat_template if source is None else source
    if source is None:
        return None
    try:
        return ChatTemplate(source, tokenizer.special_tokens, tool_use)
    except ChatTemplateError as error:
        raise CheckpointError(f"{tokenizer.path.parent}: {error}") from error


class _Arguments(dict[str, Any]):
    """A call's arguments: most templates write the object with `tojson`, DeepSeek's add it as text to other text."""

    def __add__(self, after: str) -> str:
        return json.dumps(self, ensure_ascii=False) + after

    def __radd__(self, before: str) -> str:
        return before + json.dumps(self, ensure_ascii=False)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"each message must be an object, not {type(message).__name__}")
    plain: dict[str, Any] = _plain(message)
    if isinstance(plain.get("content"), list):
        plain["content"] = "\n".join(map(_text_of_part, plain["content"]))
    for call in plain.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
            function["arguments"] = _Arguments(function["arguments"])
    # As in transformers: templates read a message's reasoning under one of two names, clients use three.
    reasoning = next((plain[key] for key in _REASONING_FIELDS if plain.get(key) is not None), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise ChatTemplateError(f"content parts must be of the type text, not {kind!r}")
    text: str = part["text"]
    return text


def _plain(value: Any) -> Any:
    """A copy made of JSON types only, so that the template gets no object with methods of its own."""
    try:
        return _copy(value)
    except RecursionError as error:
        raise ChatTemplateError("the conversation is nested too deeply") from error


def _copy(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_copy(key): _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item) for item in value]
    raise ChatTemplateError(f"chat templates take JSON values only, not {type(value).__name__}")


def _open_final_message(chat: list[dict[str, Any]]) -> str:
    """Mark the end of the last message's content and return the content."""
    content = chat[-1].get("content") if chat else None
    if not isinstance(content, str):
        raise ChatTemplateError("continue_final_message needs a last message with content")
    chat[-1]["content"] = content + _CONTINUE_TAG
    return content


def _cut_at_tag(text: str, final: str) -> str:
    """Cut the prompt where the last message's content ends, as transformers does."""
    tag = _CONTINUE_TAG.strip()
    if tag not in text or final.strip() not in text:
        raise ChatTemplateError("the chat template changes the last message, so it cannot be continued")
    end = text.rindex(tag)
    if text.startswith(_CONTINUE_TAG, end):
        return text[:end]
    # The template has trimmed the content, and with it the space at the end of the tag.
    return text[:end].rstrip()
