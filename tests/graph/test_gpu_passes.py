"""What only GPUs fuse: norms, residuals and experts; and how many launches that leaves a layer."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from skyline import ops
from skyline.checkpoint import load_config
from skyline.graph import capture, lower, quantize_linears, run_passes
from skyline.graph.passes import GPU_PASSES
from skyline.kernels.gpu import GPUS
from skyline.models import create_model
from skyline.ops import IndexCache, LatentCache
from skyline.ops.formats import IntegerFormat
from skyline.ops.fp8 import quantize_fp8
from tests.graph.test_passes import HIDDEN, VARIANTS, Body, _check, _count, _Hand, _logits, _run
from tests.models.families import FAMILIES
from tests.models.harness import load_ours, save_tiny

# Calls of a Program for an H200 from one layer's attention to the next's, in bfloat16 or four bits and with weights of
# FP8, in the order of the layers; of the families of other tests, those of their first and second layer.
GPU_LAUNCHES: dict[str, tuple[list[int], list[int]]] = {
    "llama": ([5, 5], [3, 3]),
    "mistral, window": ([5, 5], [3, 3]),
    "qwen2": ([5, 5], [3, 3]),
    "qwen3": ([5, 5], [3, 3]),
    "qwen3-moe": ([7, 7], [6, 6]),
    "DeepseekV3": ([7, 9], [6, 8]),
    "DeepseekV32": ([8, 10], [7, 9]),
}
# The bars that the project has set itself.
MOST_LAUNCHES = {"llama": 7, "qwen2": 7, "qwen3": 7, "DeepseekV32": 10}
_MIXERS = {"paged_attention", "rope_attention", "attention_linear_fp8", "latent_attention", "gated_delta_rule"}


@pytest.mark.parametrize("scheme", [None, "fp8", "mxfp4", "int4"])
@pytest.mark.parametrize("name", GPU_LAUNCHES)
def test_launches_of_a_layer_on_a_gpu(name: str, scheme: str | None, tmp_path: Path) -> None:
    family, settings = VARIANTS[name][:2] if name in VARIANTS else (name, FAMILIES[name])
    save_tiny(tmp_path, family, **settings, num_hidden_layers=3)
    model = create_model(load_config(tmp_path), torch.bfloat16, "meta")
    graph = capture(model)
    if scheme is not None:
        assert quantize_linears(graph, scheme)
    run_passes(graph, "cuda")
    program = lower(graph, model, torch.device("cuda"), torch.bfloat16, gpu=GPUS["h200"])
    launched = [call.op.name for call in program.calls if not call.is_view]
    mixers = [index for index, op in enumerate(launched) if op in _MIXERS]
    counts = [last - first for first, last in pairwise(mixers)]
    assert counts == GPU_LAUNCHES[name][scheme == "fp8"], launched[mixers[0] : mixers[-1]]
    assert max(counts) <= MOST_LAUNCHES.get(name, 100)


@pytest.mark.parametrize("name,linears,experts", [("llama", 4, 0), ("qwen3-moe", 2, 1)])
def test_int4_does_not_quantize_activations_on_a_gpu(name: str, linears: int, experts: int, tmp_path: Path) -> None:
    save_tiny(tmp_path, VARIANTS[name][0], **VARIANTS[name][1], num_hidden_layers=3)
    graph = capture(create_model(load_config(tmp_path), torch.bfloat16, "meta"))
    assert quantize_linears(graph, "int4")
    assert run_passes(graph, "cuda")["weight_only_int4"] == 3 * (linears + experts)
    found = _count(graph)
    assert found["fused_linear_int4"] == 3 * linears and found["moe_experts_int4_weight_only"] == 3 * experts
    assert "linear_int4" not in found and "moe_experts_int4" not in found


@pytest.mark.parametrize("name,linears,experts", [("llama", 4, 0), ("qwen3-moe", 2, 1)])
@pytest.mark.parametrize("device,fp4", [("cuda", True), ("cuda", False), ("cpu", False)])
def test_activations_are_fp4_only_where_that_is_multiplied(
    name: str, linears: int, experts: int, device: str, fp4: bool, tmp_path: Path
) -> None:
    save_tiny(tmp_path, VARIANTS[name][0], **VARIANTS[name][1], num_hidden_layers=3)
    model = create_model(load_config(tmp_path), torch.bfloat16, "meta")
    graph = capture(model)
    both = IntegerFormat(4, 16, fp4=True, activations=True)
    stored = {id(p): both for name, p in model.named_parameters() if "layers" in name and ".gate.w" not in name}
    assert quantize_linears(graph, None, stored=stored)
    counts = run_passes(graph, device, fp4=fp4)
    assert counts.get("weight_only_fp4", 0) == (0 if fp4 else 3 * (linears + experts))
    kind, fused = ("nvfp4" if fp4 else "fp4"), ("fused_" if device == "cuda" else "")
    found = Counter({op: count for op, count in _count(graph).items() if "fp4" in op})
    assert found == Counter({f"{fused}linear_{kind}": 3 * linears, f"moe_experts_{kind}": 3 * experts})


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_and_launches_on_a_gpu(variant: str, layers: int, tmp_path: Path) -> None:
    """Linears there take in the norm before them and the sum behind them."""
    family, settings, _, _, experts = VARIANTS[variant]
    save_tiny(tmp_path, family, **settings, num_hidden_layers=layers)
    graph = capture(load_ours(tmp_path))
    dense = 0 if experts else layers
    found = run_passes(graph, "cuda")
    assert found == {
        "weight_only_int4": 0,
        "weight_only_fp4": 0,
        "linear_silu_mul": dense,
        "experts_add": layers - dense,
        "linear_add": layers + dense,
        "norm_router": 0,
        "norm_argument": 0,
        # Beside the output head: of each layer that of attention, and of the MLP where nothing else reads it.
        "norm_linear": layers + dense + 1,
        "add_rms_norm": 0,
        "rope_kv_write": layers,
        "rope_attention": layers,
        "gated_mlp_fp8": 0,
        "attention_linear_fp8": 0,
    }
    around = 3  # embedding, select_rows, the output head
    assert _count(graph).total() == layers * (7 if experts else 5) + around
    assert run_passes(graph, "cuda") == dict.fromkeys(GPU_PASSES, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_fused_for_a_gpu(variant: str, tmp_path: Path) -> None:
    family, settings, *_ = VARIANTS[variant]
    save_tiny(tmp_path, family, **settings)
    unfused, fused = (_logits(tmp_path, fuse, "cuda") for fuse in (False, True))
    torch.testing.assert_close(fused, unfused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_other_architectures_fused_for_a_gpu(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family, **FAMILIES[family])
    unfused, fused = (_logits(tmp_path, fuse, "cuda") for fuse in (False, True))
    torch.testing.assert_close(fused, unfused, rtol=1e-4, atol=1e-4)


EXPERTS = dict(
    gate=torch.randn((4, HIDDEN), generator=torch.Generator().manual_seed(11)) / 8,
    gate_up=torch.randn((4, 24, HIDDEN), generator=torch.Generator().manual_seed(12)) / 8,
    down=torch.randn((4, HIDDEN, 12), generator=torch.Generator().manual_seed(13)) / 4,
)


def _mixture(self, x):
    """x, its norm, and the sum of its experts."""
    normed = ops.rms_norm(x, self.norm, 0.03)
    chosen = ops.router(normed, self.gate, None, None, 2, "sigmoid", True)
    return x, normed, ops.moe_experts(normed, self.gate_up, self.down, *chosen)


def _experts_alone(self, x, *_):
    x, _, experts = _mixture(self, x)
    return ops.add(experts, x)


def _beside_shared_experts(self, x, *_):
    x, normed, experts = _mixture(self, x)
    return ops.add(x, ops.add(experts, ops.linear(normed, self.project)))


def _beside_an_activation(self, x, *_):
    x, normed, experts = _mixture(self, x)
    return ops.add(ops.add(ops.sigmoid_mul(normed, normed), experts), x)


@pytest.mark.parametrize(
    "body,found,left",
    [
        (_experts_alone, {"norm_router": 1, "experts_add": 1}, {"norm_router": 1, "fused_experts": 1}),
        (
            _beside_shared_experts,
            {"norm_router": 1, "experts_add": 1, "linear_add": 1},
            {"norm_router": 1, "fused_experts": 1, "fused_linear": 1},
        ),
        (
            _beside_an_activation,
            {"norm_router": 1, "experts_add": 1},
            {"norm_router": 1, "fused_experts": 1, "sigmoid_mul": 1, "add": 1},
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_experts_take_the_norm_and_the_residual(body: Body, found: dict[str, int], left: dict[str, int]) -> None:
    graph = _check(body, found, "cuda", **EXPERTS)
    assert _count(graph) == left
    assert run_passes(graph, "cuda") == dict.fromkeys(GPU_PASSES, 0)


def _experts_read_twice(self, x, *_):
    x, _, experts = _mixture(self, x)
    return ops.add(experts, x), experts


def _experts_added_to_themselves(self, x, *_):
    _, _, experts = _mixture(self, x)
    return ops.add(experts, experts)


def _parameter_added_to_experts(self, x, *_):
    _, _, experts = _mixture(self, x)
    return ops.add(experts, self.norm2)


@pytest.mark.parametrize(
    "body", [_experts_read_twice, _experts_added_to_themselves, _parameter_added_to_experts], ids=lambda b: b.__name__
)
def test_experts_whose_sum_is_left_alone(body: Body) -> None:
    assert "moe_experts" in _count(_check(body, {"norm_router": 1}, "cuda", **EXPERTS))


def test_sum_with_shared_experts_that_is_read_again() -> None:
    def body(self, x, *_):
        x, normed, experts = _mixture(self, x)
        both = ops.add(experts, ops.sigmoid_mul(normed, normed))
        return ops.add(x, both), both

    _check(body, {"norm_router": 1}, "cuda", **EXPERTS)


def test_norm_read_before_the_router_is_left_alone() -> None:
    def body(self, x, *_):
        normed = ops.rms_norm(x, self.norm, 0.03)
        first = ops.silu_mul(normed)
        return first, *ops.router(normed, self.gate, None, None, 2, "softmax", True)

    _check(body, {}, "cuda", **EXPERTS)


def test_router_alone_with_its_norm() -> None:
    """Nobody reads the normed rows, and only the ids are wanted."""

    def body(self, x, *_):
        return ops.router(ops.rms_norm(x, self.norm, 0.03), self.gate, None, None, 2, "softmax", True)[1]

    graph = _check(body, {"norm_router": 1}, "cuda", **EXPERTS)
    assert [node.args[1] for node in graph.nodes if node.target is operator.getitem] == [2]


LATENT = LatentCache(24, 8, torch.float32, torch.zeros((12, 4, 32)))
INDEX = IndexCache(16, torch.float32, torch.zeros((12, 4, 16)))


def _latent_write(*, again: bool = False) -> Body:
    def body(self, x, positions, batch):
        q, latent, k = ops.split(x, (32, 24, 8))
        normed = ops.rms_norm(latent, self.norm, 0.03)
        q = ops.latent_rope_write(q, normed, k, positions, self.table, 16, self.cache, batch)
        return (q, normed) if again else q

    return body


def _index(*, again: bool = False) -> Body:
    def body(self, x, positions, batch):
        q, k, _ = ops.split(x, (32, 16, 16))
        k = ops.layer_norm(k, self.norm, self.norm2, 0.03)
        weights = ops.split(x, (2, HIDDEN - 2))[0]
        chosen = ops.index_topk(q, k, weights, positions, self.table, self.cache, batch, 3, 0.5)
        return (chosen, k) if again else chosen

    return body


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("make,cache,size", [(_latent_write, LATENT, 24), (_index, INDEX, 16)], ids=["latent", "index"])
def test_norm_of_what_is_cached(make: Callable[..., Body], cache: Any, size: int, again: bool) -> None:
    norms = {name: 1 + torch.randn(size, generator=torch.Generator().manual_seed(5)) / 8 for name in ("norm", "norm2")}
    graph = _check(
        make(again=again), {} if again else {"norm_argument": 1}, "cuda", cache=copy.deepcopy(cache), **norms
    )
    assert len(_count(graph)) == 1 + again
    assert run_passes(graph, "cuda") == dict.fromkeys(GPU_PASSES, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp8_linears_take_what_makes_their_input(variant: str, tmp_path: Path) -> None:
    """Attention and MLPs of FP8 weights; not on a GPU that leaves FP8 to torch."""
    family, settings, _, _, experts = VARIANTS[variant]
    save_tiny(tmp_path, family, **settings)
    model = load_ours(tmp_path)
    fused = not experts and not settings.get("mlp_bias", False)
    for fp8 in (True, False):
        graph = capture(model)
        quantize_linears(graph, "fp8")
        found = run_passes(graph, "cuda", fp8)
        layers = found["rope_kv_write"]
        assert found.get("attention_linear_fp8", 0) == fp8 * layers
        assert found.get("gated_mlp_fp8", 0) == (fp8 and fused) * layers
        assert ("rope_attention" in _count(graph)) is not fp8


def _check_fp8(body: Body, expected: dict[str, int], **attributes: Any) -> Any:
    """As `_check`: matrices become weights of FP8 after the graph was captured."""
    model = _Hand(body, **attributes)
    graph = capture(model)
    for name, value in attributes.items():
        if isinstance(value, torch.Tensor) and value.dim() == 2:
            setattr(model, name, quantize_fp8(value))
    before = _run(model, graph)
    assert run_passes(graph, "cuda") == {name: expected.get(name, 0) for name in GPU_PASSES}
    for one, other in zip(before, _run(model, graph), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    return graph


def _mlp(self, x, *_):
    hidden = ops.linear_fp8(ops.rms_norm(x, self.norm, 0.03), self.gate_up, None, True)
    return ops.add(x, ops.linear_fp8(hidden, self.down))


def _read_again(self, x, *_):
    hidden = ops.linear_fp8(x, self.gate_up, None, True)
    return hidden, ops.linear_fp8(hidden, self.down)


def _biased(self, x, *_):
    return ops.linear_fp8(ops.linear_fp8(x, self.gate_up, self.bias, True), self.down)


def _not_gated(self, x, *_):
    return ops.linear_fp8(ops.linear_fp8(x, self.narrow), self.down)


def _norm_between(self, x, *_):
    return ops.linear_fp8(ops.rms_norm(ops.linear_fp8(x, self.gate_up, None, True), self.norm12, 0.1), self.down)


@pytest.mark.parametrize(
    "body,found",
    [
        (_mlp, {"gated_mlp_fp8": 1, "norm_linear": 1, "linear_add": 1}),
        (_read_again, {}),
        (_biased, {}),
        (_not_gated, {}),
        (_norm_between, {"norm_linear": 1}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_both_products_of_an_mlp(body: Body, found: dict[str, int]) -> None:
    shapes = {"gate_up": (24, HIDDEN), "narrow": (12, HIDDEN), "down": (HIDDEN, 12), "bias": (24,)}
    weights = {name: torch.randn(shape, generator=torch.Generator().manual_seed(3)) for name, shape in shapes.items()}
    graph = _check_fp8(body, found, norm12=torch.ones(12), **weights)
    if body is _mlp:
        assert _count(graph) == {"gated_mlp_fp8": 1}


@pytest.mark.parametrize("between", [False, True])
def test_attention_whose_cache_is_written_before_the_linear(between: bool) -> None:
    def body(self, x, positions, batch):
        q, k, v = ops.split(x, (32, 16, 16))
        attended = ops.paged_attention(q, self.cache, batch, 0.3)
        if between:
            ops.kv_write(k, v, self.cache, batch)
        return ops.add(x, ops.linear_fp8(attended, self.out))

    out = torch.randn((HIDDEN, 32), generator=torch.Generator().manual_seed(4))
    found = {"linear_add": 1} if between else {"linear_add": 1, "attention_linear_fp8": 1}
    assert ("paged_attention" in _count(_check_fp8(body, found, out=out))) is between


def _turned(change: str) -> Body:
    """Rotation, KV write and attention, and what may stand in the way of one call for all three."""

    def body(self, x, positions, batch):
        turn = (None, None, 0.0, positions, self.table)
        q = ops.rope_kv_write(x, *turn, self.cache, batch)
        if change == "written in between":
            _, k, v = ops.split(x, (32, 16, 16))
            ops.kv_write(k, v, self.cache, batch)
        attended = ops.paged_attention(q, self.other if change == "another cache" else self.cache, batch, 0.3)
        return (attended, q) if change == "read twice" else attended

    return body


@pytest.mark.parametrize("change", ["", "written in between", "another cache", "read twice"])
def test_attention_takes_in_the_rotation(change: str) -> None:
    other = copy.deepcopy(_Hand(_turned("")).cache)
    graph = _check(_turned(change), {} if change else {"rope_attention": 1}, "cuda", other=other)
    assert ("rope_attention" in _count(graph)) is not bool(change)


def test_rotation_and_attention_move_to_the_linear_unless_the_cache_is_written_before_it() -> None:
    out = torch.randn((HIDDEN, 32), generator=torch.Generator().manual_seed(4))
    for between in (False, True):

        def body(self, x, positions, batch, between=between):
            attended = _turned("")(self, x, positions, batch)
            if between:
                _, k, v = ops.split(x, (32, 16, 16))
                ops.kv_write(k, v, self.cache, batch)
            return ops.linear_fp8(attended, self.out)

        found = {"rope_attention": 1} if between else {"rope_attention": 1, "attention_linear_fp8": 1}
        graph = _check_fp8(body, found, out=out)
        assert ("rope_attention" in _count(graph)) is between
