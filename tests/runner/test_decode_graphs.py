"""Decode steps as they are recorded on a GPU: static inputs, padding, block tables that stay on the device.

Without a GPU kernels run in Triton's interpreter, and what is replayed is computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from skyline.checkpoint.config import load_config
from skyline.engine.config import EngineConfig
from skyline.engine.core import EngineCore
from skyline.engine.messages import EngineRequest, StepPlan
from skyline.engine.sampling_params import SamplingParams
from skyline.engine.scheduler import Limits
from skyline.kernels import triton as provider
from skyline.kernels.gpu import GPUS
from skyline.models import create_model, kv_caches, randomize
from skyline.ops import AttentionBatch
from skyline.runner import decode_graphs
from skyline.runner.decode_graphs import DecodeGraphs, graph_sizes, why_not_recorded
from skyline.runner.decode_replay import Decoded
from skyline.runner.loader import build_program
from skyline.runner.memory import group_caches
from skyline.runner.model_runner import ModelRunner
from skyline.runner.recording import Recording, record
from skyline.runner.sampler import Sampler
from tests.kernels.triton import conftest  # noqa: F401  mends the interpreter
from tests.tiny import make_tiny_checkpoint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS, LENGTH, BLOCK = 5, 64, 4


def engine(folder: Path, graphs: bool | None, device: str, **changes: object) -> tuple[EngineCore, ModelRunner]:
    config = EngineConfig(model=str(folder), device=device, block_size=BLOCK, dtype="float32")
    model_config = load_config(folder)
    model = create_model(model_config, torch.float32, DEVICE if device == "cuda" else "cpu")
    randomize(model, 1)
    gpu = GPUS["h200"] if device == "cuda" and DEVICE.type == "cpu" else None
    program = build_program(config, model, torch.float32, gpu=gpu)
    place = DEVICE if device == "cuda" else torch.device("cpu")
    groups = group_caches(kv_caches(model))
    for group in groups:
        for cache in group.caches:
            cache.allocate(40, BLOCK, place)
            for part in cache.tensors:
                part.fill_(float("nan"))
    token_ids = torch.zeros((SLOTS + 1, LENGTH + 1), dtype=torch.int32, device=place)
    sampler = Sampler(
        vocab_size=model_config.vocab_size,
        max_slots=SLOTS,
        device=place,
        token_ids=token_ids,
        eos_token_ids=[],
        grammar_compiler=None,
    )
    runner = ModelRunner(program, sampler, token_ids, block_size=BLOCK, device=place, graphs=graphs)
    limits = Limits(
        num_blocks=40, block_size=BLOCK, max_num_seqs=SLOTS, max_num_batched_tokens=16, max_model_len=LENGTH
    )
    return EngineCore(limits, runner), runner


def run(core: EngineCore, requests: dict[str, tuple[list[int], SamplingParams]]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    waiting = list(requests.items())
    while waiting or core.has_work:
        if waiting:  # they come one after the other, so that the number of rows changes
            name, (prompt, params) = waiting.pop(0)
            assert core.add(EngineRequest(name, prompt, params)) is None
        for output in core.step():
            assert output.error is None, output.error
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


class _Graph:
    """Computes anew what was recorded, and puts it where the recording's results are."""

    def __init__(self, run: Callable[[], Decoded], result: Decoded) -> None:
        self._run, self._result, self.replays = run, result, 0

    def replay(self) -> None:
        self.replays += 1
        again = self._run()
        for part in ("logits", "tokens", "tops"):
            getattr(self._result, part).copy_(getattr(again, part))

    def pool(self) -> str:
        return "the pool"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pools that recordings were given. On a GPU they are CUDA's."""
    pools: list[Any] = []

    def again(run: Callable[[], Decoded], pool: Any) -> Recording[Decoded]:
        pools.append(pool)
        if DEVICE.type == "cuda":
            return record(run, pool)
        result = run()
        return Recording(_Graph(run, result), result)  # type: ignore[arg-type]

    monkeypatch.setattr(decode_graphs, "record", again)
    return pools


