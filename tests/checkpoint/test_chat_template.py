"""Chat templates: equal to transformers' for honest ones, bounded and clear for the others."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from skyline.checkpoint.chat_template import ChatTemplate, ChatTemplateError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML_WITH_TOOLS = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' and not message.content.startswith('<tool_response>') %}
        {%- set ns.last_query = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query and reasoning %}
            {{- '<think>\\n' ~ reasoning.strip('\\n') ~ '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
            {%- set call = call.function if call.function else call %}
            {{- '<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {%- generation %}{{- '<|im_end|>\\n' }}{% endgeneration %}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' ~ content ~ '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

LLAMA3 = """
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- "<|eot_id|>" }}
{% for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- for call in message.tool_calls %}
            {{- call.function.name ~ "(" }}
            {%- for arg_name, arg_val in call.function.arguments | items %}
                {{- arg_name + '="' ~ arg_val ~ '"' }}{%- if not loop.last %}{{- ", " }}{%- endif %}
            {%- endfor %}{{- ")" }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
    {% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
    {% endif %}
"""

MISTRAL = """{%- macro arg(value) -%}[{{ value | upper | replace("A", "b") }}]{%- endmacro -%}
{%- set loop_messages = messages | rejectattr('role', 'equalto', 'system') | list %}
{%- set system = (messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n')) %}
{{- bos_token }}
{%- for message in loop_messages if message.role in ['user', 'assistant'] %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/...') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.last and system else '') + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token + "%s:%d" % ("n", loop.length) + "-" * 3 + arg("abc") }}
    {%- endif %}
{%- endfor %}
{{ {"a": [1, 2.5, none, true], "é<&>": ("x", "y")} }}{{ 7 // 2 ** 2 }}{{ "{} {:>4}".format("a", 1) }}{{ [1, 2]|sum }}"""

TOOLS = [{"type": "function", "function": {"name": "näh", "description": "<b> & 'q'", "parameters": {"b": 1, "a": []}}}]
CALL = {"function": {"name": "f", "arguments": {"x": 1, "y": "é"}}}


def reference(template: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=template, **SPECIAL, **kwargs)
    return rendered[0]


TEXTS = ["Hi", "  spaces \n", "", "Ünïcødé 🎉 <|im_end|>", "{{ 7*7 }}{% raw %}", "a\n\nb", "<think>\nx\n</think>\n\ny"]


def conversation(seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": rng.choice(TEXTS)})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": rng.choice(TEXTS)})
        messages.append({"role": "assistant", "content": rng.choice(TEXTS)})
        if rng.random() < 0.3:
            messages[-1]["reasoning_content"] = rng.choice(TEXTS)
    return messages[: rng.choice([-1, len(messages)])]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("template", [CHATML_WITH_TOOLS, LLAMA3, MISTRAL], ids=["chatml", "llama3", "mistral"])
def test_equal_to_transformers(template: str, seed: int) -> None:
    messages = conversation(seed)
    for tools in (None, TOOLS):
        for generation in (False, True):
            options: dict[str, Any] = {"tools": tools, "add_generation_prompt": generation, "enable_thinking": False}
            ours = ChatTemplate(template, SPECIAL).render(messages, **options)
            assert ours == reference(template, messages, **options)


@pytest.mark.parametrize("template", [CHATML_WITH_TOOLS, LLAMA3])
def test_tool_calls_equal_to_transformers(template: str) -> None:
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    ours = ChatTemplate(template, SPECIAL).render(messages, tools=TOOLS)
    assert ours == reference(template, messages, tools=TOOLS, add_generation_prompt=True)


@pytest.mark.parametrize("template", [CHATML_WITH_TOOLS, LLAMA3])
@pytest.mark.parametrize("content", ["The answer is", "trailing space ", "x\n"])
def test_continue_final_message_equal_to_transformers(template: str, content: str) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    ours = ChatTemplate(template, SPECIAL).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert ours == reference(template, messages, continue_final_message=True)
    assert ours.rstrip().endswith(content.strip())


def test_continue_final_message_errors() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ChatTemplateError, match="exclude each other"):
        template.render([{"role": "assistant", "content": "x"}], continue_final_message=True)
    for messages in ([], [{"role": "assistant"}], [{"role": "assistant", "content": None}]):
        with pytest.raises(ChatTemplateError, match="last message"):
            template.render(messages, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="cannot be continued"):
        ChatTemplate("nothing").render(
            [{"role": "assistant", "content": "x"}], add_generation_prompt=False, continue_final_message=True
        )


def test_text_parts_become_a_string() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render([{"role": "user", "content": parts}]) == "one\ntwo"
    with pytest.raises(ChatTemplateError, match="'image_url'"):
        template.render([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_template_refuses_the_conversation() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ChatTemplateError, match=r"^roles must alternate$"):
        template.render([{"role": "user", "content": "x"}])


def test_named_template_for_tools_and_date() -> None:
    template = ChatTemplate("plain {{ strftime_now('%Y') }}", tool_use_source="tools")
    assert template.render([]).startswith("plain 20")
    assert template.render([], tools=[]) == "tools"


def test_reserved_variables_and_odd_values() -> None:
    template = ChatTemplate("{{ x }}")
    assert template.render([], x=1) == "1"
    with pytest.raises(ChatTemplateError, match="messages cannot be set"):
        template.render([], **{"messages": []})
    with pytest.raises(ChatTemplateError, match="JSON values only, not object"):
        template.render([], x=object())
    with pytest.raises(ChatTemplateError, match="must be an object"):
        template.render(["hi"])  # type: ignore[list-item]
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ChatTemplateError, match="nested too deeply"):
        template.render([], x=deep)


def test_messages_are_not_changed() -> None:
    messages = [{"role": "assistant", "content": "x", "reasoning": "r"}]
    ChatTemplate("{{ messages }}").render(messages, add_generation_prompt=False)
    assert messages == [{"role": "assistant", "content": "x", "reasoning": "r"}]


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ x", "{% for %}", "{{ x|no_such_filter }}", "{{ " + "(" * 5000, "x" * 2**21]
)
def test_broken_source(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="chat template"):
        ChatTemplate(source)


NESTED = "{% set ns = namespace(x=[1]) %}{% for i in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
HOSTILE = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% set x %}{% for i in range(999) %}{% for j in range(999) %}" + "x" * 99 + "{% endfor %}{% endfor %}{% endset %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ messages * 10**8 }}",
    "{{ 10 ** 10 ** 10 ** 10 ** 10 }}",
    "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x|replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x.join(ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=['a'*1000]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    NESTED + "{{ ns.x }}",
    NESTED + "{{ ns.x|tojson }}",
    NESTED + "{{ ns.x == [ns.x] }}",
    "{% set ns = namespace(x={}) %}{% for i in range(64) %}{% set ns.x = {1: ns.x, 2: ns.x} %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=()) %}{% for i in range(64) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ '%-1000000000d'|format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ '{0}{0}{0}{0}'.format('a' * 30000000) }}",
    "{{ ('%s' * 100) % (('a' * 1000000,) * 100) }}",
    "{{ 'a'.ljust(10**9) }}{{ 'a'.center(10**9) }}",
    "{{ 'a'['zfill'](10**9) }}",
    "{{ ('\t' * 1000).expandtabs(10**9) }}",
    "{{ 'a'.encode().ljust(10**9) }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ ('a' * 1000000).replace('', 'a' * 1000000) }}",
    "{{ ('a' * 1000000).replace('a', 'a' * 1000000) }}",
    "{{ ('a' * 1000000).translate({97: 'a' * 1000000}) }}",
    "{{ ('a' * 1000000).join(range(99999)) }}",
    "{{ range(99999)|join('a' * 1000000) }}",
    "{{ range(99999)|map('string')|map('center', 1000000)|join }}",
    "{{ 'x'|center(10**9) }}",
    "{{ 'x'|indent(10**9, true) }}",
    "{{ ('x\n' * 100000)|indent('y' * 100000) }}",
    "{{ [1]|batch(10**9, 'x')|list }}",
    "{{ [1]|slice(10**9)|list }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ messages|tojson(separators=('a' * 1000000, 'b')) }}",
    "{{ 2.5|round(10**9, 'ceil') }}",
    "{{ ([[1]] * 1000000)|sum(start=[]) }}",
    "{{ lipsum(10**9) }}",
    "{% set big = range(99999)|list %}{{ big|select('in', big)|list|length }}{{ big|select('in', big[::-1])|list }}",
    "{% set big = (range(99999)|list * 9) %}{% for i in range(99999) if big|sort %}{% endfor %}",
    "{% for i in range(99999) %}{{ messages[0].content * 100 }}{% endfor %}",
    "{{ ''.__class__.__mro__ }}{{ messages.__class__.__bases__[0]() }}",
    "{{ messages.append(1) }}",
    "{{ ''.format.__globals__.x }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{% include 'x' %}",
    "{{ none() }}",
    "{{ 1 / 0 }}",
]  # fmt: skip


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_template(source: str) -> None:
    start = time.thread_time()
    with pytest.raises(ChatTemplateError) as caught:
        text = ChatTemplate(source, max_seconds=0.1).render([{"role": "user", "content": "hi" * 10000}])
        pytest.fail(f"rendered {len(text)} characters: {text[:100]}")
    assert time.thread_time() - start < 1.0
    assert len(str(caught.value)) < 500


def test_output_limit() -> None:
    template = ChatTemplate("{{ messages[0].content }}", max_characters=100)
    assert len(template.render([{"role": "user", "content": "x" * 100}])) == 100
    with pytest.raises(ChatTemplateError, match="more than 100 characters"):
        template.render([{"role": "user", "content": "x" * 101}])


def test_long_conversation_stays_within_limits() -> None:
    messages = [{"role": role, "content": "word " * 300} for role in ("user", "assistant")] * 500
    assert ChatTemplate(CHATML_WITH_TOOLS).render(messages) == reference(
        CHATML_WITH_TOOLS, messages, add_generation_prompt=True
    )


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="{}%-# \n'\"|.()[]abimx019~*+", max_size=60))
def test_any_source_renders_or_raises(source: str) -> None:
    try:
        text = ChatTemplate(source, max_seconds=0.5).render([{"role": "user", "content": "hi"}])
    except ChatTemplateError:
        return
    assert text == reference(source, [{"role": "user", "content": "hi"}], add_generation_prompt=True)
