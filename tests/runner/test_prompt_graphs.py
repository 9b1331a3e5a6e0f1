"""Steps with prompts as recorded pieces: what is cut, and that replaying it computes what the Program does.

Without a GPU kernels run in Triton's interpreter, and what is replayed is computed again, into the same memory.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from skyline import ops
from skyline.checkpoint.config import load_config
from skyline.engine.config import EngineConfig
from skyline.engine.sampling_params import SamplingParams
from skyline.graph import Call, Program
from skyline.kernels import Kernel
from skyline.kernels import triton as provider
from skyline.kernels.gpu import GPUS
from skyline.kernels.triton import norms
from skyline.models import create_model, kv_caches, randomize
from skyline.ops import AttentionBatch
from skyline.runner import prompt_graphs, recording
from skyline.runner.loader import build_program, how_other_steps_run
from skyline.runner.prompt_graphs import PromptGraphs, cut, padded, why_not_in_pieces
from skyline.runner.recording import Recording, borrowed, record_part
from tests.models.families import FAMILIES
from tests.models.harness import save_tiny
from tests.runner.test_decode_graphs import DEVICE, engine, run
from tests.tiny import make_tiny_checkpoint

BLOCK = 4
_MOE = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3": ("Qwen3", {"head_dim": 16}),
    "Qwen3Moe": ("Qwen3Moe", _MOE),
    **{name: (name, FAMILIES[name]) for name in ("DeepseekV3", "DeepseekV32", "GptOss", "Qwen3Next")},
}


class _Memory:
    """What recordings made, as the allocator of their memory would treat it: what nobody held any more when a part was
    recorded may be that part's now, and is spoilt when it is replayed."""

    def __init__(self) -> None:
        self._made: list[tuple[weakref.ref[Tensor], Tensor]] = []  # what a part returned, and the memory of it

    def made(self, tensors: list[Tensor]) -> list[Tensor]:
        memory = [tensor.detach() for tensor in tensors]
        self._made += [(weakref.ref(tensor), own) for tensor, own in zip(tensors, memory, strict=True)]
        return memory

    def given_back(self) -> list[Tensor]:
        held = {own.untyped_storage().data_ptr() for original, own in self._made if original() is not None}
        return [own for original, own in self._made if own.untyped_storage().data_ptr() not in held]


class _Graph:
    """Computes anew what was recorded, and puts it where the recording's results are."""

    def __init__(self, run: Callable[[], Any], memory: list[Tensor], spoils: list[Tensor]) -> None:
        self._run, self._memory, self._spoils = run, memory, spoils

    def replay(self) -> None:
        results = [result.clone() for result in self._run()]
        for spoilt in self._spoils:
            spoilt.fill_(float("nan") if spoilt.is_floating_point() else -1)
        for own, result in zip(self._memory, results, strict=True):
            own.copy_(result)

    def pool(self) -> str:
        return "the pool"


