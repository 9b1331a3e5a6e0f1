"""Which linears a scheme rewrites, in every architecture, and that the rewritten graph computes what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from skyline import ops
from skyline.checkpoint.config import load_config
from skyline.graph import capture, quantize_linears, run_passes
from skyline.kernels import Request, choose
from skyline.models import MODELS, create_model, kv_caches
from skyline.quantization import SCHEMES
from tests.models.families import FAMILIES
from tests.models.harness import PagedRunner, load_ours, save_tiny

LAYERS = 3
MOE = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Family, its settings, and the linears of all its layers, the output head and the routers apart.
MODELS_HERE = {
    "Llama": ("Llama", {}, 4 * LAYERS),
    "Llama tied": ("Llama", {"tie_word_embeddings": True}, 4 * LAYERS),
    "Mistral": ("Mistral", {"sliding_window": 6}, 4 * LAYERS),
    "Qwen2": ("Qwen2", {}, 4 * LAYERS),
    "Qwen3 tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}, 4 * LAYERS),
    "Qwen3Moe": ("Qwen3Moe", MOE, 2 * LAYERS),
    "Qwen3Moe, one layer dense": ("Qwen3Moe", {**MOE, "mlp_only_layers": [1]}, 2 * LAYERS + 2),
}
# Linears that stay as they are, where there are such, in models of three layers.
DENSE = {"Mixtral": 3, "Qwen3Next": 8, "Qwen3_5": 2, "Qwen3_5Moe": 8, "DeepseekV32": 3}


def test_every_architecture_is_here() -> None:
    families = {family for family, _, _ in MODELS_HERE.values()} | FAMILIES.keys()
    assert {f"{family}ForCausalLM" for family in families} == MODELS.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_decides_stays_dense(family: str, tmp_path: Path) -> None:
    """Of the architectures that mix kinds of layers: routers, gates and the indexer's weights are not quantized."""
    save_tiny(tmp_path, family, **FAMILIES[family])
    graph = capture(create_model(load_config(tmp_path), torch.bfloat16, "meta"))
    before = len(graph.find_nodes(op="call_function", target=ops.linear))
    counts = quantize_linears(graph, "int8")
    dense = {str(node.args[1].target) for node in graph.find_nodes(op="call_function", target=ops.linear)}
    assert counts["linear_int8"] == before - len(dense) > LAYERS
    decisive = (
        "mlp.gate.",
        "block_sparse_moe.gate.",
        "shared_expert_gate.",
        "ba_proj.",
        "qkv_a_proj.",  # of which the indexer's weights are rows
    )
    assert all(any(name in weight for name in decisive) for weight in dense)
    assert len(dense) == DENSE.get(family, 0)


@pytest.fixture(params=MODELS_HERE)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    family, settings, _ = MODELS_HERE[name]
    save_tiny(tmp_path, family, **settings)
    return tmp_path


def _mixtures(name: str) -> int:
    return {"Qwen3Moe": LAYERS, "Qwen3Moe, one layer dense": LAYERS - 1}.get(name, 0)


def _linear_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if getattr(node.target, "name", "").startswith("linear")]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_right_linears_are_rewritten(folder: Path, name: str, scheme: str) -> None:
    graph = capture(create_model(load_config(folder), torch.bfloat16, "meta"))
    before = {str(node.args[1]): node.args for node in graph.nodes if node.target is ops.linear}
    counts = quantize_linears(graph, scheme)
    graph.lint()
    linear, head = {
        "int8": ("linear_int8", "linear_int8"),
        "int8-weight-only": ("linear_int8_weight_only", "linear_int8_weight_only"),
        "int4": ("linear_int4", "linear_int8"),
        "fp8": ("linear_fp8", "linear"),  # the head stays as it is
        "mxfp4": ("linear_fp4", "linear"),
    }[scheme]
    inner = MODELS_HERE[name][2]
    expected = {linear: inner + 1} if linear == head else {linear: inner, head: 1}
    expected.pop("linear", None)
    if mixtures := _mixtures(name):
        expected[linear.replace("linear", "moe_experts")] = mixtures
    assert counts == expected
    assert not graph.find_nodes(op="call_function", target=ops.moe_experts)

    after = {str(node.args[1]): node.target.name for node in _linear_nodes(graph)}
    assert len(after) == len(before)
    tied = "tied" in name
    routers = 0
    for weight, op in after.items():
        if "mlp_gate_weight" in weight:
            assert op == "linear"
            routers += 1
        else:
            is_head = ("embed_tokens" if tied else "lm_head") in weight
            assert op == (head if is_head else linear), weight
    assert routers == _mixtures(name)
    for node in _linear_nodes(graph):
        assert node.args == before[str(node.args[1])]
        assert node.args[1].op == "get_attr"


