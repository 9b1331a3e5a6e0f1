"""How models mark reasoning and tool calls in their text, as data; and how to tell from a chat template.

A new model family that writes its calls as JSON needs an entry here and no code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ReasoningFormat:
    """Reasoning stands between `start` and `end`, at the beginning of the output.

    If `starts_inside`, the prompt already holds `start`: the output begins with reasoning, and a `start` that the model
    repeats is dropped. Otherwise reasoning is optional. Both markers must be there.
    """

    name: str
    start: str
    end: str
    starts_inside: bool = False

    def __post_init__(self) -> None:
        if not self.start or not self.end:
            raise ValueError(f"reasoning format {self.name}: the start and end markers must not be empty")

    def after_prompt(self, prompt: str) -> ReasoningFormat:
        """The same format, with `starts_inside` as the rendered prompt says if it ends with one of the markers."""
        tail = prompt.rstrip()
        if tail.endswith(self.start):
            return replace(self, starts_inside=True)
        if tail.endswith(self.end):
            return replace(self, starts_inside=False)
        return self


@dataclass(frozen=True)
class ToolFormat:
    """A call is a JSON object between `start` and `end`; the members `name_key` and `arguments_keys` matter.

    `bare`: at the beginning of the message the object may also come without `start`. Objects that follow each other in
    one block are separated by white space or `separator`. Without arguments, a call counts if `arguments_optional`.
    An empty `end` means that nothing closes a block; an empty `start`, that only bare objects are calls.
    """

    name: str
    start: str
    end: str = ""
    name_key: str = "name"
    arguments_keys: tuple[str, ...] = ("arguments", "parameters")  # the first of them that comes counts
    arguments_optional: bool = True
    bare: bool = False
    separator: str = ""  # one character, if any; only where `end` is empty

    def __post_init__(self) -> None:
        if not self.start and not self.bare:
            raise ValueError(f"tool format {self.name}: without a start marker, calls must be bare")
        if len(self.separator) > 1:
            raise ValueError(f"tool format {self.name}: the separator must be one character, not {self.separator!r}")


REASONING_FORMATS = {
    format.name: format
    for format in (
        ReasoningFormat("qwen3", start="<think>", end="</think>"),
        ReasoningFormat("deepseek_r1", start="<think>", end="</think>", starts_inside=True),
    )
}

TOOL_FORMATS = {
    format.name: format
    for format in (
        # https://github.com/NousResearch/Hermes-Function-Calling, also Qwen2.5 and Qwen3
        ToolFormat("hermes", start="<tool_call>", end="</tool_call>"),
        # https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/#json-based-tool-calling
        # A plain JSON answer is common here, and may well have a "name": without parameters it is not a call.
        ToolFormat("llama3_json", start="<|python_tag|>", bare=True, separator=";", arguments_optional=False),
    )
}

# Formats that use the same markers around something other than a JSON object.
_NOT_HERMES = ("<function=", "<arg_key>")


def detect_formats(
    chat_template: str | None, token_id: Callable[[str], int | None] | None = None
) -> tuple[ReasoningFormat | None, ToolFormat | None]:
    """The formats that a checkpoint uses, from the markers in its chat template.

    Without a template, from the markers that are tokens of their own (`token_id` looks a token up). None: not known.
    """
    if chat_template is not None:
        return _reasoning_of(chat_template), _tools_of(chat_template)
    if token_id is None:
        return None, None
    reasoning = REASONING_FORMATS["qwen3"]
    has_reasoning = token_id(reasoning.start) is not None and token_id(reasoning.end) is not None
    tools = next((format for format in TOOL_FORMATS.values() if token_id(format.start) is not None), None)
    return reasoning if has_reasoning else None, tools


def _reasoning_of(template: str) -> ReasoningFormat | None:
    optional = REASONING_FORMATS["qwen3"]
    if optional.end not in template:
        return None
    # Does the last thing the template adds for the model to go on from leave <think> open?
    generation_prompt = template[max(template.rfind("add_generation_prompt"), 0) :]
    opened = re.search(re.escape(optional.start) + r"(?!(\s|\\n)*" + re.escape(optional.end) + ")", generation_prompt)
    return REASONING_FORMATS["deepseek_r1"] if opened and "add_generation_prompt" in template else optional


def _tools_of(template: str) -> ToolFormat | None:
    hermes, llama = TOOL_FORMATS["hermes"], TOOL_FORMATS["llama3_json"]
    if hermes.start in template and "arguments" in template and not any(mark in template for mark in _NOT_HERMES):
        return hermes
    if "parameters" in template and ("python_tag" in template or "ipython" in template):
        return llama
    return None
