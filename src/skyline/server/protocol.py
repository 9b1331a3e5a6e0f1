"""What the generation routes accept: the OpenAI API's fields and vLLM's extensions, under the same names.

https://platform.openai.com/docs/api-reference and https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html.
A field that this server cannot honour is listed with the only values that it need not honour.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, StringConstraints, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from skyline.engine.sampling_params import (
    MAX_BAD_WORDS,
    MAX_GRAMMAR_CHARS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_STRINGS,
    MAX_TOKEN_LIST,
    SEED_RANGE,
    GrammarSpec,
)
from skyline.server.fields import (
    MAX_PROMPT_TOKENS,
    MAX_TEXT_CHARS,
    MAX_TOKEN_ID,
    Body,
    JsonObject,
    ShortText,
    StopText,
    TokenCount,
    TokenIds,
    unsupported,
)
from skyline.server.messages import ChatMessage, NamedTool, Tool

MAX_PROMPTS = 4096
MAX_MESSAGES = 16_384
MAX_TOOLS = 512

BiasKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
BiasValue = Annotated[float, Field(ge=-100.0, le=100.0)]
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=10_000)]], Field(fail_fast=True, min_length=1, max_length=1000)
]


def _few(bias: Any) -> Any:
    # pydantic judges every entry of a dictionary, and keeps an error for each, before it looks at the length.
    if isinstance(bias, dict) and len(bias) > MAX_TOKEN_LIST:
        raise PydanticCustomError("value_error", f"has {len(bias)} entries; at most {MAX_TOKEN_LIST} are allowed")
    return bias


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = unsupported("chunks are never padded")


class JsonSchemaFormat(Body):
    name: ShortText | None = None
    description: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError('type "json_schema" needs json_schema with a schema')
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError(f'json_schema goes with type "json_schema", not "{self.type}"')
        return self


class StructuredOutputs(Body):
    """Exactly one of these."""

    json_: JsonObject | GrammarText | None = Field(None, alias="json")
    regex: GrammarText | None = None
    choice: Choices | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = [name for name in ("json_", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if len(given) + bool(self.json_object) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar and json_object")
        return self


class GenerationRequest(Body):
    """The fields that chat and plain completions share."""

    model: ShortText | None = Field(None, description="A name that /v1/models lists; may be left out")
    max_tokens: TokenCount | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    seed: Annotated[int, Field(ge=-SEED_RANGE, le=SEED_RANGE - 1)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: Annotated[dict[BiasKey, BiasValue], BeforeValidator(_few), Field(max_length=MAX_TOKEN_LIST)] | None = (
        None
    )
    allowed_token_ids: (
        Annotated[
            list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]],
            Field(fail_fast=True, min_length=1, max_length=1_000_000),
        ]
        | None
    ) = None
    bad_words: Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_BAD_WORDS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject | GrammarText | None = None
    guided_regex: GrammarText | None = None
    guided_choice: Choices | None = None
    guided_grammar: GrammarText | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    user: str | None = None
    use_beam_search: Literal[False] | None = unsupported("there is no beam search")
    logits_processors: None = unsupported("code from a client never runs")
    truncate_prompt_tokens: None = unsupported("shorten the prompt yourself")
    return_token_ids: Literal[False] | None = unsupported("use /tokenize for ids")
    return_tokens_as_token_ids: Literal[False] | None = unsupported("use /tokenize for ids")
    # What clients of other engines send by habit, with the values that change nothing.
    length_penalty: Literal[1] | None = unsupported("it belongs to beam search, which there is none of")
    early_stopping: Literal[False] | None = unsupported("it belongs to beam search, which there is none of")
    spaces_between_special_tokens: Literal[True] | None = unsupported("the text is what the tokenizer decodes")
    include_reasoning: Literal[True] | None = unsupported("leave the field reasoning_content unread")
    cache_prompt: Literal[True] | None = unsupported("start the server with --no-prefix-caching")

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream=true; leave it out or set stream")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs needs stream=false")
        self.grammar()
        return self

    def grammar(self) -> GrammarSpec | None:
        """What the text must obey. Raises ValueError if it is asked for in more than one way."""
        found: list[GrammarSpec] = []
        if self.response_format is not None and self.response_format.type != "text":
            schema = self.response_format.json_schema
            found.append(GrammarSpec("json_object") if schema is None else _json_schema(schema.schema_))
        structured = self.structured_outputs
        if structured is not None and structured.json_object:
            found.append(GrammarSpec("json_object"))
        sources = [(self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)]
        if structured is not None:
            sources.append((structured.json_, structured.regex, structured.choice, structured.grammar))
        for schema_text, regex, choice, lark in sources:
            if schema_text is not None:
                found.append(_json_schema(schema_text))
            if regex is not None:
                found.append(GrammarSpec("regex", regex))
            if choice is not None:
                found.append(GrammarSpec("choice", json.dumps(choice, ensure_ascii=False)))
            if lark is not None:
                found.append(GrammarSpec("lark", lark))
        if len(found) > 1:
            raise ValueError("give only one of response_format, structured_outputs and guided_*")
        return found[0] if found else None

    def grammar_field(self) -> str:
        """The field that asks for structured output, for error messages."""
        names = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
        return next((name for name in names if getattr(self, name) is not None), "response_format")


def _json_schema(schema: dict[str, Any] | str | None) -> GrammarSpec:
    return GrammarSpec("json_schema", schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False))


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: TokenCount | None = Field(None, description="Another name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    metadata: JsonObject | None = Field(None, description="Accepted; it serves stored completions only")
    safety_identifier: str | None = None
    prompt_cache_key: str | None = Field(None, description="Accepted; prefixes are found without it. See cache_salt")
    store: Literal[False] | None = unsupported("nothing is stored")
    service_tier: Literal["auto", "default"] | None = unsupported("there is one tier; use priority")
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True, max_length=8)] | None = unsupported(
        "this model answers with text only"
    )
    audio: None = unsupported("this model answers with text only")
    prediction: None = unsupported("predicted outputs are not used")
    web_search_options: None = unsupported("there is no web search")
    verbosity: Literal["medium"] | None = unsupported("ask for it in the messages")
    functions: None = unsupported("use tools")
    function_call: None = unsupported("use tool_choice")
    echo: Literal[False] | None = unsupported("use /v1/completions")
    chat_template: None = unsupported("only the operator sets the chat template")
    documents: None = unsupported("put them into the messages")
    mm_processor_kwargs: None = unsupported("this model takes text only")
    prompt_cache_retention: None = unsupported("the prefix cache keeps what fits")

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and self.top_logprobs > 0 and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same limit; give one of them")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        names = [tool.function.name for tool in self.tools or []]
        if len(names) != len(set(names)):
            raise ValueError("tools: two tools have the same name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name[:64]!r}, which is not among tools")
        if self.tool_choice == "required" and not names:
            raise ValueError('tool_choice "required" needs tools')
        return self


Prompts = list[str | list[int]]


def _prompts(value: Any) -> Prompts:
    if isinstance(value, str):
        return [_text(value)]
    if isinstance(value, list) and value:
        if _token_ids(value):
            return [value]
        if len(value) > MAX_PROMPTS:
            raise PydanticCustomError("value_error", f"at most {MAX_PROMPTS} prompts are taken at once")
        if all(type(item) is str for item in value):
            return [_text(item) for item in value]
        if all(type(item) is list and item and _token_ids(item) for item in value):
            return value
    raise PydanticCustomError(
        "value_error",
        "must be a string, a list of strings, a list of token ids or a list of lists of token ids, and not empty",
    )


def _text(text: str) -> str:
    if len(text) > MAX_TEXT_CHARS:
        raise PydanticCustomError("value_error", f"a prompt may have at most {MAX_TEXT_CHARS} characters")
    return text


def _token_ids(values: list[Any]) -> bool:
    if len(values) > MAX_PROMPT_TOKENS or set(map(type, values)) != {int}:
        return False
    return bool(min(values) >= 0 and max(values) <= MAX_TOKEN_ID)


_IDS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": {"type": "string"}},
        _IDS_SCHEMA,
        {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _IDS_SCHEMA},
    ]
}


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    prompt: Annotated[Prompts, PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(None, description="16; 0 only with echo")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = Field(None, description="Only the value of n")
    add_special_tokens: bool | None = None
    suffix: Literal[""] | None = unsupported("there is no fill-in-the-middle")

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is supported only with the value of n; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, or 0 together with echo")
        return self
