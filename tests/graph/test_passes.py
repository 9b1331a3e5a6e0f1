"""Each fusion is found in every architecture, changes no result, and leaves alone what only looks like it."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from skyline import ops
from skyline.graph import PASSES, capture, lower, run_passes
from skyline.graph import passes as passes_module
from skyline.graph.gpu_passes import WHOLE_LINEARS
from skyline.graph.passes import EACH_ROW, GPU_PASSES
from skyline.kernels import candidates
from skyline.kernels.cpu import native
from skyline.models import MODELS
from skyline.ops.attention import make_batch, make_cache
from skyline.ops.contract import Op
from tests.models.families import FAMILIES
from tests.models.harness import CPU, PagedRunner, load_ours, save_tiny

_MOE = dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)

# Family, settings, launches of one layer before and after, whether its MLP is a mixture of experts.
VARIANTS: dict[str, tuple[str, dict[str, Any], int, int, bool]] = {
    "llama": ("Llama", {}, 12, 8, False),
    "llama, biases": ("Llama", dict(attention_bias=True, mlp_bias=True), 12, 8, False),
    "llama, one KV head, tied": ("Llama", dict(num_key_value_heads=1, tie_word_embeddings=True), 12, 8, False),
    "mistral, window": ("Mistral", dict(sliding_window=6), 12, 8, False),
    "qwen2": ("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1), 12, 8, False),
    "qwen3": ("Qwen3", dict(head_dim=16), 14, 8, False),
    "qwen3, biases": ("Qwen3", dict(head_dim=16, attention_bias=True), 14, 8, False),
    "qwen3-moe": ("Qwen3Moe", _MOE, 14, 9, True),
}

# Launches of a step of the other architectures' tiny models, before and after all passes.
LAUNCHES = {
    "DeepseekV3": (52, 44),
    "DeepseekV32": (58, 50),
    "Gemma3": (53, 54),
    "Glm4Moe": (46, 35),
    "GptOss": (37, 29),
    "MiniMaxM2": (43, 38),
    "Mixtral": (40, 32),
    "Qwen3Next": (63, 62),
    "Qwen3_5": (45, 44),
    "Qwen3_5Moe": (63, 62),
}


def _count(graph: fx.Graph) -> Counter[str]:
    """How often each op is launched; a split is a view."""
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    return Counter(target.name for target in targets if isinstance(target, Op) and target is not ops.split)


def test_every_architecture_is_here() -> None:
    families = {family for family, *_ in VARIANTS.values()} | LAUNCHES.keys()
    assert {f"{family}ForCausalLM" for family in families} == MODELS.keys() and LAUNCHES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_launches_of_other_architectures(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family, **FAMILIES[family])
    graph = capture(load_ours(tmp_path))
    before = _count(graph).total()
    run_passes(graph)
    assert (before, _count(graph).total()) == LAUNCHES[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_logits_of_other_architectures(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family, **FAMILIES[family])
    unfused, fused = (_logits(tmp_path, fuse) for fuse in (False, True))
    assert unfused.std() > 0.1, "the test model says nothing"
    torch.testing.assert_close(fused, unfused, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_and_launches(variant: str, layers: int, tmp_path: Path) -> None:
    family, settings, before, after, experts = VARIANTS[variant]
    save_tiny(tmp_path, family, **settings, num_hidden_layers=layers)
    graph = capture(load_ours(tmp_path))
    # Around the layers: embedding, select_rows, the last norm, the output head.
    assert _count(graph).total() == layers * before + 4

    dense = 0 if experts else layers
    expected = {
        "select_rows_early": 1,
        "add_rms_norm": 2 * layers,
        "rope_kv_write": layers,
        "linear_silu_mul": dense,
    }
    assert run_passes(graph) == {name: expected.get(name, 0) for name in PASSES}
    # The first layer has its own norm to begin with.
    assert _count(graph).total() == layers * after + 5
    assert _count(graph) == {
        "embedding": 1,
        "rms_norm": 1,
        "linear": 3 * layers + 1 + dense,
        "rope_kv_write": layers,
        "paged_attention": layers,
        "add_rms_norm": 2 * layers,
        "select_rows": 2,  # of what attention gives, and of the residual stream
        **({"topk_router": layers, "moe_experts": layers} if experts else {}),
    }
    assert run_passes(graph) == dict.fromkeys(PASSES, 0), "a fused graph has nothing left to fuse"


def test_layers_with_and_without_experts(tmp_path: Path) -> None:
    save_tiny(tmp_path, "Qwen3Moe", **_MOE, mlp_only_layers=[1], num_hidden_layers=3)
    graph = capture(load_ours(tmp_path))
    expected = {"select_rows_early": 1, "add_rms_norm": 6, "rope_kv_write": 3, "linear_silu_mul": 1}
    assert run_passes(graph) == {name: expected.get(name, 0) for name in PASSES}


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_logits_equal_unfused(variant: str, tmp_path: Path) -> None:
    """Prefill, then decodes and later chunks, which read what the fused ops have written to the cache."""
    family, settings, *_ = VARIANTS[variant]
    save_tiny(tmp_path, family, **settings)
    unfused, fused = (_logits(tmp_path, fuse) for fuse in (False, True))
    assert unfused.std() > 0.1, "the test model says nothing"
    torch.testing.assert_close(fused, unfused, rtol=1e-4, atol=1e-5)


def _logits(folder: Path, fuse: bool, device: str = "cpu") -> torch.Tensor:
    model = load_ours(folder)
    graph = capture(model)
    if fuse:
        run_passes(graph, device)
    runner = PagedRunner(model, run=lower(graph, model, CPU, torch.float32))
    logits = runner.step(("a", [1, 2, 3, 4, 5, 6, 7]), ("b", [9, 8, 7]))
    logits += runner.step(("b", [11]), ("c", list(range(20))), ("a", [12]))
    for token in (5, 60, 3):
        logits += runner.step(("a", [token]), ("b", [token + 1]), ("c", [token, 2]))
    return torch.cat(logits)


# What follows is built by hand. `x` [T, H] float comes in as input_ids.

HEADS, KV_HEADS, DIM = 4, 2, 8
HIDDEN = (HEADS + 2 * KV_HEADS) * DIM
STARTS, LENGTHS = [2, 0], [1, 4]
ROWS = sum(LENGTHS)

Body = Callable[..., Any]


class _Hand(nn.Module):
    """`body(self, x, positions, batch)` as a model."""

    def __init__(self, body: Body, **attributes: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def weight(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.body = body
        self.norm = weight(HIDDEN)
        self.norm2 = weight(HIDDEN)
        self.project = weight(HIDDEN, HIDDEN) / 8
        self.q_norm, self.k_norm = weight(DIM), weight(DIM)
        self.wide_norm = weight(2 * DIM)
        angles = torch.rand((40, DIM // 2), generator=generator) * 6
        self.table = torch.cat((angles.cos(), angles.sin()), dim=-1)
        self.cache = make_cache(torch.float32, generator, KV_HEADS, DIM)
        self.rows = torch.arange(2)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, input_ids: Any, positions: Any, batch: Any, logit_rows: Any) -> Any:
        self.logit_rows = logit_rows
        return self.body(self, input_ids, positions, batch)


def _run(model: _Hand, graph: fx.Graph) -> list[Tensor]:
    """The graph's outputs by the ops' references, and what the cache holds afterwards, which is undone."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((ROWS, HIDDEN), generator=generator)
    positions = torch.tensor([start + i for start, n in zip(STARTS, LENGTHS, strict=True) for i in range(n)])
    saved = [tensor.clone() for tensor in model.cache.tensors]
    out = fx.Interpreter(model, graph=graph).run(x, positions, make_batch(STARTS, LENGTHS), model.rows)
    written = [tensor.clone() for tensor in model.cache.tensors]
    for tensor, before in zip(model.cache.tensors, saved, strict=True):
        tensor.copy_(before)
    return [*(out if isinstance(out, (tuple, list)) else [out]), *written]


