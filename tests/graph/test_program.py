"""A lowered Program computes what the eager model computes, in every architecture, and holds on to nothing."""

from __future__ import annotations

import dataclasses
import operator
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from skyline import ops
from skyline.checkpoint.config import load_config
from skyline.graph import capture, lower, run_passes
from skyline.kernels import NoKernelError, Request, choose
from skyline.kernels.cpu import native
from skyline.models import create_model, kv_caches
from skyline.ops import AttentionBatch
from skyline.runner.memory import peak_activation_bytes
from tests.models.harness import CPU, PagedRunner, load_ours, save_tiny

FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "Qwen3Moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_tiny(tmp_path, request.param, **FAMILIES[request.param])
    return tmp_path


def _program(model: nn.Module, **options: bool):
    graph = capture(model)
    run_passes(graph)
    return lower(graph, model, CPU, torch.float32, **options)


def _run(model: nn.Module) -> list[torch.Tensor]:
    runner = PagedRunner(model)
    out = runner.step(("a", [1, 2, 3, 4, 5, 6, 7]), ("b", [9, 8, 7]))
    out += runner.step(("b", [11]), ("c", list(range(20))), ("a", [12]))
    return out


class _Replayed(nn.Module):
    """The program in the model's place, for the harness."""

    def __init__(self, model: nn.Module, **options: bool) -> None:
        super().__init__()
        self.model = model
        self.program = _program(model, **options)

    def forward(self, *inputs):
        return self.program(*inputs).clone()  # valid until the next step only


def test_program_equals_eager(folder: Path) -> None:
    eager = _run(load_ours(folder))
    replayed = _run(_Replayed(load_ours(folder)))
    for expected, actual in zip(eager, replayed, strict=True):
        assert torch.equal(expected, actual)


def test_invariant_program_is_close_and_invariant(folder: Path) -> None:
    eager = _run(load_ours(folder))
    invariant = _run(_Replayed(load_ours(folder), batch_invariant=True))
    for expected, actual in zip(eager, invariant, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariance_is_bitwise(folder: Path, dtype: torch.dtype) -> None:
    """The same tokens, alone and whole, or in chunks among neighbours: the same bits."""
    tokens = [5, 3, 90, 7, 7, 12, 44, 2, 61, 30, 8, 9, 10, 11, 70, 71, 72, 73, 74, 75, 76, 77]
    alone = PagedRunner(_Replayed(load_ours(folder, dtype), batch_invariant=True)).step(("x", tokens))[0]
    for cuts, neighbours in (([22], [30]), ([1] * 22, [1, 17]), ([5, 11, 6], [3, 2, 50]), ([16, 6], [])):
        runner = PagedRunner(_Replayed(load_ours(folder, dtype), batch_invariant=True))
        parts, done = [], 0
        for index, cut in enumerate(cuts):
            others = [(f"n{index}-{i}", list(range(length))) for i, length in enumerate(neighbours)][: 1 + index % 3]
            work = [*others, ("x", tokens[done : done + cut])]
            parts.append(runner.step(*work)[-1])
            done += cut
            if index == 2:
                neighbours = neighbours[:1]
        assert torch.equal(torch.cat(parts), alone), f"cut at {cuts}"


def test_launches_and_capture_holds_only_ops(folder: Path) -> None:
    model = load_ours(folder)
    graph = capture(model)
    assert {
        node.target.name for node in graph.nodes if node.op == "call_function" and node.target is not operator.getitem
    }
    program = _program(model)
    layers = len(kv_caches(model))
    launches = program.launches()
    assert launches["paged_attention"] == launches["rope_kv_write"] == layers
    assert launches["add_rms_norm"] == 2 * layers
    assert (launches["embedding"], launches["select_rows"]) == (1, 2)


def test_activations_are_freed_after_their_last_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of kernels that make their own results."""
    model = load_ours(folder)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watch(run):
        def wrapped(*arguments):
            nonlocal most
            result = run(*arguments)
            if isinstance(result, torch.Tensor):
                alive.append(weakref.ref(result))
            most = max(most, sum(ref() is not None for ref in alive))
            return result

        return wrapped

    program = _program(model)  # lowered for no instruction set: torch's kernels
    program.calls = [
        dataclasses.replace(call, kernel=dataclasses.replace(call.kernel, run=watch(call.kernel.run)))
        for call in program.calls
    ]
    assert not program.plan.buffers
    _run(_Holder(model, program))
    assert most <= 8, "a step must not keep the activations of layers it has left"


def test_planned_results_share_few_buffers(folder: Path) -> None:
    """And no result is overwritten while somebody still reads it: the numbers are those of the eager model."""
    if native.available() == "none":
        pytest.skip("needs the CPU kernels")
    model = load_ours(folder)
    graph = capture(model)
    run_passes(graph)
    program = lower(graph, model, torch.device("cpu"), torch.float32, isa=native.available())
    expected, actual = torch.cat(_run(model)), torch.cat(_run(_Holder(model, program)))
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert len(program.plan.places) > 10
    assert len(program.plan.buffers) <= 10, "of rows of tokens and of logits"
    small = program.plan.capacity
    program.reserve(3 * small[0], 3 * small[1])
    assert torch.equal(torch.cat(_run(_Holder(model, program))), actual)


class _Holder(nn.Module):
    def __init__(self, model: nn.Module, program) -> None:
        super().__init__()
        self.model, self.program = model, program

    def forward(self, *inputs):
        return self.program(*inputs).clone()  # valid until the next step only


def test_peak_activation_bytes_grow_with_the_tokens(folder: Path) -> None:
    model = create_model(load_config(folder), torch.float32, "meta")
    program = _program(model)
    small, large = peak_activation_bytes(program, 16, 1), peak_activation_bytes(program, 64, 1)
    hidden = 32 * 4
    assert small >= 16 * hidden
    assert 3.0 < large / small < 4.5


def test_forward_may_use_only_ops() -> None:
    class Bad(nn.Module):
        def forward(self, input_ids, positions, batch, logit_rows):
            return ops.add(input_ids, positions).float()

    with pytest.raises(ValueError, match="only ops"):
        capture(Bad())


def test_unknown_tensor_is_refused() -> None:
    class Bad(nn.Module):
        def forward(self, input_ids, positions, batch, logit_rows):
            return ops.add(input_ids, torch.ones(3))

    with pytest.raises(ValueError, match="not an attribute"):
        capture(Bad())


def test_choice_is_explained() -> None:
    choice = choose(Request(ops.linear, "cpu", torch.float32))
    assert choice.kernel.provider == "torch"
    assert dict(choice.rejected)["torch-invariant"]
    choice = choose(Request(ops.linear, "cpu", torch.float32, batch_invariant=True))
    assert choice.kernel.provider == "torch-invariant"


def test_an_op_without_a_kernel_names_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skyline.kernels.registry._KERNELS", {})
    with pytest.raises(NoKernelError, match="linear on cpu"):
        choose(Request(ops.linear, "cpu", torch.float32))


def test_batch_metadata() -> None:
    batch = AttentionBatch.build([[3, 1], [2]], [5, 0], [2, 3], 4, CPU)
    assert batch.tables[0].slot_mapping.tolist() == [1 * 4 + 1, 1 * 4 + 2, 8, 9, 10]
    assert batch.query_starts.tolist() == [0, 2, 5]
    assert batch.context_lens.tolist() == [7, 3]
    assert batch.tables[0].block_tables.tolist() == [[3, 1], [2, 0]]
