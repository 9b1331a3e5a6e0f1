"""`import torch` in three quarters of its time, for a process that does not trace with torch's compiler.

It is half of a start, and a quarter of it are rules, in Python, for the shapes of operations on the meta device. Only
the compiler asks for them, so they wait for it here. Models say themselves what the shapes are (`Op.meta`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_RULES = "torch._meta_registrations"
# Modules of the compiler that others import; by themselves, they cannot be imported before the rules.
_COMPILER = {"torch._dynamo", "torch._decomp", "torch._prims", "torch._refs", "torch.utils._content_store"}


class _Later(ModuleType):
    """Stands for the rules while torch is imported; should torch look into them then, they are there."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of every module, as `inspect` asks
            raise AttributeError(name)
        sys.modules.pop(_RULES, None)
        return getattr(importlib.import_module(_RULES), name)


class _BeforeTheCompiler:
    """Finds the compiler's modules by importing the rules first, as torch does; once."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _COMPILER:
            return None
        sys.meta_path.remove(cls)
        importlib.import_module(_RULES)
        # The rules import most of them. One that stayed there would be loaded a second time.
        module = sys.modules.pop(name, None)
        return None if module is None else ModuleSpec(name, _Imported(module))


class _Imported(Loader):
    """Loads what is loaded."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def import_torch() -> None:
    """Raises what the import does."""
    if "torch" in sys.modules:
        return
    placeholder = sys.modules[_RULES] = _Later(_RULES)
    try:
        import torch
    finally:
        if sys.modules.get(_RULES) is placeholder:
            del sys.modules[_RULES]
    if vars(torch).get("_meta_registrations") is placeholder:
        del torch._meta_registrations
        sys.meta_path.insert(0, _BeforeTheCompiler)
