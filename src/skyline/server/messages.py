"""Chat messages and tools as clients send them, and as chat templates want them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from skyline.server.fields import Body, JsonObject, ShortText, Text, unsupported

FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]

_CLIENTS_OWN = "Not read; the openai client adds it to the messages that its parse() returns"


class ContentPart(Body):
    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("type"), str) and data["type"] != "text":
            kind = data["type"][:40]
            message = f"this model takes text only; a content part of type {kind!r} cannot be used"
            raise PydanticCustomError("text_only", "{message}", {"message": message})
        return data


class CalledFunction(Body):
    name: Annotated[str, Field(min_length=1, max_length=512)]
    arguments: Text = ""
    parsed_arguments: Any = Field(None, description=_CLIENTS_OWN)


class MessageToolCall(Body):
    id: ShortText | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None


class ChatMessage(Body):
    """A turn of the conversation. Messages that this API returned are accepted as they are."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[ContentPart], Field(fail_fast=True, max_length=4096)] | None = None
    name: ShortText | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(fail_fast=True, max_length=512)] | None = None
    tool_call_id: ShortText | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    refusal: Text | None = None
    parsed: Any = Field(None, description=_CLIENTS_OWN)
    annotations: Annotated[list[Any], Field(max_length=0)] | None = unsupported("this model takes text only")
    audio: None = unsupported("this model takes text only")
    function_call: None = unsupported("use tool_calls")

    @model_validator(mode="after")
    def _complete(self) -> ChatMessage:
        if self.role != "assistant":
            if self.content is None:
                raise ValueError(f"content is missing; a message of role {self.role!r} needs it")
            if self.tool_calls:
                raise ValueError("tool_calls go with the role 'assistant'")
        return self

    def for_template(self) -> dict[str, Any]:
        """The names and forms that the templates of checkpoints expect."""
        # Templates know no role "developer", which is OpenAI's newer name of "system".
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        if content is None and self.refusal is not None:
            content = self.refusal
        message["content"] = content if content is not None or self.tool_calls else ""
        for name, value in (("name", self.name), ("tool_call_id", self.tool_call_id)):
            if value is not None:
                message[name] = value
        reasoning = self.reasoning_content if self.reasoning_content is not None else self.reasoning
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        if self.tool_calls:
            message["tool_calls"] = [_call_for_template(call) for call in self.tool_calls]
        return message


def _call_for_template(call: MessageToolCall) -> dict[str, Any]:
    arguments: Any = call.function.arguments
    try:
        # Templates write arguments with `tojson`, so they want the object and not its text.
        parsed = json.loads(arguments) if arguments else {}
        arguments = parsed if isinstance(parsed, dict) else arguments
    except (ValueError, RecursionError):
        pass  # what a model once wrote need not be JSON; the template gets it as text
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


class FunctionSpec(Body):
    name: FunctionName
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = Field(None, description="Arguments always obey the schema where tool_choice demands a call")


class Tool(Body):
    type: Literal["function"]
    function: FunctionSpec

    def for_template(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class NamedFunction(Body):
    name: FunctionName


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction
