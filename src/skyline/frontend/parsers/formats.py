"""How models mark reasoning and tool calls in their text, as data.

A new model family whose calls are built like one of the three bodies below needs an entry here and no code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ReasoningFormat:
    """Reasoning stands between `start` and `end`, at the beginning of the output.

    If `starts_inside`, the prompt already holds `start`: the output begins with reasoning, and a `start` that the model
    repeats is dropped. Otherwise reasoning is optional. If `anywhere`, the model may also reason later, between parts
    of its answer. Both markers must be there.

    `harmony`: the output is a list of messages with headers, which HarmonyParser reads; the markers are two of those
    that it looks for.
    """

    name: str
    start: str
    end: str
    starts_inside: bool = False
    anywhere: bool = False
    harmony: bool = False

    def __post_init__(self) -> None:
        if not self.start or not self.end:
            raise ValueError(f"reasoning format {self.name}: the start and end markers must not be empty")

    @property
    def markers(self) -> tuple[str, ...]:
        """What the parser must see of the text, where it is a special token."""
        return self.start, self.end

    def after_prompt(self, prompt: str) -> ReasoningFormat:
        """The same format, with `starts_inside` as the rendered prompt says if it ends with one of the markers."""
        tail = prompt.rstrip()
        if self.harmony:
            return self
        if tail.endswith(self.start):
            return replace(self, starts_inside=True)
        if tail.endswith(self.end):
            return replace(self, starts_inside=False)
        return self


@dataclass(frozen=True)
class JsonCall:
    """A JSON object; the members `name_key` and `arguments_keys` matter.

    Without arguments, a call counts if `arguments_optional`. `list_start` may stand before an object.
    """

    name_key: str = "name"
    arguments_keys: tuple[str, ...] = ("arguments", "parameters")  # the first of them that comes counts
    arguments_optional: bool = True
    list_start: str = ""


@dataclass(frozen=True)
class NamedCall:
    """`name_start`, the name, `name_end` and a JSON object with the arguments.

    Models forget `name_end`. After the name, `id_start` and an id may come; the id is dropped.
    """

    name_end: str
    name_start: str = ""
    id_start: str = ""


@dataclass(frozen=True)
class TaggedCall:
    """The name between its markers, then any number of parameters, each a key and a value between theirs, then `end`.

    Without `name_end`, the name goes on to white space or the next marker. A value's text is a string, or JSON, as the
    function's schema says; if `string_flag`, as the word between `key_end` and `value_start` says, which must be true
    (it is a string) or false. If `trim_newline`, one newline after and before the value's markers is no part of it.
    """

    name_start: str
    name_end: str
    key_start: str
    key_end: str
    value_start: str
    value_end: str
    end: str
    string_flag: bool = False
    trim_newline: bool = False

    def __post_init__(self) -> None:
        if not (self.key_start and self.key_end and self.value_end and self.end):
            raise ValueError("the markers of keys, and those that end values and calls, must not be empty")
        if self.string_flag and not self.value_start:
            raise ValueError("a string flag needs a value_start marker that ends it")


CallBody = JsonCall | NamedCall | TaggedCall


@dataclass(frozen=True)
class ToolFormat:
    """`start`, one or more calls that look like `body`, and `end`.

    In a block, another call follows where its first characters, `again`, come. Calls may be followed by `call_ends`,
    and separated by white space or `separator`. An empty `end` means that nothing closes a block. `bare`: at the
    beginning of the message a JSON object may also come without `start`; an empty `start`, that only such are calls.

    `short_ids`: the family's templates refuse ids that are not nine letters and digits. `stop_tokens` end the output,
    whether or not the checkpoint says so. `harmony`: as in ReasoningFormat.
    """

    name: str
    start: str
    end: str = ""
    body: CallBody = JsonCall()
    bare: bool = False
    again: str = ""
    separator: str = ""  # one character, if any
    call_ends: tuple[str, ...] = ()
    short_ids: bool = False
    stop_tokens: tuple[str, ...] = ()
    harmony: bool = False

    def __post_init__(self) -> None:
        if not self.start and not self.bare:
            raise ValueError(f"tool format {self.name}: without a start marker, calls must be bare")
        if self.bare and not isinstance(self.body, JsonCall):
            raise ValueError(f"tool format {self.name}: only JSON objects can be bare calls")
        if len(self.separator) > 1:
            raise ValueError(f"tool format {self.name}: the separator must be one character, not {self.separator!r}")

    @property
    def markers(self) -> tuple[str, ...]:
        """What the parser must see of the text, where it is a special token."""
        return tuple(marker for marker in (self.start, self.end) if marker)


REASONING_FORMATS = {
    format.name: format
    for format in (
        ReasoningFormat("qwen3", start="<think>", end="</think>"),  # also GLM 4.5 and 4.6, DeepSeek V3.1
        ReasoningFormat("deepseek_r1", start="<think>", end="</think>", starts_inside=True),
        ReasoningFormat("minimax_m2", start="<think>", end="</think>", starts_inside=True, anywhere=True),
        ReasoningFormat("mistral", start="[THINK]", end="[/THINK]"),  # Magistral, Ministral 3
        ReasoningFormat("gpt_oss", start="<|channel|>", end="<|end|>", harmony=True),
    )
}


def _invoke(prefix: str, *, string_flag: bool = False) -> TaggedCall:
    """`<invoke name="..."><parameter name="...">...</parameter></invoke>`, each tag's name with a prefix."""
    return TaggedCall(
        name_start=f'<{prefix}invoke name="',
        name_end='">',
        key_start=f'<{prefix}parameter name="',
        key_end='" string="' if string_flag else '"',
        value_start='">' if string_flag else ">",
        value_end=f"</{prefix}parameter>",
        end=f"</{prefix}invoke>",
        string_flag=string_flag,
    )


