"""The jinja2 environment for chat templates: transformers' settings, with everything expensive charged to a Budget.

Templates come with a checkpoint and messages come from clients, so neither is trusted. jinja2's immutable sandbox keeps
them from reaching Python; this file keeps them from using up the machine. Loops, macros, calls, filters, tests and
operators all pass through here: the syntax tree is rewritten where jinja2 has no hook.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from skyline.checkpoint import template_growth as growth
from skyline.checkpoint.template_budget import ChatTemplateError, current_budget

# Their running time cannot be foreseen, and no chat template makes HTML.
_ABSENT_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_ABSENT_GLOBALS = ("lipsum",)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and renders only while `current_budget` is set."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
            finalize=_charge_output,
        )
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: datetime.now().strftime(pattern),
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self.filters["tojson"] = _to_json
        for name in _ABSENT_FILTERS:
            del self.filters[name]
        for name in _ABSENT_GLOBALS:
            del self.globals[name]
        self.filters.update({name: _charged(filter, growth.FILTERS.get(name)) for name, filter in self.filters.items()})
        self.tests.update({name: _charged(test, None) for name, test in self.tests.items()})

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        return super()._generate(_Instrument().visit(source), name, filename, defer_init)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = current_budget.get()
        budget.check_time()
        args = growth.before_method(budget, __obj, args, kwargs)
        return budget.keep(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current_budget.get()
        growth.before_operator(budget, operator, left, right)
        return budget.keep(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            growth.before_format(current_budget.get(), value.__self__, args, kwargs)
            return wrapped(*args, **kwargs)

        return bounded

    # What the rewritten syntax tree calls.

    def step(self, characters: int) -> bool:
        """Once an iteration of a loop and once a call of a macro: pay for the literal text that it may put out."""
        budget = current_budget.get()
        budget.check_time()
        budget.spend(characters)
        return True

    def literal(self, value: Any) -> Any:
        """A list, tuple or dict display; `call` charges for it."""
        return value

    def concatenate(self, *values: Any) -> str:
        """The operator `~`; `call` charges for the result."""
        budget = current_budget.get()
        budget.foresee(sum(map(budget.weigh, values)))
        return "".join(map(str, values))


class _Instrument(NodeTransformer):
    """Makes loops, macros, displays and `~` call the environment, which sees to the budget."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        step = _step(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(step, node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        step = _step(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node

    visit_CallBlock = visit_Macro

    def visit_List(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _call("literal", [node], node.lineno)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return self.visit_List(node) if node.ctx == "load" else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _call("concatenate", node.nodes, node.lineno)


def _call(method: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None, lineno=line)


def _step(node: nodes.Node) -> nodes.Call:
    characters = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
    return _call("step", [nodes.Const(characters)], node.lineno)


def _charged(function: Any, before: growth.Check | None) -> Callable[..., Any]:
    """A filter or test that is charged for. `before` sees its arguments without the context that jinja2 may pass."""
    hidden = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)  # copies jinja_pass_arg
    def charged(*args: Any, **kwargs: Any) -> Any:
        budget = current_budget.get()
        budget.check_time()
        if before is not None:
            args = (*args[:hidden], *before(budget, args[hidden:], kwargs))
        return budget.keep(function(*args, **kwargs))

    return charged


def _charge_output(value: Any) -> Any:
    budget = current_budget.get()
    budget.spend(budget.weigh(value))
    return value


def _raise_exception(message: object) -> None:
    raise ChatTemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which models have not been trained on."""
    encoder = json.JSONEncoder(
        ensure_ascii=bool(ensure_ascii), indent=indent, separators=separators, sort_keys=bool(sort_keys)
    )
    if indent is None:
        return encoder.encode(value)
    # Indentation grows with depth, so its size is known only piece by piece.
    budget = current_budget.get()
    pieces = []
    size = 0
    for piece in encoder.iterencode(value):
        pieces.append(piece)
        size += len(piece)
        budget.foresee(size)
    return "".join(pieces)


class _Dict:
    """The global `dict`, without the type's methods, which could change a value in place."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Does not print what it holds, which may be itself, or large."""

    def __repr__(self) -> str:
        return "<namespace>"


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it is only its content."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
