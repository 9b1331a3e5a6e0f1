"""Capture a model into a graph of ops.

torch.fx is the intermediate representation. Ops are its leaves (`skyline.ops.contract.Op.__call__` records them), and
parameters, buffers and KV caches become `get_attr` nodes by their path in the model. Tracing runs the model's Python
once with proxies: a few milliseconds, no compiler. The graph holds no shapes, so one capture serves every token count.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from skyline.ops import LayerCache

INPUTS = ("input_ids", "positions", "batch", "logit_rows")
VALUE = "value"  # under this key a `get_attr` node's `meta` holds what it stands for


class _OpTracer(fx.Tracer):
    """Inlines every module, and resolves tensors to their path with a table instead of fx's search per use."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._paths: dict[int, str] = {}
        for prefix, module in model.named_modules():
            dot = f"{prefix}." if prefix else ""
            for name, value in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
                if isinstance(value, (Tensor, LayerCache)):
                    self._paths.setdefault(id(value), dot + name)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        # As fx does it, but for its walk over all of the model's parameters each time one of them is used.
        if not isinstance(attr_val, nn.Parameter):
            return attr_val
        path = self._paths[id(attr_val)]
        if path not in parameter_proxy_cache:
            parameter_proxy_cache[path] = self.create_proxy("get_attr", path, (), {})
        return parameter_proxy_cache[path]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, (Tensor, LayerCache)):
            path = self._paths.get(id(a))
            if path is None:
                raise ValueError(f"a {type(a).__name__} used in forward() is not an attribute of any module")
            return self.create_node("get_attr", path, (), {})
        return super().create_arg(a)


def capture(model: nn.Module) -> fx.Graph:
    """The graph of model.forward(input_ids, positions, batch, logit_rows). Raises ValueError on anything but ops."""
    graph = _OpTracer(model).trace(model)
    for node in graph.nodes:
        if node.op in ("call_method", "call_module"):
            raise ValueError(f"{node.op} {node.target} in forward(): a model may call only ops on activations")
        if node.op == "get_attr":
            node.meta[VALUE] = resolve(model, node.target)
    return graph


def resolve(model: nn.Module, path: str) -> Any:
    """The object that a `get_attr` node stands for."""
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name)
    return value
