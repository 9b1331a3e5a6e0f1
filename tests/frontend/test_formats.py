from __future__ import annotations

import pytest

from skyline.frontend.parsers import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    JsonCall,
    NamedCall,
    TaggedCall,
    ToolFormat,
    detect_formats,
)
from tests.frontend.parsing import FAMILIES

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
QWEN35 = """{{- '<tool_call>\\n<function=' + tool_call.name + '>\\n' }}{{- '<parameter=' + args_name + '>\\n' }}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is
false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- else %}{{- '<think>\\n' }}{%- endif %}{%- endif %}"""
GLM45 = """{{ '\\n<tool_call>' + tc.name }}{% set _args = tc.arguments %}{% for k, v in _args.items() %}
<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{%- set content = content.split('</think>')[-1] %}{%- if add_generation_prompt -%}
<|assistant|>{{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- endif -%}"""
MINIMAX = """{%- set toolcall_begin_token = '<minimax:tool_call>' -%}{{- '<invoke name="' + tool_call.name + '">\\n' }}
{%- set reasoning_content = content.split('</think>')[0] %}
{%- if add_generation_prompt -%}{{- ']~b]ai' ~ '\\n' ~ '<think>' ~ '\\n' }}{%- endif -%}"""
DEEPSEEK_V3 = """{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' +
tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' +
'<｜tool▁call▁end｜>'}}
{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}{% endif %}"""
DEEPSEEK_R1_TOOLS = DEEPSEEK_V3.replace("'<｜Assistant｜>'", "'<｜Assistant｜><think>\\\\n'") + "{# </think> #}"
DEEPSEEK_V31 = """{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'+ tool['function']['name'] + '<｜tool▁sep｜>' +
tool['function']['arguments'] + '<｜tool▁call▁end｜>'}}
{%- if add_generation_prompt and ns.is_last_user and not ns.is_tool %}{{'<｜Assistant｜>'}}
{%- if not thinking %}{{'</think>'}}{%- else %}{{'<think>'}}{%- endif %}{% endif %}"""
DEEPSEEK_V32 = """{%- set dsml_token = '｜DSML｜' %}{{ '<' ~ dsml_token ~ 'function_calls>' }}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' ~ ('<think>' if thinking else '</think>') }}{%- endif %}"""
MISTRAL_V3 = """{{- "[TOOL_CALLS] [" }}{{- '{"name": "' + tool_call.function.name + '", "arguments": ' }}"""
MISTRAL = """{{- '[TOOL_CALLS]' + tool['function']['name'] + '[ARGS]' + arguments }}"""
MAGISTRAL = MISTRAL + """{{- '[THINK]' + block['thinking'] + '[/THINK]' }}"""
GPT_OSS = """{{- "<|start|>assistant to=functions." + tool_call.name + "<|channel|>commentary json<|message|>" }}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"""
GEMMA3 = """{{ bos_token }}{{ '<start_of_turn>' + role + '\\n' }}{{ message['content'] | trim }}{{ '<end_of_turn>\\n' }}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\\n'}}{%- endif -%}"""
PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}{% endif %}"


@pytest.mark.parametrize(
    ("template", "reasoning", "tools"),
    [
        (QWEN25, None, HERMES),
        (QWEN3, QWEN, HERMES),
        (QWEN3_THINKING, R1, HERMES),
        (QWEN3_CODER, None, TOOL_FORMATS["qwen3_coder"]),
        (QWEN35, R1, TOOL_FORMATS["qwen3_coder"]),
        (GLM45, QWEN, TOOL_FORMATS["glm45"]),
        (MINIMAX, REASONING_FORMATS["minimax_m2"], TOOL_FORMATS["minimax_m2"]),
        (DEEPSEEK_V3, None, TOOL_FORMATS["deepseek_v3"]),
        (DEEPSEEK_R1_TOOLS, R1, TOOL_FORMATS["deepseek_v3"]),
        (DEEPSEEK_V31, QWEN, TOOL_FORMATS["deepseek_v31"]),
        (DEEPSEEK_V32, QWEN, TOOL_FORMATS["deepseek_v32"]),
        (MISTRAL_V3, None, TOOL_FORMATS["mistral_v3"]),
        (MISTRAL, None, TOOL_FORMATS["mistral"]),
        (MAGISTRAL, REASONING_FORMATS["mistral"], TOOL_FORMATS["mistral"]),
        (GPT_OSS, REASONING_FORMATS["gpt_oss"], TOOL_FORMATS["gpt_oss"]),
        (GEMMA3, None, None),
        (DEEPSEEK_R1, R1, None),
        (LLAMA31, None, LLAMA),
        (PLAIN, None, None),
        ("", None, None),
    ],
)
def test_formats_from_the_template(template, reasoning, tools):
    assert detect_formats(template, lambda token: 1) == (reasoning, tools)


@pytest.mark.parametrize(
    ("tokens", "reasoning", "tools"),
    [
        (("<|channel|>", "<|message|>", "<|call|>", "<|end|>"), "gpt_oss", "gpt_oss"),
        (("<minimax:tool_call>", "<think>", "</think>"), "qwen3", "minimax_m2"),
        (("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"), "mistral", "mistral"),
        (("[TOOL_CALLS]",), None, "mistral_v3"),
        (("<tool_call>", "<arg_key>", "<think>", "</think>"), "qwen3", "glm45"),
        (("<｜tool▁calls▁begin｜>",), None, None),  # V3 or V3.1?
    ],
)
def test_formats_from_the_vocabulary_of_a_family(tokens, reasoning, tools):
    expected = REASONING_FORMATS.get(reasoning), TOOL_FORMATS.get(tools)
    assert detect_formats(None, dict.fromkeys(tokens, 5).get) == expected


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
    v31 = "<｜Assistant｜>"
    assert QWEN.after_prompt(v31 + "<think>").starts_inside is True
    assert QWEN.after_prompt(v31 + "</think>").starts_inside is False
    harmony = REASONING_FORMATS["gpt_oss"]
    assert harmony.after_prompt("<|end|><|start|>assistant<|channel|>") is harmony


def test_every_format_is_tried_on_its_family():
    assert {family.tools.name for family in FAMILIES} | {"llama3_json"} == set(TOOL_FORMATS)
    assert {family.reasoning.name for family in FAMILIES} == set(REASONING_FORMATS)


def test_formats_that_cannot_be():
    with pytest.raises(ValueError, match="bare"):
        ToolFormat("x", start="<", body=NamedCall(name_end="|"), bare=True)
    with pytest.raises(ValueError, match="must not be empty"):
        TaggedCall("", "", key_start="<k>", key_end="</k>", value_start="", value_end="</v>", end="")
    with pytest.raises(ValueError, match="flag"):
        TaggedCall("", "", key_start="k", key_end="k", value_start="", value_end="v", end="e", string_flag=True)
    assert ToolFormat("x", start="", bare=True, body=JsonCall()).markers == ()
