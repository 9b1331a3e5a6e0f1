"""How large the results of jinja2's and Python's multiplying operations get, checked before they are computed.

Everything else is at most a small multiple of its arguments, which have already been paid for.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from skyline.checkpoint.template_budget import CONTAINER_SLOT, MAX_INTEGER_BITS, Budget, ChatTemplateError

# Takes the positional and keyword arguments; returns the positional ones to go on with.
Check = Callable[[Budget, tuple[Any, ...], Mapping[str, Any]], tuple[Any, ...]]

_WIDE = re.compile(r"\d{4,}|\*")  # a field width or precision of thousands, or one taken from the arguments
_MAX_DIGITS = 100
_MAX_SEPARATOR = 16


def before_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Check `left operator right`, one of + * ** %."""
    budget.check_time()
    if operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            _bits(left.bit_length() + right.bit_length())
        elif isinstance(right, int):
            budget.foresee(budget.weigh(left) * right)
        elif isinstance(left, int):
            budget.foresee(budget.weigh(right) * left)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _bits(left.bit_length() * abs(right))
    elif operator == "%" and isinstance(left, (str, bytes)):
        _percent(budget, left, right)


def before_method(budget: Budget, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Check a call of a string's, bytes' or integer's own method; other functions pass."""
    owner = getattr(function, "__self__", None)
    if not isinstance(owner, (str, bytes, int)):
        return args
    name = getattr(function, "__name__", "")
    if isinstance(owner, int):
        for value in (*args, *kwargs.values()):
            _bits(value if isinstance(value, int) else 0)
    elif name in ("ljust", "rjust", "center", "zfill"):
        budget.foresee(_integer(args[:1]))
    elif name == "expandtabs":
        tab = "\t" if isinstance(owner, str) else b"\t"
        budget.foresee(owner.count(tab) * _integer((*args, *kwargs.values())))  # type: ignore[arg-type]
    elif name == "replace":
        _replace(budget, owner, *args[:2])
    elif name == "join" and args:
        return (_join(budget, args[0], owner), *args[1:])
    elif name == "translate":
        raise ChatTemplateError("the chat template calls str.translate, which is not available")
    return args


def before_format(budget: Budget, template: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check `template.format(*args, **kwargs)` or `template.format_map(*args)`."""
    fields = 0
    for _, name, spec, _ in string.Formatter().parse(template):
        fields += name is not None
        if spec and (_WIDE.search(spec) or "{" in spec):
            raise ChatTemplateError(f"the chat template formats a field with {spec[:80]!r}, which is not available")
    budget.foresee(len(template) + 1000 * fields + fields * sum(map(budget.weigh, (*args, *kwargs.values()))))


def _percent(budget: Budget, template: str | bytes, values: Any) -> None:
    text = template if isinstance(template, str) else template.decode("latin-1")
    for field in text.split("%")[1:]:
        if _WIDE.match(field.lstrip("#0- +.")) or "*" in field[:8]:
            raise ChatTemplateError("the chat template formats a field of a width that is not available")
    fields = text.count("%")
    budget.foresee(len(text) + 1000 * fields + fields * budget.weigh(values))


def _replace(budget: Budget, text: Any, old: Any = "", new: Any = "") -> None:
    text, old, new = (value if isinstance(value, (str, bytes)) else str(value) for value in (text, old, new))
    if type(text) is type(old) is type(new):
        budget.foresee(len(text) + text.count(old) * len(new))


def _join(budget: Budget, values: Any, separator: Any) -> list[Any]:
    elements = list(values)  # a generator's elements are charged one by one as it makes them
    budget.foresee(budget.weigh(elements) + len(elements) * budget.weigh(separator))
    return elements


def _filter_replace(budget: Budget, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    _replace(budget, args[0], _argument(args, kwargs, 1, "old", ""), _argument(args, kwargs, 2, "new", ""))
    return args


def _filter_join(budget: Budget, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    return (_join(budget, args[0], _argument(args, kwargs, 1, "d", "")), *args[1:])


def _filter_indent(budget: Budget, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    width = _argument(args, kwargs, 1, "width", 4)
    lines = str(args[0]).count("\n") + 1
    budget.foresee(lines * (len(width) if isinstance(width, str) else _integer((width,))))
    return args


def _filter_format(budget: Budget, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    _percent(budget, str(args[0]), [*args[1:], *kwargs.values()])
    return args


def _filter_width(budget: Budget, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    for value in (*args[1:], *kwargs.values()):
        budget.foresee(CONTAINER_SLOT * _integer((value,)))
    return args


def _filter_round(budget: Budget, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    if abs(_integer((_argument(args, kwargs, 1, "precision", 0),))) > _MAX_DIGITS:
        raise ChatTemplateError(f"the chat template rounds to more than {_MAX_DIGITS} digits")
    return args


def _filter_sum(budget: Budget, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    # Adding up lists copies the sum each time.
    if not isinstance(_argument(args, kwargs, 2, "start", 0), (int, float)):
        raise ChatTemplateError("the chat template uses the filter sum on something else than numbers")
    return args


def _filter_tojson(budget: Budget, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    indent = _argument(args, kwargs, 2, "indent", 0)
    separators = _argument(args, kwargs, 3, "separators", ()) or ()
    for value in (indent, *separators):
        if (len(value) if isinstance(value, str) else _integer((value,))) > _MAX_SEPARATOR:
            raise ChatTemplateError(f"the chat template writes JSON with indent or separators above {_MAX_SEPARATOR}")
    budget.foresee(budget.weigh(args[0]))
    return args


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _integer(values: tuple[Any, ...]) -> int:
    return max((value for value in values if isinstance(value, int)), default=0)


def _bits(bits: int) -> None:
    if bits > MAX_INTEGER_BITS:
        raise ChatTemplateError("the chat template computes a number that is too large")


FILTERS: dict[str, Check] = {
    "batch": _filter_width,
    "center": _filter_width,
    "format": _filter_format,
    "indent": _filter_indent,
    "join": _filter_join,
    "replace": _filter_replace,
    "round": _filter_round,
    "slice": _filter_width,
    "sum": _filter_sum,
    "tojson": _filter_tojson,
}
