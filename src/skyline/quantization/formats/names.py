"""Matching of module names with the lists in a checkpoint's configuration, in time that no list can blow up.

The lists are a stranger's. Python's `re` backtracks, so that "(a+)+$" takes time exponential in a name's length: "re:"
patterns of compressed-tensors are run by pydantic-core's engine instead (Rust's regex crate, through pydantic), which
takes time linear in the name and bounds the size of what it compiles. It has no look-around; a pattern that needs it
is refused when it is first needed. Wildcards go to `fnmatch`, whose stars never give back what they took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Annotated, Any

from skyline.checkpoint.errors import CheckpointError

MAX_PATTERN = 1000
MAX_PATTERNS = 100_000
REGEX = "re:"


def pattern_list(values: Any, where: str) -> tuple[str, ...]:
    """A list of strings from a configuration; null is an empty one. Raises CheckpointError for anything else."""
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{where} must be a list of strings")
    if len(values) > MAX_PATTERNS or any(len(value) > MAX_PATTERN for value in values):
        raise CheckpointError(
            f"{where} must hold at most {MAX_PATTERNS} entries of at most {MAX_PATTERN} characters; shorten it"
        )
    return tuple(values)


def matches_target(module: str, target: str) -> bool:
    """compressed-tensors: the name itself, or a regular expression from the name's start after "re:"."""
    return _regex(target.removeprefix(REGEX))(module) if target.startswith(REGEX) else module == target


def is_ignored(module: str, entries: Iterable[str]) -> bool:
    """Whether an ignore list names a module, in any of the ways of writing such lists.

    compressed-tensors' "re:" patterns, ModelOpt's wildcards, or whole parts of the dotted name (transformers:
    "lm_head", "model.layers.3.mlp.gate", "mlp.gate").
    """
    dotted = f".{module}."
    for entry in entries:
        if entry.startswith(REGEX):
            found = matches_target(module, entry)
        elif any(character in entry for character in "*?["):
            found = fnmatchcase(module, entry)
        else:
            found = f".{entry}." in dotted
        if found:
            return True
    return False


@lru_cache(maxsize=4096)
def _regex(pattern: str) -> Callable[[str], bool]:
    # Here, because few checkpoints need it, and importing it takes a tenth of a second.
    from pydantic import StringConstraints, TypeAdapter, ValidationError
    from pydantic_core import SchemaError

    try:
        adapter = TypeAdapter(Annotated[str, StringConstraints(pattern=f"^(?:{pattern})")])
    except SchemaError as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(
            f"quantization_config: the regular expression {pattern!r} cannot be used ({reason}); "
            "write it without look-around, or list the modules' names"
        ) from error

    def matches(name: str) -> bool:
        try:
            adapter.validate_python(name)
        except ValidationError:
            return False
        return True

    return matches
