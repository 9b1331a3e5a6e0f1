"""No pickle anywhere, and nothing else that runs what it reads: DESIGN.md, section 5."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import skyline

SOURCES = sorted(Path(skyline.__file__).parent.rglob("*.py"))
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
# Calls that unpickle (torch.load, ZeroMQ's *_pyobj, torch.distributed's *_object*) or run text.
CALLS = {
    "eval",
    "exec",
    "compile",
    "torch.load",
    "torch.save",
    "np.load",
    "numpy.load",
    "yaml.load",
    "yaml.unsafe_load",
}
METHODS = {"send_pyobj", "recv_pyobj", "all_gather_object", "broadcast_object_list", "scatter_object_list"}


def offences(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]}
        else:
            names = set()
        yield from sorted(names & MODULES)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS or called.rsplit(".", 1)[-1] in METHODS:
                yield called
            for keyword in node.keywords:
                allowed = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in ("trust_remote_code", "allow_pickle") and not allowed:
                    yield keyword.arg


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from cloudpickle import dumps",
        "torch.load(path, weights_only=True)",
        "socket.recv_pyobj()",
        "f(trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_finds(source: str) -> None:
    assert list(offences(source))


def test_sources_are_clean() -> None:
    assert len(SOURCES) > 50
    found = {str(path): names for path in SOURCES if (names := list(offences(path.read_text())))}
    assert not found
