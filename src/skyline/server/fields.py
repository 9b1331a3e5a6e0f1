"""Building blocks of the request models: bounded values, and refusal of what is unknown or not supported.

Every number has a ceiling and every list a maximal length, so that validation itself stays cheap.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from skyline.engine.sampling_params import MAX_STOP_STRING_CHARS, MAX_TOKEN_LIST

MAX_TEXT_CHARS = 16_000_000
MAX_PROMPT_TOKENS = 4_000_000
MAX_JSON_DEPTH = 48
MAX_JSON_NODES = 50_000
MAX_TOKEN_ID = 2**31 - 1

NOT_SUPPORTED = "Not supported:"
ALL_FIELD_NAMES: set[str] = set()  # of every request model; tells fields from pydantic's names of union members


def unsupported(why: str) -> Any:
    """A field of the API that is accepted only with a value that changes nothing."""
    return Field(default=None, description=f"{NOT_SUPPORTED} {why}")


class Body(BaseModel):
    """Strict types (no "1" for 1), and unknown names are errors that name the nearest known field."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
    known: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        cls.known = frozenset(field.alias or name for name, field in cls.model_fields.items())
        ALL_FIELD_NAMES.update(cls.known)

    @model_validator(mode="before")
    @classmethod
    def _names(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data:
                if name not in cls.known:
                    raise PydanticCustomError("unknown_field", "{message}", {"message": cls._unknown(name)})
        return data

    @classmethod
    def _unknown(cls, name: str) -> str:
        shown = name[:100]
        near = difflib.get_close_matches(shown.lower(), sorted(cls.known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "leave it out"
        return f"unknown field {shown!r}; {hint}"


def _bounded(value: Any) -> Any:
    """Level by level, so that no depth of nesting needs the interpreter's stack."""
    level: list[Any] = [value]
    nodes = 0
    for _ in range(MAX_JSON_DEPTH):
        nodes += len(level)
        if nodes > MAX_JSON_NODES:
            raise ValueError(f"has more than {MAX_JSON_NODES} values")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return value
        level = below
    raise ValueError(f"is nested more than {MAX_JSON_DEPTH} levels deep")


JsonObject = Annotated[dict[str, Any], AfterValidator(_bounded)]
Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
ShortText = Annotated[str, Field(max_length=512)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_STRING_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_TOKEN_LIST)]
TokenCount = Annotated[int, Field(ge=1, le=2**31 - 1)]