def _check(body: Body, expected: dict[str, int], device: str = "cpu", **attributes: Any) -> fx.Graph:
    """Run the passes: these matches, no other, and the same numbers as before."""
    passes = GPU_PASSES if device == "cuda" else PASSES
    model = _Hand(body, **attributes)
    graph = capture(model)
    before = _run(model, graph)
    nodes = [(node.name, node.target) for node in graph.nodes]
    assert run_passes(graph, device) == {name: expected.get(name, 0) for name in passes}
    if not expected:
        assert [(node.name, node.target) for node in graph.nodes] == nodes
    for one, other in zip(before, _run(model, graph), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    return graph


def test_sum_with_later_readers_is_fused() -> None:
    def body(self, x, positions, batch):
        total = ops.add(x, ops.linear(x, self.project))
        normed = ops.rms_norm(total, self.norm, 0.03)
        return ops.add(total, ops.linear(normed, self.project)), total

    graph = _check(body, {"add_rms_norm": 1})
    assert _count(graph) == {"linear": 2, "add_rms_norm": 1, "add": 1}


def test_sum_that_only_the_norm_reads() -> None:
    graph = _check(
        lambda self, x, *_: ops.rms_norm(ops.add(x, ops.linear(x, self.project)), self.norm, 0.5), {"add_rms_norm": 1}
    )
    picked = [node.args[1] for node in graph.nodes if node.target is operator.getitem]
    assert picked == [0]


def test_operands_keep_their_order() -> None:
    def body(self, x, *_):
        return ops.rms_norm(ops.add(ops.linear(x, self.project), x), self.norm, 0.5)

    graph = _check(body, {"add_rms_norm": 1})
    (fused,) = graph.find_nodes(op="call_function", target=ops.add_rms_norm)
    assert [node.name for node in fused.args[:2]] == ["linear", "input_ids"]


def test_one_norm_of_two_of_the_same_sum() -> None:
    def body(self, x, *_):
        total = ops.add(x, ops.linear(x, self.project))
        return ops.add(ops.rms_norm(total, self.norm, 0.5), ops.rms_norm(total, self.norm2, 0.1))

    _check(body, {"add_rms_norm": 1})


def _sum_read_before_the_norm(self, x, *_):
    total = ops.add(x, ops.linear(x, self.project))
    other = ops.linear(total, self.project)
    return ops.add(other, ops.rms_norm(total, self.norm, 0.03))


def _parameter_added(self, x, *_):
    return ops.rms_norm(ops.add(x, self.norm2), self.norm, 0.03)


def _norm_of_no_sum(self, x, *_):
    return ops.rms_norm(ops.linear(x, self.project), self.norm, 0.03)


def _rows_cut_of_what_others_read(self, x, positions, batch):
    total = ops.add(x, x)
    return ops.rms_norm(ops.select_rows(total, positions), self.norm, 0.03), total


def _rows_cut_of_another_cut(self, x, positions, batch):
    return ops.select_rows(ops.select_rows(x, positions), positions)


def _product_read_elsewhere(self, x, *_):
    product = ops.linear(x, self.project)
    return ops.silu_mul(product), product


def _activation_of_no_product(self, x, *_):
    return ops.silu_mul(ops.rms_norm(x, self.norm, 0.03))


def _activated_twice(self, x, *_):
    return ops.silu_mul(ops.linear(x, self.project, None, True))


@pytest.mark.parametrize(
    "body",
    [
        _sum_read_before_the_norm,
        _parameter_added,
        _norm_of_no_sum,
        _rows_cut_of_what_others_read,
        _rows_cut_of_another_cut,
        _product_read_elsewhere,
        _activation_of_no_product,
        _activated_twice,
    ],
    ids=lambda body: body.__name__,
)
def test_left_alone(body: Body) -> None:
    _check(body, {})


def test_rows_are_cut_as_early_as_can_be() -> None:
    def body(self, x, positions, batch):
        kept = ops.linear(x, self.project)  # somebody reads all of it
        first, second = ops.split(kept, (HIDDEN // 2, HIDDEN // 2))
        total = ops.add(x, ops.linear(ops.rms_norm(ops.sigmoid_mul(kept, x), self.norm, 0.5), self.project))
        return ops.select_rows(ops.scale(total, 2.0), positions), ops.rms_norm(kept, self.norm2, 0.5), first, second

    graph = _check(body, {"select_rows_early": 1})
    cut = [node.args[0].name for node in graph.find_nodes(op="call_function", target=ops.select_rows)]
    assert cut == ["linear", "input_ids"], "each once, and not after what can be done with fewer rows"


def test_rows_are_cut_of_one_part_of_a_split() -> None:
    """The split itself has all rows, for the other part is read."""

    def body(self, x, positions, batch):
        first, second = ops.split(x, (HIDDEN // 2, HIDDEN // 2))
        return ops.select_rows(ops.scale(first, 2.0), positions), second

    graph = _check(body, {"select_rows_early": 1})
    (cut,) = graph.find_nodes(op="call_function", target=ops.select_rows)
    assert cut.args[0].target is operator.getitem


def test_the_sum_of_fewer_rows_is_normed_with_them() -> None:
    def body(self, x, positions, batch):
        return ops.rms_norm(ops.select_rows(ops.add(x, x), positions), self.norm, 0.03)

    graph = _check(body, {"select_rows_early": 1, "add_rms_norm": 1})
    assert _count(graph) == {"select_rows": 1, "add_rms_norm": 1}


@pytest.mark.parametrize("rows", [[4, 0], [3], []], ids=str)
def test_any_number_of_rows(rows: list[int]) -> None:
    """Of a step that computes the middle of a prompt only, no row is sampled."""

    def body(self, x, positions, batch):
        product = ops.linear(ops.rms_norm(x, self.norm, 0.5), self.project)
        return ops.select_rows(ops.add(x, product), self.logit_rows)

    _check(body, {"select_rows_early": 1}, rows=torch.tensor(rows, dtype=torch.int64))


@pytest.mark.parametrize("name", EACH_ROW)
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    """What the pass supposes of an op: fewer rows give the same as all of them, and none give none."""
    op = ops.OPS[name]
    # Kernels with a layout of their own for a weight are tested with it, on no rows as well.
    kernels = [kernel.run for kernel in candidates(name) if kernel.provider == native.PROVIDER and not kernel.layouts]
    if native.available() == "none":
        kernels = []
    for case in op.cases(torch.float32, torch.Generator().manual_seed(2)):
        named = dict(zip(op.signature.parameters, case.args, strict=False))
        if named.get("residual") is not None:
            continue  # the pass leaves such calls alone
        count = named[EACH_ROW[name][0]].shape[0]
        whole = _tuple(op.reference(*case.args))
        for rows in (torch.arange(count - 1, -1, -2), torch.arange(0)):
            some = [value[rows] if key in EACH_ROW[name] else value for key, value in named.items()]
            for run in (op.reference, *kernels):
                for one, other in zip(whole, _tuple(run(*some)), strict=True):
                    torch.testing.assert_close(one[rows], other, rtol=1e-5, atol=1e-5)


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def test_linear_with_bias_and_activation() -> None:
    graph = _check(lambda self, x, *_: ops.silu_mul(ops.linear(x, self.project, self.norm)), {"linear_silu_mul": 1})
    assert _count(graph) == {"linear": 1}


def test_any_linear_of_the_set_takes_the_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Op("other_linear", ops.linear.reference, cost=ops.linear.cost, cases=ops.linear.cases)

    def body(self, x, *_):
        return ops.silu_mul(other(x, self.project))

    _check(body, {})
    monkeypatch.setattr(passes_module, "GATED_LINEARS", frozenset({"other_linear"}))
    graph = _check(body, {"linear_silu_mul": 1})
    assert _count(graph) == {"other_linear": 1}


def test_every_registered_op_of_the_set_has_the_argument() -> None:
    for name in passes_module.GATED_LINEARS & ops.OPS.keys():
        assert "silu_mul" in ops.OPS[name].signature.parameters
    gated = {name for name, op in ops.OPS.items() if "silu_mul" in op.signature.parameters}
    # Those that later passes put in have it already.
    assert gated - {op.name for op in WHOLE_LINEARS.values()} <= passes_module.GATED_LINEARS


SIZES = (HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM)


def _attend(self, q, batch):
    return ops.paged_attention(q, self.cache, batch, 0.3, None)


def _rotation(norms: bool, eps: tuple[float, float] = (0.5, 0.5), **changes: Any) -> Body:
    """What the attention layer does, from qkv on, with one thing changed."""

    def body(self, x, positions, batch):
        q, k, v = ops.split(x, SIZES)
        if norms:
            q = ops.head_rms_norm(q, self.wide_norm if "wide" in changes else self.q_norm, eps[0])
            if "q only" not in changes:
                k = ops.head_rms_norm(k, self.k_norm, eps[1])
        unrotated = k
        q, k = ops.rope(q, k, positions, self.table, changes.get("rope_dim", DIM))
        early = _attend(self, q, batch) if "early" in changes else None
        ops.kv_write(unrotated if "unrotated" in changes else k, v, self.cache, batch)
        out = _attend(self, q, batch)
        extra = {"part": v, "rotated k": k, "unrotated": unrotated, "early": early}
        return (out, *(value for name, value in extra.items() if name in changes))

    return body


@pytest.mark.parametrize("norms", [False, True])
def test_rotation_is_fused_where_the_write_was(norms: bool) -> None:
    graph = _check(_rotation(norms), {"rope_kv_write": 1})
    assert [node.target.name for node in graph.nodes if node.op == "call_function"] == [
        "rope_kv_write",
        "paged_attention",
    ]
    (fused,) = graph.find_nodes(op="call_function", target=ops.rope_kv_write)
    assert fused.args[3] == (0.5 if norms else 0.0)
    assert [arg if arg is None else arg.target for arg in fused.args[1:3]] == (
        ["q_norm", "k_norm"] if norms else [None, None]
    )


def test_fused_write_comes_before_a_reader_that_takes_no_result_of_it() -> None:
    """A second attention over the same cache depends on the write by its place alone."""

    def body(self, x, positions, batch):
        other = ops.linear(x, self.q_project)
        before = _attend(self, other, batch)
        q, k, v = ops.split(x, SIZES)
        q, k = ops.rope(q, k, positions, self.table, DIM)
        between = _attend(self, other, batch)
        ops.kv_write(k, v, self.cache, batch)
        return before, between, _attend(self, other, batch), _attend(self, q, batch)

    q_project = torch.randn((HEADS * DIM, HIDDEN), generator=torch.Generator().manual_seed(1)) / 8
    model = _Hand(body, q_project=q_project)
    before, between, after, *_ = _run(model, capture(model))
    assert torch.equal(before, between) and not torch.allclose(between, after)
    _check(body, {"rope_kv_write": 1}, q_project=q_project)


def test_partial_rotation_is_fused() -> None:
    generator = torch.Generator().manual_seed(2)
    angles = torch.rand((40, DIM // 4), generator=generator) * 6
    _check(_rotation(True), {"rope_kv_write": 1}, table=torch.cat((angles.cos(), angles.sin()), dim=-1))


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"part": True},
        {"rotated k": True},
        {"unrotated": True},
        {"early": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_rotation_left_alone(norms: bool, changes: dict[str, Any]) -> None:
    _check(_rotation(norms, **changes), {})


def test_rope_of_other_heads_than_the_cache() -> None:
    _check(_rotation(False, rope_dim=2 * DIM), {}, table=torch.rand((40, 2 * DIM)))


@pytest.mark.parametrize("changes", [{"q only": True}, {"wide": True}, {"eps": (0.5, 0.25)}], ids=str)
def test_norms_that_the_fused_op_cannot_do(changes: dict[str, Any]) -> None:
    _check(_rotation(True, **changes), {})


def test_cache_of_other_heads() -> None:
    """The same columns read as heads of another size: rope turned pairs that the fused op would not."""
    generator = torch.Generator().manual_seed(4)
    _check(_rotation(False), {}, cache=make_cache(torch.float32, generator, KV_HEADS * 2, DIM // 2))


def test_more_parts_or_parts_of_two_splits() -> None:
    def more_parts(self, x, positions, batch):
        q, k, v, rest = ops.split(x, (2 * DIM, *SIZES[1:], 2 * DIM))
        q, k = ops.rope(q, k, positions, self.table, DIM)
        ops.kv_write(k, v, self.cache, batch)
        return _attend(self, q, batch), rest

    def two_splits(self, x, positions, batch):
        q, k, _ = ops.split(x, SIZES)
        _, _, v = ops.split(ops.linear(x, self.project), SIZES)
        q, k = ops.rope(q, k, positions, self.table, DIM)
        ops.kv_write(k, v, self.cache, batch)
        return _attend(self, q, batch)

    def values_from_elsewhere(self, x, positions, batch):
        q, k, _ = ops.split(x, SIZES)
        q, k = ops.rope(q, k, positions, self.table, DIM)
        ops.kv_write(k, k, self.cache, batch)
        return _attend(self, q, batch)

    for body in (more_parts, two_splits, values_from_elsewhere):
        _check(body, {})


def test_keys_and_queries_exchanged() -> None:
    """Equal sizes: only where the parts come from tells them apart."""
    narrow = torch.randn((3 * KV_HEADS * DIM, HIDDEN), generator=torch.Generator().manual_seed(6)) / 8

    def exchanged(norms: bool, order: slice) -> Body:
        def body(self, x, positions, batch):
            *q_and_k, v = ops.split(ops.linear(x, self.narrow), (KV_HEADS * DIM,) * 3)
            q, k = q_and_k[order]
            if norms:
                q, k = ops.head_rms_norm(q, self.q_norm, 0.5), ops.head_rms_norm(k, self.k_norm, 0.5)
            q, k = ops.rope(q, k, positions, self.table, DIM)
            ops.kv_write(k, v, self.cache, batch)
            return _attend(self, q, batch)

        return body

    for norms in (False, True):
        _check(exchanged(norms, slice(None)), {"rope_kv_write": 1}, narrow=narrow)
        _check(exchanged(norms, slice(None, None, -1)), {}, narrow=narrow)


def test_without_the_cache_at_hand_nothing_is_fused() -> None:
    """A graph not made by `capture` does not say what its attributes are."""
    graph = capture(_Hand(_rotation(True)))
    for node in graph.nodes:
        node.meta.clear()
    assert run_passes(graph)["rope_kv_write"] == 0
    assert graph.find_nodes(op="call_function", target=ops.kv_write)


def test_a_linear_takes_in_only_what_is_its_own() -> None:
    """The norm that others read stays, as does the sum whose product others read."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
            self.norm = nn.Parameter(torch.ones(8))

        def forward(self, input_ids: Any, positions: Any, batch: Any, logit_rows: Any) -> Any:
            normed = ops.rms_norm(input_ids, self.norm, 1e-6)
            one, two = ops.linear(normed, self.first, None), ops.linear(normed, self.second, None)
            total = ops.add(one, two)
            return ops.add(total, one)

    graph = capture(Shared())
    counts = run_passes(graph, "cuda")
    # `two` is read once and takes the sum in; `one` is read twice, and the norm by both.
    assert (counts["linear_add"], counts["norm_linear"]) == (1, 0)
    assert _count(graph) == {"rms_norm": 1, "linear": 1, "fused_linear": 1, "add": 1}