@pytest.mark.parametrize("graphs", [False, True] if DEVICE.type == "cuda" else [True])
def test_the_same_tokens_as_on_the_cpu(tmp_path: Path, graphs: bool, recorder: list[Any]) -> None:
    folder = make_tiny_checkpoint(tmp_path / "tiny", "qwen3")
    requests = {
        str(number): (
            [(number * 37 + place) % 500 + 1 for place in range(length)],
            SamplingParams(temperature=0.8 if number == 2 else 0, seed=number, max_tokens=tokens),
        )
        for number, (length, tokens) in enumerate(((3, 9), (17, 4), (6, 7), (1, 12)))
    }
    core, runner = engine(folder, graphs, "cuda")
    assert runner.recorded_sizes == []
    got = run(core, requests)
    runner.close()
    counts = core.stats()
    assert bool(counts.decode_replayed) == graphs and counts.decode_eager and counts.decode_recorded == len(recorder)
    other, plain = engine(folder, None, "cpu")
    assert got == run(other, requests)
    plain.close()
    assert bool(runner.recorded_sizes) == graphs


def test_sizes_leave_little_padding() -> None:
    for most in (1, 5, 64, 256, 1000):
        sizes = graph_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == most
        for count in range(1, most + 1):
            size = next(size for size in sizes if size >= count)
            assert size - count <= max(2, count // 2, 0) or size - count < 8
            assert size - count < size * (0.3 if count >= 17 else 0.5)


def test_ops_that_look_at_values_are_not_recorded(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "tiny", "qwen3")
    model = create_model(load_config(folder), torch.float32, "meta")
    config = EngineConfig(model=str(folder), device="cuda")
    assert why_not_recorded(build_program(config, model, torch.float32, gpu=GPUS["h200"])) is None
    old = build_program(config, model, torch.float32, gpu=GPUS["h200"].without("triton"))
    reason = why_not_recorded(old)
    assert reason is not None and "torch" in reason
    assert decode_graphs.graph_sizes(1) == [1]


def test_a_kernel_that_does_not_compile_ends_recorded_steps_but_not_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its reference goes by numbers of the host, which are made up in steps that may be recorded."""
    folder = make_tiny_checkpoint(tmp_path / "tiny", "qwen3")
    requests = {str(n): ([n + 1] * (3 * n + 2), SamplingParams(temperature=0, max_tokens=4)) for n in range(2)}
    core, runner = engine(folder, True, "cuda")

    def around(call: Any, launch: Callable[..., Any]) -> Callable[..., Any]:
        error = OutOfResources(300_000, 232_448, "shared memory")
        by_reference = lambda *arguments: provider.by_reference(call.op.name, arguments, error)  # noqa: E731
        return by_reference if call.op.name == "rope_attention" else launch

    runner._program.observe(around)
    with caplog.at_level(logging.WARNING):
        got = run(core, requests)
    runner.close()
    other, plain = engine(folder, None, "cpu")
    assert got == run(other, requests)
    plain.close()
    assert len(caplog.records) == 1 and "rope_attention does not compile" in caplog.text
    assert not runner.recorded_sizes and core.stats().decode_eager and not core.stats().decode_replayed


class _Model:
    """In place of a Program: counts how often each state was written, and what was asked of it."""

    def __init__(self) -> None:
        self.states = torch.zeros(8, dtype=torch.int64)
        self.sizes: list[int] = []
        self.error: Exception | None = None

    def __call__(self, ids: Tensor, positions: Tensor, batch: AttentionBatch, rows: Tensor) -> Tensor:
        assert batch.device_only
        self.sizes.append(len(ids))
        if batch.state_blocks is not None:
            for block in batch.state_blocks[1].tolist():
                if block >= 0:
                    self.states[block] += 1
        if self.error is not None:
            raise self.error
        return torch.nn.functional.one_hot((ids.long() + 1) % 16, 16).float()


def _graphs(model: _Model) -> tuple[DecodeGraphs, Callable[[list[int], list[int]], Decoded | None]]:
    """For 4 requests of up to 8 tokens, and what steps: slots and the states they write."""
    token_ids, tables = torch.zeros((5, 9), dtype=torch.int32), [np.zeros((4, 2), np.int32)]
    graphs = DecodeGraphs(model, token_ids, table_shape=(1, 4, 2), block_size=BLOCK)  # type: ignore[arg-type]

    def step(slots: list[int], states: list[int]) -> Decoded | None:
        count = len(slots)
        plan = StepPlan(0, slots=slots, starts=[1] * count, lengths=[1] * count, samples=[True] * count)
        plan.state_reads = plan.state_writes = states
        with torch.inference_mode():
            return graphs.step(plan, tables)

    return graphs, step


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the model is one of the CPU")
def test_sizes_are_recorded_ahead_and_share_their_logits(recorder: list[Any]) -> None:
    model = _Model()
    graphs, step = _graphs(model)
    assert not graphs.record_next() and model.sizes == [], "no step has shown yet that anybody decodes"
    first = step([2, 3], [])
    assert first is not None and not graphs.replayed and graphs.recorded == []
    assert graphs.record_next() and graphs.recorded == [2], "what has occurred goes first"
    assert graphs.record_next() and graphs.recorded == [1, 2]
    assert graphs.record_next() and not graphs.record_next() and not graphs.record_next()
    assert graphs.recorded == [1, 2, 3, 4] and recorder == [None, "the pool", "the pool", "the pool"]
    one, two = step([1], []), step([2, 3], [])
    assert one is not None and two is not None and graphs.replayed
    assert torch.equal(two.logits, first.logits) and torch.equal(two.tokens, first.tokens)
    assert one.logits.data_ptr() == two.logits.data_ptr()
    assert not graphs.due


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the model is one of the CPU")
def test_what_a_load_needs_is_recorded_between_steps(recorder: list[Any]) -> None:
    model = _Model()
    graphs, step = _graphs(model)
    for use in range(1, 5):
        step([0, 1, 2], [])
        assert graphs.due == (use == 4) and graphs.recorded == []
    graphs.record_due()
    assert graphs.recorded == [3] and not graphs.due
    step([0, 1, 2], [])
    assert graphs.replayed


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the model is one of the CPU")
def test_states_are_untouched_where_a_kernel_does_not_compile(caplog: pytest.LogCaptureFixture) -> None:
    """The step is done again, and would advance them a second time."""
    model = _Model()
    graphs, step = _graphs(model)
    assert step([0, 1], [5, 6]) is not None and model.states.tolist() == [0, 0, 0, 0, 0, 1, 1, 0]
    assert model.sizes == [2, 2], "padding, and the step"
    model.error = provider.DeviceOnlyError("gated_delta_rule does not compile")
    with caplog.at_level(logging.WARNING):
        assert step([0, 1, 2], [5, 6, 7]) is None
    assert model.states.tolist() == [0, 0, 0, 0, 0, 1, 1, 0] and len(caplog.records) == 1
    assert not graphs.takes(StepPlan(0, slots=[0], starts=[1], lengths=[1], samples=[True]))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the model is one of the CPU")
def test_a_recording_that_fails_leaves_steps_call_by_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(run: Callable[[], Decoded], pool: Any) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")  # one that is no RuntimeError

    monkeypatch.setattr(decode_graphs, "record", fails)
    graphs, step = _graphs(_Model())
    step([0], [])
    with caplog.at_level(logging.WARNING):
        assert not graphs.record_next() and not graphs.record_next()
    assert len(caplog.records) == 1 and "steps of 1 requests could not be recorded" in caplog.text
    assert all(step([0], []) is not None for _ in range(9)) and not graphs.due


@pytest.mark.parametrize("ends", [True, False], ids=["ending it raises as well", "ending it works"])
def test_torch_is_on_its_stream_after_a_recording_that_failed(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    """Out of memory amidst it: torch's context leaves the recording's stream current where ending it raises."""
    streams = ["main"]

    class Context:
        def __init__(self, graph: object, **_: object) -> None: ...

        def __enter__(self) -> None:
            streams.append("of the recording")

        def __exit__(self, *_: object) -> None:
            if ends:
                raise RuntimeError("operation failed due to a previous error during capture")
            streams.append("main")

    def run() -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.cuda, "graph", Context)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    with pytest.raises(RuntimeError) as raised:
        record(run)
    assert streams[-1] == "main"
    assert isinstance(raised.value.__context__ if ends else raised.value, torch.OutOfMemoryError)
