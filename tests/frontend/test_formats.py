from __future__ import annotations

import pytest

from skyline.frontend.parsers import REASONING_FORMATS, TOOL_FORMATS, detect_formats

QWEN, R1 = REASONING_FORMATS["qwen3"], REASONING_FORMATS["deepseek_r1"]
HERMES, LLAMA = TOOL_FORMATS["hermes"], TOOL_FORMATS["llama3_json"]

# The telling lines of published templates.
QWEN25 = """{{- "For each function call, return a json object within <tool_call></tool_call> XML tags:\\n<tool_call>
{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n" }}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
QWEN3 = """{%- set content = content.split('</think>')[-1] %}{{- '<tool_call>\\n{"name": "' }}{{- '", "arguments": ' }}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"""
QWEN3_THINKING = """{{- '</think>' }}{{- '<tool_call>\\n{"name": "' }}{{- '", "arguments": ' }}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""
QWEN3_CODER = """{{- '<tool_call>\\n<function=example>\\n<parameter=a>' }} arguments
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
DEEPSEEK_R1 = """{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{% if add_generation_prompt and not ns.is_tool %}{{'<|Assistant|><think>\\n'}}{% endif %}"""
LLAMA31 = """{%- if builtin_tools is defined or tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
{{- "<|python_tag|>" + tool_call.name + ".call(" }}{%- if add_generation_prompt %}{%- endif %}"""
PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}{% endif %}"


@pytest.mark.parametrize(
    ("template", "reasoning", "tools"),
    [
        (QWEN25, None, HERMES),
        (QWEN3, QWEN, HERMES),
        (QWEN3_THINKING, R1, HERMES),
        (QWEN3_CODER, None, None),
        (DEEPSEEK_R1, R1, None),
        (LLAMA31, None, LLAMA),
        (PLAIN, None, None),
        ("", None, None),
    ],
)
def test_formats_from_the_template(template, reasoning, tools):
    assert detect_formats(template, lambda token: 1) == (reasoning, tools)


def test_formats_from_the_vocabulary():
    assert detect_formats(None) == (None, None)
    assert detect_formats(None, {}.get) == (None, None)
    assert detect_formats(None, {"<think>": 1, "</think>": 2, "<tool_call>": 3}.get) == (QWEN, HERMES)
    assert detect_formats(None, {"<think>": 1, "<|python_tag|>": 0}.get) == (None, LLAMA)


def test_the_prompt_tells_whether_reasoning_is_open():
    assert QWEN.after_prompt("<|im_start|>assistant\n").starts_inside is False
    assert QWEN.after_prompt("<|im_start|>assistant\n<think>\n").starts_inside is True
    assert R1.after_prompt("<|im_start|>assistant\n<think>\n\n</think>\n\n").starts_inside is False
    assert R1.after_prompt("<|Assistant|>").starts_inside is True
