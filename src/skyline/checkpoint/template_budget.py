"""What one rendering of a template may use: processor time, and characters of values it creates."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

CONTAINER_SLOT = 16  # characters that one element of a list or dict counts as, beside its own
MAX_INTEGER_BITS = 4096

current_budget: ContextVar[Budget] = ContextVar("current_budget")


class ChatTemplateError(ValueError):
    """A chat template is invalid, refuses the conversation, or goes over its limits. The message is for the client."""


class Budget:
    """Counts down `seconds` of this thread's processor time and `characters` of created text and containers.

    Every value a template creates is charged with its whole printed size, so no value can exist whose printing,
    comparing or hashing takes more than the budget, however often it refers to the same parts.
    """

    def __init__(self, seconds: float, characters: int) -> None:
        self.seconds = seconds
        self.characters = characters
        self._deadline = time.thread_time() + seconds

    def check_time(self) -> None:
        if time.thread_time() > self._deadline:
            raise ChatTemplateError(f"the chat template took longer than {self.seconds:g} s for this conversation")

    def foresee(self, characters: int) -> None:
        """Raise if a value of that size could not be paid for."""
        if characters > self.characters:
            raise ChatTemplateError("the chat template creates too much text for this conversation")

    def spend(self, characters: int) -> None:
        self.foresee(characters)
        self.characters -= characters

    def keep(self, value: Any) -> Any:
        """Charge for a value that has just been created, and return it."""
        if isinstance(value, (str, bytes)):
            self.spend(len(value))
        elif isinstance(value, int):
            if value.bit_length() > MAX_INTEGER_BITS:
                raise ChatTemplateError("the chat template computes a number that is too large")
        elif isinstance(value, (list, tuple, dict)):
            self.spend(self.weigh(value))
        return value

    def weigh(self, value: Any) -> int:
        """The printed size of plain data in characters, roughly; raises as soon as it exceeds the budget."""
        if isinstance(value, (str, bytes)):
            return len(value)
        if not isinstance(value, (list, tuple, dict)):
            return CONTAINER_SLOT
        size = 0
        pending: list[Iterable[Any]] = [_parts(value)]
        while pending:
            for part in pending.pop():
                size += CONTAINER_SLOT
                if isinstance(part, (str, bytes)):
                    size += len(part)
                elif isinstance(part, (list, tuple, dict)):
                    pending.append(_parts(part))
            self.check_time()
            self.foresee(size)
        return size


def _parts(value: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> Iterable[Any]:
    return (*value.keys(), *value.values()) if isinstance(value, dict) else value
