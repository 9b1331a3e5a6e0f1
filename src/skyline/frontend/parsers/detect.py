"""Which formats a checkpoint uses, told from the markers in its chat template or its vocabulary."""

from __future__ import annotations

import re
from collections.abc import Callable

from skyline.frontend.parsers.formats import REASONING_FORMATS, TOOL_FORMATS, ReasoningFormat, ToolFormat

# (format, what the template must have, what it must not have); the first that fits counts.
_TEMPLATES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("gpt_oss", ("<|channel|>", "<|message|>"), ()),
    ("deepseek_v32", ("｜DSML｜",), ()),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json"), ()),
    ("deepseek_v31", ("<｜tool▁calls▁begin｜>",), ()),
    ("minimax_m2", ("<minimax:tool_call>",), ()),
    ("mistral", ("[TOOL_CALLS]", "[ARGS]"), ()),
    ("mistral_v3", ("[TOOL_CALLS]",), ()),
    ("qwen3_coder", ("<tool_call>", "<function=", "<parameter="), ()),
    ("glm45", ("<tool_call>", "<arg_key>"), ()),
    ("hermes", ("<tool_call>", "arguments"), ("<function=",)),
    ("llama3_json", ("parameters", "python_tag"), ()),
    ("llama3_json", ("parameters", "ipython"), ()),
)

# (format, the tokens that it needs). DeepSeek's formats, and those that share <tool_call>, may need the template.
_VOCABULARIES = (
    ("gpt_oss", ("<|channel|>", "<|message|>", "<|call|>")),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("mistral", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral_v3", ("[TOOL_CALLS]",)),
    ("glm45", ("<tool_call>", "<arg_key>")),
    ("hermes", ("<tool_call>",)),
    ("llama3_json", ("<|python_tag|>",)),
)


def detect_formats(
    chat_template: str | None, token_id: Callable[[str], int | None] | None = None
) -> tuple[ReasoningFormat | None, ToolFormat | None]:
    """The formats that a checkpoint uses, from the markers in its chat template.

    Without a template, from the markers that are tokens of their own (`token_id` looks a token up). None: not known.
    """
    if chat_template is not None:
        tools = _tools_of(chat_template)
        return _reasoning_of(chat_template, tools), tools
    if token_id is None:
        return None, None
    tokens = ((name, all(token_id(token) is not None for token in needed)) for name, needed in _VOCABULARIES)
    tools = next((TOOL_FORMATS[name] for name, known in tokens if known), None)
    # What opens reasoning is told by the prompt, so of formats with the same markers the optional one will do.
    for name in ("gpt_oss", "mistral", "qwen3"):
        reasoning = REASONING_FORMATS[name]
        if reasoning.harmony != (tools is not None and tools.harmony):
            continue
        if all(token_id(marker) is not None for marker in reasoning.markers):
            return reasoning, tools
    return None, tools


def _tools_of(template: str) -> ToolFormat | None:
    for name, present, absent in _TEMPLATES:
        if all(mark in template for mark in present) and not any(mark in template for mark in absent):
            return TOOL_FORMATS[name]
    return None


def _reasoning_of(template: str, tools: ToolFormat | None) -> ReasoningFormat | None:
    if tools is not None and tools.harmony:
        return REASONING_FORMATS["gpt_oss"]
    if all(marker in template for marker in REASONING_FORMATS["mistral"].markers):
        return REASONING_FORMATS["mistral"]
    optional = REASONING_FORMATS["qwen3"]
    if optional.end not in template:
        return None
    if tools is TOOL_FORMATS["minimax_m2"]:
        return REASONING_FORMATS["minimax_m2"]
    if tools in (TOOL_FORMATS["deepseek_v31"], TOOL_FORMATS["deepseek_v32"]):
        return optional  # the template opens it for some prompts only; where it does, the prompt ends with the marker
    # Does the last thing the template adds for the model to go on from leave <think> open?
    generation_prompt = template[max(template.rfind("add_generation_prompt"), 0) :]
    opened = re.search(re.escape(optional.start) + r"(?!(\s|\\n)*" + re.escape(optional.end) + ")", generation_prompt)
    return REASONING_FORMATS["deepseek_r1"] if opened and "add_generation_prompt" in template else optional