def test_the_embedding_keeps_its_table(folder: Path) -> None:
    graph = capture(create_model(load_config(folder), torch.bfloat16, "meta"))
    quantize_linears(graph, "int8")
    (table,) = [node for node in graph.nodes if node.target is ops.embedding]
    assert table.args[1].op == "get_attr" and str(table.args[1].target).endswith("embed_tokens.weight")


def test_a_linear_is_found_under_its_new_op(folder: Path) -> None:
    """Later passes ask the graph for the calls of an op."""
    graph = capture(create_model(load_config(folder), torch.bfloat16, "meta"))
    count = quantize_linears(graph, "int8")["linear_int8"]
    assert len(graph.find_nodes(op="call_function", target=ops.linear_int8)) == count


def test_unknown_scheme() -> None:
    with pytest.raises(ValueError, match="int8-weight-only, int4, not 'int3'"):
        quantize_linears(fx.Graph(), "int3")


class _Quantized(fx.Interpreter):
    """Runs the graph with the weights that the chosen kernels' layouts make of the dense ones."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph, garbage_collect_values=False)
        self.kept: dict[tuple[int, int], Any] = {}
        self.dequantize = False

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(target, ops.Op):
            return super().call_function(target, args, kwargs)
        kernel = choose(Request(target, "cpu", torch.float32)).kernel
        if kernel.layouts:
            quantized = {
                index: self._weight(args[index], layout(args) if callable(layout) else layout)
                for index, layout in kernel.layouts.items()
            }
            if self.dequantize:
                plain = ops.linear if len(quantized) == 1 else ops.moe_experts
                dense = {index: weight.dequantize() for index, weight in quantized.items()}
                return plain(*(dense.get(index, value) for index, value in enumerate(args)))
            args = tuple(quantized.get(index, value) for index, value in enumerate(args))
        return kernel.run(*args)

    def _weight(self, weight: torch.Tensor, layout: Any) -> Any:
        key = id(weight), id(layout)
        if key not in self.kept:
            self.kept[key] = layout.allocate(tuple(weight.shape), weight.dtype)
            layout.write(self.kept[key], 0, weight.reshape(-1, weight.shape[-1]))
        return self.kept[key]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_dequantized_weights(folder: Path, scheme: str, fused: bool) -> None:
    def logits(quantize: bool, dequantize: bool) -> torch.Tensor:
        model = load_ours(folder)
        graph = capture(model)
        if quantize:
            quantize_linears(graph, scheme)
        if fused:
            run_passes(graph)
        interpreter = _Quantized(model, graph)
        interpreter.dequantize = dequantize
        runner = PagedRunner(model, run=interpreter.run)
        parts = runner.step(("a", [1, 2, 3, 4, 5, 6, 7]), ("b", [9, 8, 7])) + runner.step(("b", [11]), ("a", [12]))
        assert len(kv_caches(model)) == LAYERS and bool(interpreter.kept) == quantize
        return torch.cat(parts)

    exact, got, same = logits(False, False), logits(True, False), logits(True, True)
    spread = exact.std()
    if scheme in ("int8-weight-only", "mxfp4"):
        torch.testing.assert_close(got, same, rtol=1e-3, atol=1e-3)
    else:  # the activations are quantized too
        assert (got - same).std() < 0.05 * spread
    off = (got - exact).std() / spread
    # No measure of quality: the rows are 32 values wide, and a router may choose other experts.
    assert 0 < off < {"int4": 0.5, "fp8": 0.2, "mxfp4": 0.8}.get(scheme, 0.06)