@pytest.fixture(autouse=True)
def pools(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """That recordings were given. On a GPU they are CUDA's."""
    found: list[Any] = []
    memory = _Memory()

    def part(run: Callable[[], Any], pool: Any = None) -> Recording[Any]:
        found.append(pool)
        if DEVICE.type == "cuda":
            return record_part(run, pool)
        if not isinstance(run, partial):  # what holds the memory
            return Recording(_Graph(run, [], []), run())  # type: ignore[arg-type]
        compute, piece, given = run.func, run.args[0], dict(run.args[1])
        # What it reads is memory as well, which others may get when it has been read.
        inputs = {slot: value.detach() for slot, value in given.items()}
        del given
        result, spoils = run(), memory.given_back()
        spoils = [own for own in spoils if all(not _shares(own, value) for value in inputs.values())]
        again = lambda: compute(piece, dict(inputs))  # noqa: E731
        return Recording(_Graph(again, memory.made(result), spoils), result)  # type: ignore[arg-type]

    monkeypatch.setattr(prompt_graphs, "record_part", part)
    monkeypatch.setattr(PromptGraphs, "_seconds", lambda *_: 0.0)  # of models so small it tells nothing
    if DEVICE.type == "cpu":
        monkeypatch.setattr(prompt_graphs, "recording_stream", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(prompt_graphs, "borrowed", lambda tensor: tensor.detach())
    return found


def _shares(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the order of things is looked at: the interpreter takes seconds."""
    monkeypatch.setattr(type(norms._norm_kernel), "run", lambda *_, **__: None)
    monkeypatch.setattr(PromptGraphs, "_differs", lambda *_: False)


def _program(folder: Path, name: str, **options: Any) -> tuple[Program, list[Any]]:
    family, settings = MODELS[name]
    save_tiny(folder, family, **settings)
    model = create_model(load_config(folder), torch.float32, DEVICE)
    randomize(model, 1)
    gpu = GPUS["h200"] if DEVICE.type == "cpu" else None
    program = build_program(EngineConfig(model="", device="cuda", **options), model, torch.float32, gpu=gpu)
    caches = kv_caches(model)
    for cache in caches:
        cache.allocate(40, BLOCK, DEVICE)
        for part in cache.tensors:
            part.zero_()
    return program, caches


def _steps(lengths: list[list[tuple[int, int]]]) -> Iterator[tuple[Tensor, Tensor, AttentionBatch, Tensor]]:
    """By step, (start, length) of each request; each has ten blocks of its own, and one recurrent state."""
    generator = torch.Generator().manual_seed(4)
    for step in lengths:
        tables = [[10 * request + block for block in range(10)] for request in range(len(step))]
        starts, counts = [start for start, _ in step], [count for _, count in step]
        states = list(range(len(step)))
        reads = [state if start else -1 for state, start in zip(states, starts, strict=True)]
        batch = AttentionBatch.build(tables, starts, counts, BLOCK, DEVICE, (reads, states))
        positions = torch.tensor([start + place for start, count in step for place in range(count)], device=DEVICE)
        ids = torch.randint(0, 90, positions.shape, generator=generator).to(DEVICE)
        yield ids, positions, batch, torch.tensor(counts, device=DEVICE).cumsum(0) - 1


# Of 14 and 8 tokens, so that padding has rows of the other step; the second goes on with what the first began.
_STEPS = [[(0, 10), (0, 4)], [(10, 1), (4, 6), (0, 1)]]


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_replaying_computes_what_the_program_does(name: str, tmp_path: Path) -> None:
    program, caches = _program(tmp_path, name)
    graphs = PromptGraphs(program, DEVICE, 64)
    assert graphs.why_not is None
    graphs._known[16] = prompt_graphs._Recorded(uses=1)
    assert not graphs.record_next() and graphs.recorded == [16]
    for inputs in _steps(_STEPS):
        before = copy.deepcopy([cache.tensors for cache in caches])
        expected = program(*inputs).clone()
        after = copy.deepcopy([cache.tensors for cache in caches])
        for cache, tensors in zip(caches, before, strict=True):
            for part, old in zip(cache.tensors, tensors, strict=True):
                part.copy_(old)
        got = graphs(*inputs)
        assert graphs.replayed
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        for cache, tensors in zip(caches, after, strict=True):
            for part, wanted in zip(cache.tensors, tensors, strict=True):
                torch.testing.assert_close(part.float(), wanted.float(), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", MODELS)
def test_only_what_sees_the_requests_is_launched(name: str, tmp_path: Path) -> None:
    program, _ = _program(tmp_path, name)
    pieces = cut(program)
    assert [call for piece in pieces for call in piece.calls] == program.calls
    assert all(first.recorded != second.recorded for first, second in pairwise(pieces))
    for piece in pieces:
        assert not piece.recorded or all(2 not in call.arguments for call in piece.calls)
        assert not piece.recorded or any(not call.is_view for call in piece.calls)
    launched = [call for piece in pieces if not piece.recorded for call in piece.calls if not call.is_view]
    assert launched[-1].results == (program.output,), "logits have a row for each that is sampled"
    behind = [call.op.name for call in launched if 2 not in call.arguments]
    assert behind[0] == "select_rows" and len(behind) <= 3, "what computes logits, and nothing else"
    assert f"{sum(piece.recorded for piece in pieces)} recorded pieces" in how_other_steps_run(
        EngineConfig(model="", device="cuda"), program
    )


def test_buffers_are_used_again_by_later_layers(tmp_path: Path) -> None:
    program, _ = _program(tmp_path, "Qwen3")
    buffers = PromptGraphs(program, DEVICE, 64)._buffers
    layers = sum(call.op.name == "rope_attention" for call in program.calls)
    assert len(buffers) == layers > 1 and len({buffer.data_ptr() for buffer in buffers.values()}) == 1
    program, _ = _program(tmp_path / "other", "Qwen3Next")
    graphs = PromptGraphs(program, DEVICE, 64)
    buffers = graphs._buffers
    for index, piece in enumerate(graphs._pieces):
        live = [slot for slot in buffers if _made(graphs, slot) < index and _last(graphs, slot) >= index]
        assert len({buffers[slot].data_ptr() for slot in live}) == len(live), piece


def _made(graphs: PromptGraphs, slot: int) -> int:
    return next(i for i, piece in enumerate(graphs._pieces) if slot in piece.results)


def _last(graphs: PromptGraphs, slot: int) -> int:
    return max(i for i, piece in enumerate(graphs._pieces) if slot in piece.reads)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 128, 129, 256, 257, 300, 1000, 1025, 2048, 8192])
def test_sizes_leave_little_padding(tokens: int) -> None:
    size = padded(tokens)
    assert size >= tokens and size - tokens < max(16, tokens / 8) and padded(size) == size


@torch.inference_mode()
@pytest.mark.usefixtures("nothing_is_computed")
def test_when_it_records(tmp_path: Path, pools: list[Any]) -> None:
    program, _ = _program(tmp_path, "Qwen3")
    graphs = PromptGraphs(program, DEVICE, 32, reserve=1000)
    small, large = next(_steps([[(0, 20)]])), next(_steps([[(0, 33)]]))
    assert not graphs.record_next(), "nothing has occurred"
    for use in range(1, 5):
        graphs(*small)
        assert graphs.due == (use == 4) and not graphs.replayed and graphs.recorded == []
        graphs(*large)
    graphs.record_due()
    pieces = sum(piece.recorded for piece in cut(program))
    assert graphs.recorded == [32] and not graphs.due
    assert pools[0] is None and len(pools) == 1 + pieces and len(set(pools[1:])) == 1, "all share one memory"
    graphs(*small)
    assert graphs.replayed
    graphs(*large)
    assert not graphs.replayed, "more tokens than are recorded"
    assert not graphs.record_next()
    program.observe(lambda call, run: run)
    graphs(*small)
    assert not graphs.replayed, "every call is to be seen"
    program.observe(None)
    graphs(*small)
    assert graphs.replayed


@torch.inference_mode()
@pytest.mark.usefixtures("nothing_is_computed")
def test_a_recording_that_fails_leaves_steps_call_by_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program, _ = _program(tmp_path, "Qwen3")
    graphs = PromptGraphs(program, DEVICE, 64)
    inputs = next(_steps([[(0, 20)]]))
    graphs(*inputs)

    def fails(run: Callable[[], Any], pool: Any = None) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(prompt_graphs, "record_part", fails)
    with caplog.at_level(logging.WARNING):
        assert not graphs.record_next() and not graphs.record_next()
    assert len(caplog.records) == 1 and "of 32 tokens, that failed: out of memory" in caplog.text
    assert not graphs._buffers and graphs._holds is None
    for _ in range(6):
        assert graphs(*inputs).shape[0] == 1 and not graphs.due and not graphs.replayed


@torch.inference_mode()
@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize("worth", [True, False])
def test_what_the_device_takes_longer_for_is_launched(
    worth: bool, tmp_path: Path, pools: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, _ = _program(tmp_path, "Qwen3")
    graphs = PromptGraphs(program, DEVICE, 64)
    inputs = next(_steps([[(0, 20)]]))
    monkeypatch.setattr(graphs, "_seconds", lambda known: 0.0 if worth else 1e3)
    for _ in range(5):
        graphs(*inputs)
        graphs.record_due()
    made = len(pools)
    assert made > 1 and graphs.recorded == ([32] if worth else []) and graphs.replayed == worth
    assert not graphs.record_next() and not graphs.due and len(pools) == made, "it is not tried again"


@torch.inference_mode()
def test_a_kernel_that_torch_takes_the_place_of_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pools: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Its reference may look at values, which would break the recording, and torch's allocator with it."""
    program, _ = _program(tmp_path, "Qwen3")
    graphs = PromptGraphs(program, DEVICE, 64)
    graphs(*next(_steps([[(0, 20)]])))

    def does_not_fit(*_: object, **__: object) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(type(norms._norm_kernel), "run", does_not_fit)
    monkeypatch.setattr(provider, "FALLS_BACK", True)
    with caplog.at_level(logging.WARNING):
        assert not graphs.record_next()
    assert "torch takes a kernel's place" in caplog.text and not pools and not graphs.recorded


def test_what_is_in_the_way_is_told(tmp_path: Path) -> None:
    program, _ = _program(tmp_path, "Qwen3")
    pieces = cut(program)
    assert why_not_in_pieces(program, pieces) is None
    pieces[0].crossing = [slot for call in program.calls if call.op.name == "select_rows" for slot in call.results]
    assert "(1, " in (why_not_in_pieces(program, pieces) or "")
    assert why_not_in_pieces(program, []) == "no call goes by the number of tokens alone"
    model = create_model(load_config(tmp_path), torch.float32, "meta")
    torch_alone = build_program(
        EngineConfig(model="", device="cuda"), model, torch.float32, gpu=GPUS["h200"].without("triton")
    )
    assert "runs in torch" in (why_not_in_pieces(torch_alone, cut(torch_alone)) or "")
    config = EngineConfig(model="", device="cuda", cuda_graphs=False)
    assert how_other_steps_run(config, program) == "call by call: CUDA graphs are switched off"


def test_parts_of_what_another_piece_gives_are_read_in_their_own(tmp_path: Path) -> None:
    """A part keeps no memory of what it is a part of, once that counts as read."""
    program, _ = _program(tmp_path, "Qwen3Next")
    pieces = cut(program)
    assert why_not_in_pieces(program, pieces) is None
    view = next(call for piece in pieces for call in piece.calls if call.is_view)
    piece = next(piece for piece in pieces if view in piece.calls)
    piece.results = [*piece.results, view.results[0]]
    piece.calls = piece.calls[piece.calls.index(view) :]
    assert "a part of what another piece gives" in (why_not_in_pieces(program, pieces) or "")


def test_the_same_tokens_as_on_the_cpu(tmp_path: Path) -> None:
    """While the engine runs: two sizes are recorded as the load asks for them."""
    folder = make_tiny_checkpoint(tmp_path / "tiny", "qwen3")
    requests = {
        str(number): ([(number * 37 + place) % 500 + 1 for place in range(9 + number)], SamplingParams(max_tokens=3))
        for number in range(9)
    }
    core, runner = engine(folder, None, "cuda")
    runner.prompts = PromptGraphs(runner._program, DEVICE, 64)
    got = run(core, requests)
    counts = core.stats()
    assert counts.prompts_replayed and counts.prompts_eager >= 4 and counts.prompts_recorded >= 1
    assert not runner.idle() and core.stats().prompts_recorded == len(runner.prompts.recorded)
    runner.close()
    other, plain = engine(folder, None, "cpu")
    assert got == run(other, requests)
    assert other.stats().prompts_eager and not other.stats().prompts_replayed
    plain.close()


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there it is the tensor itself")
def test_borrowed_memory_is_the_same() -> None:
    base = torch.arange(60, device=DEVICE, dtype=torch.bfloat16).view(5, 12)
    for tensor in (base, base[:, 3:7], base[2:].t()):
        alias = borrowed(tensor)
        assert torch.equal(alias, tensor) and alias.data_ptr() == tensor.data_ptr()
    base.zero_()
    assert not alias.any()


@pytest.mark.parametrize("fails", [True, False])
def test_a_part_ends_and_torch_is_on_its_stream(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens while it is recorded."""
    seen: list[str] = []

    class Graph:
        def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
            seen.append(f"begin in {pool}, {capture_error_mode}")

        def capture_end(self) -> None:
            seen.append("end")

    def run() -> str:
        if fails:
            raise torch.OutOfMemoryError("out of memory")
        return "what it returns"

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "of recordings")
    monkeypatch.setattr(torch.cuda, "set_stream", seen.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append("wait"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *given, name=name: seen.append(f"{name}{given}"), raising=False)
    recording._stream.cache_clear()
    with contextlib.suppress(torch.OutOfMemoryError), recording.recording_stream(torch.device("cuda")):
        assert record_part(run, "the pool").result == "what it returns"
    recording._stream.cache_clear()
    given_up = ["_cuda_endAllocateToPool(3, 'the pool')", "_cuda_releasePool(3, 'the pool')"] if fails else []
    assert seen == ["wait", "of recordings", "begin in the pool, thread_local", "end", *given_up, "main"]


class _Chain:
    """In place of a Program: calls that add, some of which see the requests. Their first inputs are slots 0 to 3."""

    observed = False

    def __init__(self, calls: list[tuple[tuple[int, ...], int]]) -> None:
        def run(*given: Tensor | None) -> Tensor:
            return torch.stack([each.float() for each in given if each is not None]).sum(0)

        kernel = Kernel("add", "triton", run, lambda request: None)
        last = {slot: index for index, (arguments, _) in enumerate(calls) for slot in arguments if slot > 3}
        self.calls = [
            Call(ops.add, str(index), kernel, arguments, (result,), tuple(s for s in last if last[s] == index))
            for index, (arguments, result) in enumerate(calls)
        ]
        self.output = calls[-1][1]

    def slots(self, inputs: tuple[Any, ...] = ()) -> list[Any]:
        return [*inputs, *[None] * (self.output + 1 - len(inputs))]

    def trace_sizes(self, tokens: int, rows: int, visit: Callable[..., None]) -> None:
        for call in self.calls:
            visit(call, (), (torch.empty(tokens, device="meta"),))


def _chain() -> _Chain:
    """Slot 6 is given by the first piece, and read by the second launched call, behind another piece."""
    first, second = [((0,), 4), ((4, 1), 5), ((4, 4), 6), ((5, 2), 7)], [((7, 1), 8), ((6, 8, 2), 9)]
    return _Chain([*first, *second, ((9, 8), 10), ((10, 3), 11)])


@torch.inference_mode()
@pytest.mark.skipif(DEVICE.type == "cuda", reason="its memory is one of the CPU")
def test_what_a_later_launched_call_reads_is_kept_until_then() -> None:
    chain = _chain()
    pieces = cut(chain)  # type: ignore[arg-type]
    assert [piece.recorded for piece in pieces] == [True, False, True, False, True, False]
    assert [piece.crossing for piece in pieces] == [[5, 6], [7], [8], [9], [10], []]
    graphs = PromptGraphs(chain, torch.device("cpu"), 32)  # type: ignore[arg-type]
    assert graphs.why_not is None
    graphs._known[16] = prompt_graphs._Recorded(uses=1)
    graphs.record_next()
    for tokens in (16, 5):
        inputs = (torch.randint(50, (tokens,)), torch.arange(tokens), None, torch.zeros(tokens))
        slots = chain.slots(inputs)
        prompt_graphs._compute(chain.calls, slots)
        assert torch.equal(graphs._replay(graphs._known[16], tokens, inputs), slots[chain.output])


@torch.inference_mode()
@pytest.mark.skipif(DEVICE.type == "cuda", reason="its memory is one of the CPU")
def test_what_is_replayed_wrongly_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As if everything were let go too early: a piece in between spoils slot 6."""
    monkeypatch.setattr(_Memory, "given_back", lambda memory: [own for _, own in memory._made])
    graphs = PromptGraphs(_chain(), torch.device("cpu"), 32)  # type: ignore[arg-type]
    graphs._inputs += 3
    graphs._known[16] = prompt_graphs._Recorded(uses=1)
    with caplog.at_level(logging.WARNING):
        assert not graphs.record_next()
    assert graphs.recorded == [] and "what is replayed is not what the calls compute" in caplog.text