_DSML = "｜DSML｜"

TOOL_FORMATS = {
    format.name: format
    for format in (
        # https://github.com/NousResearch/Hermes-Function-Calling, also Qwen2.5 and Qwen3
        ToolFormat("hermes", start="<tool_call>", end="</tool_call>"),
        # https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/#json-based-tool-calling
        # A plain JSON answer is common here, and may well have a "name": without parameters it is not a call.
        ToolFormat(
            "llama3_json",
            start="<|python_tag|>",
            body=JsonCall(arguments_optional=False),
            bare=True,
            again="{",
            separator=";",
        ),
        # The chat templates of Qwen/Qwen3-Coder-480B-A35B-Instruct and Qwen/Qwen3.5-397B-A17B
        ToolFormat(
            "qwen3_coder",
            start="<tool_call>",
            end="</tool_call>",
            body=TaggedCall(
                name_start="<function=",
                name_end=">",
                key_start="<parameter=",
                key_end=">",
                value_start="",
                value_end="</parameter>",
                end="</function>",
                trim_newline=True,
            ),
            again="<function=",
        ),
        # The chat templates of zai-org/GLM-4.5 and GLM-4.6
        ToolFormat(
            "glm45",
            start="<tool_call>",
            body=TaggedCall(
                name_start="",
                name_end="",
                key_start="<arg_key>",
                key_end="</arg_key>",
                value_start="<arg_value>",
                value_end="</arg_value>",
                end="</tool_call>",
            ),
        ),
        # https://huggingface.co/MiniMaxAI/MiniMax-M2/blob/main/docs/tool_calling_guide.md
        ToolFormat(
            "minimax_m2",
            start="<minimax:tool_call>",
            end="</minimax:tool_call>",
            body=_invoke(""),
            again="<invoke",
        ),
        # https://huggingface.co/deepseek-ai/DeepSeek-V3.2/tree/main/encoding
        ToolFormat(
            "deepseek_v32",
            start=f"<{_DSML}function_calls>",
            end=f"</{_DSML}function_calls>",
            body=_invoke(_DSML, string_flag=True),
            again=f"<{_DSML}invoke",
        ),
        # The chat template of deepseek-ai/DeepSeek-V3.1
        ToolFormat(
            "deepseek_v31",
            start="<｜tool▁calls▁begin｜>",
            end="<｜tool▁calls▁end｜>",
            body=NamedCall(name_start="<｜tool▁call▁begin｜>", name_end="<｜tool▁sep｜>"),
            again="<｜tool▁call▁begin｜>",
            call_ends=("<｜tool▁call▁end｜>",),
        ),
        # The chat templates of deepseek-ai/DeepSeek-V3 and DeepSeek-R1
        ToolFormat(
            "deepseek_v3",
            start="<｜tool▁calls▁begin｜>",
            end="<｜tool▁calls▁end｜>",
            body=NamedCall(name_start="<｜tool▁call▁begin｜>function<｜tool▁sep｜>", name_end="```json"),
            again="<｜tool▁call▁begin｜>",
            call_ends=("```", "<｜tool▁call▁end｜>"),
        ),
        # https://github.com/mistralai/mistral-common: tokenizers from version 11 on ...
        ToolFormat(
            "mistral",
            start="[TOOL_CALLS]",
            body=NamedCall(name_end="[ARGS]", id_start="[CALL_ID]"),
            short_ids=True,
        ),
        # ... and before it
        ToolFormat(
            "mistral_v3",
            start="[TOOL_CALLS]",
            end="]",
            body=JsonCall(list_start="["),
            again="{",
            separator=",",
            short_ids=True,
        ),
        # https://cookbook.openai.com/articles/openai-harmony
        ToolFormat(
            "gpt_oss", start="<|channel|>", end="<|call|>", stop_tokens=("<|call|>", "<|return|>"), harmony=True
        ),
    )
}
